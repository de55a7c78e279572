"""The proof's stages are commands this repository still takes, and its table compares pairs."""

import json
import shutil
import subprocess
import sys

import pytest

import sft
from bench import proof
from runs import ENVIRONMENT, ROOT, needs_prolog
from sandbox.languages import load_language
from settings import parse_settings
from tasks.problems import load_problems, program_messages


@pytest.mark.parametrize("scale", proof.SCALES.values(), ids=list(proof.SCALES))
def test_every_stage_is_a_command_that_is_taken(scale):
    stages = list(proof.stages("DIR", ["prolog", "lisp"], [0, 1], scale))
    assert [stage.name for stage in stages] == [
        "proof/prolog-seed-0",
        "proof/prolog-random-0",
        "proof/lisp-seed-0",
        "proof/lisp-random-0",
        "proof/prolog-seed-1",
        "proof/lisp-seed-1",
    ]
    for stage in stages:
        settings, *_ = parse_settings(stage.command.split()[1:], "")
        assert stage.name == settings.name
        assert settings.model == "DIR" and settings.examples == 1
        assert (settings.reward == "random") == ("random" in stage.name)
        # The last evaluation is the last step's, and both kinds of samples are taken.
        assert settings.eval_every and settings.steps % settings.eval_every == 0
        assert settings.eval_greedy and settings.eval_temperature == 1


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


def write_evaluations(folder, kind, by_step):
    """by_step: {step: outcomes of each problem's samples}."""
    (folder / kind).mkdir(parents=True)
    for step, outcomes in by_step.items():
        lines = []
        for id, corrects in enumerate(outcomes):
            for sample, correct in enumerate(corrects):
                row = {
                    "id": id,
                    "sample": sample,
                    "correct": bool(correct),
                    "constant": id == 1,
                    "program": f"p{step}",
                    "status": "ok",
                    "value": "7",
                    "question": "Why?",
                }
                lines.append(json.dumps(row) + "\n")
        (folder / kind / f"step_{step}.jsonl").write_text("".join(lines))


def test_table_compares_the_same_questions(tmp_path, monkeypatch, capsys):
    """Greedy 1 of 4, then 3; at T 1 sharper alone: pass@1 0.25 -> 0.5, pass@2 0.5 twice."""
    folder = tmp_path / "runs/proof/prolog-seed-0"
    write_evaluations(folder, "greedy", {0: [[0], [0], [1], [0]], 8: [[1], [0], [1], [1]]})
    at_temperature_1 = {0: [[1, 0], [0, 1], [0, 0], [0, 0]], 8: [[1, 1], [1, 1], [0, 0], [0, 0]]}
    write_evaluations(folder, "eval", at_temperature_1)
    times = '{"time/step": 1700.0}\n{"time/step": 1700.0, "time/eval": 200.0}\n{"ti'
    (folder / "times.jsonl").write_text(times)

    monkeypatch.chdir(tmp_path)
    proof.table()
    printed = capsys.readouterr().out
    greedy, sampled, any_of = printed.splitlines()[3:6]

    # Problem 1 alone is constant; 2 x 1,700 s and an evaluation of 200 are an hour.
    assert greedy.startswith("| prolog-seed-0 | 8 | pass@1 greedy | 0.250 (0.0")
    assert "| +50.0 (" in greedy
    assert greedy.endswith("| 2, 0 of 4 | 0.250, 0.250 | 1.00 |")
    assert sampled.startswith("| prolog-seed-0 | 8 | pass@1 at temperature 1 | 0.250 (")
    assert any_of.startswith("| prolog-seed-0 | 8 | pass@2 at temperature 1 | 0.500 (")
    assert "| +0.0 (+0.0 to +0.0) | 0, 0 of 4 |" in any_of
    # The programs of both gained problems, below a rule of nine columns.
    assert printed.count("--- ") == 2 + 9
    assert "before (ok, value 7):\np0\nafter (value 7):\np8" in printed
    assert (tmp_path / "runs/proof/report.html").exists()


def test_a_table_of_no_run_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    proof.table()
    assert len(capsys.readouterr().out.splitlines()) == 3


# ---- every stage, small ----


@pytest.fixture
def small_world(tmp_path):
    """A folder with twelve short questions as GSM8K's and a random tiny model; its environment."""
    for split in ("train", "test"):
        rows = [
            {"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"}
            for n in range(2, 14)
        ]
        path = tmp_path / f"data/gsm8k/{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    language = load_language("prolog")
    problems = load_problems("sums", "train", count=200)
    sft.make_tiny(
        problems,
        language,
        lambda problem: program_messages(problem, language, 1),
        tmp_path / "model",
        seed=0,
    )
    return {**ENVIRONMENT, "RARECODE_DATA": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}


@needs_prolog
@pytest.mark.skipif(shutil.which("sbcl") is None, reason="sbcl not found: apt-get install sbcl")
@pytest.mark.slow
def test_every_stage_runs_and_stops_in_time_and_continues(small_world, tmp_path):
    """Stopped after 3 s, then to its end: both languages, their controls, the table, the page."""

    def prove(*arguments):
        command = [sys.executable, "-m", "bench.proof", "--model", "model", "--scale", "smoke"]
        return subprocess.run(
            [*command, "--seeds", "0", *arguments],
            cwd=tmp_path,
            env=small_world,
            capture_output=True,
            text=True,
            timeout=240,
        )

    stopped = prove("--minutes", "0.05")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert "the same command continues from here" in stopped.stdout
    whole = prove()
    assert whole.returncode == 0, whole.stderr[-3000:]
    again = prove()
    assert "== " not in again.stdout  # nothing is left to do

    runs = [
        f"{language}-{kind}-0" for language in ("lisp", "prolog") for kind in ("random", "seed")
    ]
    rows = [line.split(" | ") for line in again.stdout.splitlines() if line.startswith("| ")]
    figures = ["pass@1 greedy", "pass@1 at temperature 1", "pass@2 at temperature 1"]
    expected = [(f"| {run}", "2", figure) for run in runs for figure in figures]
    assert [tuple(row[:3]) for row in rows if row[0].endswith("-0")] == expected
    for run in runs:
        assert (tmp_path / "runs/proof" / run / "report.html").exists()
    assert (tmp_path / "runs/proof/report.html").exists()
