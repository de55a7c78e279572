"""bench/gpu.sh, the one command for a GPU: at smoke scale, and its table when stages fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).resolve().parent.parent


def run(out, *arguments, **environment):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)} | environment
    command = ["bash", "bench/gpu.sh", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560
    )


@pytest.mark.slow
def test_every_stage_runs_at_smoke_scale_and_the_last_lines_are_the_table(tmp_path):
    done = run(tmp_path, "--smoke", OMP_NUM_THREADS="1")
    stages = dict(line.split()[:2] for line in (tmp_path / "stages").read_text().splitlines())
    logs = {name: (tmp_path / f"{name}.log").read_text()[-800:] for name in stages}
    assert set(stages.values()) == {"0"}, (stages, logs)
    assert {"tests", "update", "sampler", "step", "kernels"} <= set(stages)

    table = done.stdout.split("\n\n")[-1].strip().splitlines()
    assert table[0].startswith("| stage | what |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert all(len(row) == len(gpu.COLUMNS) for row in rows)
    of = {stage: [row[1] for row in rows if row[0] == stage] for stage in stages}
    assert "smoke GRPO" in of["sampler"] and "smoke GRPO, exact" in of["sampler"]
    assert "smoke, as the plan says" in of["update"]
    assert of["step"] == ["tiny, prompts shared", "tiny, prompts not shared"]
    assert "passed" in rows[0][4]


def test_a_stage_without_time_is_skipped_and_only_its_rows_are_lost(tmp_path):
    done = run(tmp_path, "--smoke", "update", "step", SECONDS_IN_ALL="0")
    assert (tmp_path / "stages").read_text() == "update skipped 0\nstep skipped 0\n"
    assert done.stdout.count("no time was left after 0 s") == 2


def test_the_table_keeps_what_other_stages_found_when_one_fails(tmp_path):
    """update ended well; step printed half of its output and ran out of time."""
    row = {"shape": "0.5B", "update": "as the plan says", "cold_s": 2.0, "warm_s": 0.5}
    row |= {"mfu": 0.4, "planned_gb": 80.0, "peak_gb": 79.0}
    (tmp_path / "update.log").write_text("table\n" + json.dumps({"rows": [row]}) + "\n")
    (tmp_path / "step.log").write_text("0.5B, prompts shared\nseconds  cold")
    (tmp_path / "stages").write_text("update 0 9\nstep 124 60\n")

    lines = gpu.table(tmp_path)[2:]
    assert len(lines) == 2
    assert "| 2 | 0.5 | MFU 0.400, peak 79.0 GB of 80.0 planned | MFU 0.42 |" in lines[0]
    assert "out of time after 60 s: step.log" in lines[1]


def test_predictions_stand_beside_rows_that_exist():
    """A name that no row has would stay silent."""
    known = {"0.5B GRPO", "0.5B nano-vllm", "135M run"}
    known |= {"0.5B, as the plan says", "1.5B, as the plan says"}
    assert set(gpu.predictions()) == known
    assert {what for _, what in gpu.TARGETS} - known == {"0.5B GRPO, exact", "135M, prompts shared"}
