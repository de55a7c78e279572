"""The proof's stages are commands that this repository still takes, and its table is what a paired comparison says."""

import argparse
import json

import pytest

from bench import proof
from settings import add_flags, parse_settings
from sft import WarmStart


@pytest.mark.parametrize("scale", proof.SCALES)
def test_every_stage_is_a_command_that_is_taken(scale):
    n = proof.SCALES[scale]
    stages = list(proof.stages("DIR", ["prolog", "lisp"], [0, 1], n))
    assert [name for name, *_ in stages][:3] == [
        "prolog warm start",
        "lisp warm start",
        "proof/prolog-seed-0",
    ] and len(stages) == 7
    for _, command, done, folder in stages:
        script, *words = command.split()
        if script == "sft.py":
            parser = argparse.ArgumentParser()
            add_flags(parser, WarmStart)
            assert (
                WarmStart(**vars(parser.parse_args(words))).max_prompt_tokens == n["prompt_tokens"]
            )
        else:
            s, _, _ = parse_settings(words, "")
            assert f"runs/{s.name}" == folder and done.endswith(f"step_{s.steps}.jsonl")
            assert (
                s.eval_every and s.steps % s.eval_every == 0
            )  # the last evaluation is the last step's


def test_table_compares_the_same_questions(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs/proof/prolog-seed-0"
    (folder / "eval").mkdir(parents=True)
    for step, right in ((0, (0, 0, 1, 0)), (8, (1, 0, 1, 1))):
        facts = {"status": "ok", "value": "7", "question": "Why?"}
        rows = [
            {"id": i, "correct": bool(c), "constant": i == 1, "program": f"p{step}", **facts}
            for i, c in enumerate(right)
        ]
        (folder / f"eval/step_{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "times.jsonl").write_text('{"time/step": 1800.0}\n' * 2)
    monkeypatch.chdir(tmp_path)
    proof.table()
    printed = capsys.readouterr().out
    assert (
        printed.count("--- ") == 2 + 8
        and "before (ok, value 7):\np0\nafter (value 7):\np8" in printed
    )  # two problems gained, eight columns
    row = printed.splitlines()[3]
    assert row.startswith("| prolog-seed-0 | 8 | 0.250 | 0.750 | +50.0 (") and row.endswith(
        "| 2, 0 of 4 | 0.250, 0.250 | 1.00 |"
    )
