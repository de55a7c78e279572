"""The proof's stages are commands this repository still takes, and its table compares pairs."""

import argparse
import json

import pytest

from bench import proof
from settings import add_flags, parse_settings
from sft import WarmStart


@pytest.mark.parametrize("scale", proof.SCALES.values(), ids=list(proof.SCALES))
def test_every_stage_is_a_command_that_is_taken(scale):
    stages = list(proof.stages("DIR", ["prolog", "lisp"], [0, 1], scale))
    assert [stage.name for stage in stages] == [
        "prolog warm start",
        "lisp warm start",
        "proof/prolog-seed-0",
        "proof/lisp-seed-0",
        "proof/prolog-random-0",
        "proof/prolog-seed-1",
        "proof/lisp-seed-1",
    ]
    for stage in stages:
        script, *words = stage.command.split()
        if script == "sft.py":
            parser = argparse.ArgumentParser()
            add_flags(parser, WarmStart)
            warm = WarmStart(**vars(parser.parse_args(words)))
            assert warm.max_prompt_tokens == scale.prompt_tokens
        else:
            settings, *_ = parse_settings(words, "")
            assert stage.run_folder == f"runs/{settings.name}"
            assert stage.done == f"runs/{settings.name}/eval/step_{settings.steps}.jsonl"
            # The last evaluation is the last step's.
            assert settings.eval_every and settings.steps % settings.eval_every == 0


def test_stages_of_another_model_are_not_taken_for_done(tmp_path, monkeypatch):
    """Same path, other weights; or another scale."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "DIR/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    proof.check_start("DIR", "gpu")
    proof.check_start("DIR", "gpu")
    with pytest.raises(SystemExit, match="another model or scale"):
        proof.check_start("DIR", "cpu")
    weights.write_bytes(b"new")
    with pytest.raises(SystemExit, match="another model or scale"):
        proof.check_start("DIR", "gpu")


def test_table_compares_the_same_questions(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs/proof/prolog-seed-0"
    (folder / "eval").mkdir(parents=True)
    for step, outcomes in ((0, (0, 0, 1, 0)), (8, (1, 0, 1, 1))):
        lines = []
        for id, correct in enumerate(outcomes):
            row = {
                "id": id,
                "correct": bool(correct),
                "constant": id == 1,
                "program": f"p{step}",
                "status": "ok",
                "value": "7",
                "question": "Why?",
            }
            lines.append(json.dumps(row) + "\n")
        (folder / f"eval/step_{step}.jsonl").write_text("".join(lines))
    (folder / "times.jsonl").write_text('{"time/step": 1800.0}\n' * 2)

    monkeypatch.chdir(tmp_path)
    proof.table()
    printed = capsys.readouterr().out

    # 1 of 4 right before, 3 of 4 after; problem 1 alone is constant; 2 x 1,800 s is an hour.
    row = printed.splitlines()[3]
    assert row.startswith("| prolog-seed-0 | 8 | 0.250 | 0.750 | +50.0 (")
    assert row.endswith("| 2, 0 of 4 | 0.250, 0.250 | 1.00 |")
    # The programs of both gained problems, below a rule of eight columns.
    assert printed.count("--- ") == 2 + 8
    assert "before (ok, value 7):\np0\nafter (value 7):\np8" in printed
