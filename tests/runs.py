"""Runs of train.py as a user starts them: in a process of their own, on one rank or several."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
needs_prolog = pytest.mark.skipif(
    shutil.which("swipl") is None, reason="swipl not found: apt-get install swi-prolog-nox"
)

# The random reward gives every step a gradient, whatever an untrained model writes. 0.2 s a step.
SMALL = """--problems 200 --warm_start 2 --steps 4 --prompts 4 --samples 4 --max_new_tokens 24
    --eval_problems 4 --save_every 2 --reward random --wandb off""".split()


def command(*arguments, ranks=1, script="train.py"):
    """The command line of a script, under torchrun for more than one rank."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*start, str(ROOT / script), *arguments]


def run(folder, *arguments, ranks=1, timeout=240, environment=None):
    """Run train.py in `folder` to its end."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=folder,
        env={**ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def whole_run(folder, *arguments, name, ranks=1, environment=None):
    """Run train.py to a good end; returns the run's folder."""
    done = run(folder, *arguments, "--name", name, ranks=ranks, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / name


def resume(folder, *arguments, ranks=1):
    """Continue a run to a good end."""
    done = run(folder.parent.parent, "--resume", str(folder), *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]


def rows(folder, name="metrics.jsonl"):
    """JSON lines of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_bits(one, other, step, *more):
    """Metrics, weights, moments and `more` files of the checkpoint are equal to the last byte."""
    names = ["model.safetensors", "optimizer.safetensors", *more]
    files = ["metrics.jsonl", *(f"checkpoints/step_{step}/{name}" for name in names)]
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
