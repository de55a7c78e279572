"""Machines that share nothing, ranks that die, kills at any moment: real torchrun agents and signals."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    assert_same_bits,
    command,
    needs_prolog,
    resume,
    rows,
    run,
    whole_run,
)
from runtime import checkpoint

pytestmark = [needs_prolog, pytest.mark.slow]
EXACT = ("reward", "pass_rate", "completions/mean_length", "frac_reward_zero_std", "num_tokens")


def assert_same_samples(one, other):
    """Two runs drew the same samples; losses are equal up to the order of sums."""
    for a, b in zip(rows(one), rows(other), strict=True):
        assert [a[name] for name in EXACT] == [b[name] for name in EXACT]
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)


# ---- several machines ----


def two_machines(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


def run_together(folders, *arguments):
    """One torchrun agent a folder, each with one rank: machines that share no path.

    Returns their return codes and what they wrote to stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number, folder in enumerate(folders):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
        agent += [f"--nnodes={len(folders)}", f"--node_rank={number}"]
        agent += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        processes.append(
            subprocess.Popen(
                [*agent, str(ROOT / "train.py"), *arguments],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=200)[1])
        finally:
            process.kill()
    return [process.returncode for process in processes], errors


def test_two_machines_that_share_no_folder_train_like_one_and_resume(straight, tmp_path):
    folders = two_machines(tmp_path)
    codes, errors = run_together(folders, *SMALL, "--name", "two", "--steps", "2")
    assert codes == [0, 0], "".join(errors)[-4000:]
    first, second = (folder / "runs/two" for folder in folders)
    assert (first / "checkpoints/step_2").exists()
    # Nothing is written twice: the second machine has what it needs to start again.
    names = sorted(path.name for path in second.iterdir())
    assert names == ["config.json", "warm_start", "warm_start.init"]

    codes, errors = run_together(folders, "--resume", "runs/two", "--steps", "4")
    assert codes == [0, 0], "".join(errors)[-4000:]
    assert_same_samples(straight, first)


def test_a_problem_on_one_machine_ends_all_with_its_sentence(tmp_path):
    folders = two_machines(tmp_path)
    started = time.monotonic()
    only_here = str(folders[1] / "only_here")
    codes, errors = run_together(folders, *SMALL, "--name", "x", "--model", only_here)
    assert time.monotonic() - started < 60
    assert all(codes)
    assert "only_here is not a folder with a checkpoint" in errors[0]


def test_one_two_and_four_ranks_draw_the_same_samples_and_learn_the_same(tmp_path):
    """Ten steps; the run on four ranks stops after five and continues on two.

    A rate that falls to the last step would differ between five steps and ten.
    """
    ten = [*SMALL, "--steps", "10", "--schedule", "constant"]
    alone = whole_run(tmp_path, *ten, name="1")
    two = whole_run(tmp_path, *ten, name="2", ranks=2)
    four = whole_run(tmp_path, *ten, "--steps", "5", name="4", ranks=4)
    resume(four, "--steps", "10", ranks=2)

    def texts(folder):
        """What rank 0 logged of its samples."""
        found = {}
        for row in rows(folder, "samples.jsonl"):
            key = (row["step"], row["problem"], row["sample"])
            found[key] = (row["text"], row["reward"], row["advantage"])
        return found

    for many in (two, four):
        assert_same_samples(alone, many)
        written = texts(many)
        assert len(written) >= 40
        assert written == {key: texts(alone)[key] for key in written}


# ---- ranks that die ----


def rank_1_of(agent):
    """Process id of an agent's rank 1."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in children:
        if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_takes_the_run_down_at_once_or_torchrun_brings_it_back(
    straight, tmp_path, restarts
):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", f"--max_restarts={restarts}"]
    agent = subprocess.Popen(
        [*torchrun, str(ROOT / "train.py"), *SMALL, "--name", "died"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "runs/died"
    wait_until(agent, lambda: (folder / "checkpoints/step_2").exists())
    killed = time.monotonic()
    os.kill(rank_1_of(agent), signal.SIGKILL)
    stderr = agent.communicate(timeout=120)[1]

    if restarts:
        assert agent.returncode == 0, stderr[-6000:]
        assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
        assert (folder / "checkpoints/step_4").exists()
        assert rows(folder)[3]["reward"] == rows(straight)[3]["reward"]
    else:
        assert agent.returncode != 0
        assert time.monotonic() - killed < 30
        assert "SIGKILL" in stderr


# ---- kills at any moment ----

KILLS = int(os.environ.get("RARECODE_KILLS", 3))  # the full torture: RARECODE_KILLS=50


def test_killed_at_random_moments_a_run_ends_as_the_straight_one(tmp_path):
    """SIGKILL at random moments, every third inside a save; after each the run is resumed."""
    steps = 5 * KILLS  # between two kills a run gets one to four steps further
    long = [*SMALL, "--steps", str(steps)]
    long += "--save_every 1 --prompts 2 --max_new_tokens 12 --eval_problems 2".split()
    straight_run = whole_run(tmp_path, *long, name="straight")

    chance = random.Random(0)
    folder = tmp_path / "runs/torn"
    checkpoints = folder / "checkpoints"
    arguments = [*long, "--name", "torn"]
    kills = inside = 0
    while kills < KILLS and newest_step(checkpoints) < steps:
        before = newest_step(checkpoints)
        process = subprocess.Popen(
            command(*arguments),
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(process, lambda before=before: newest_step(checkpoints) > before)
        if kills % 3 == 0:
            wait_until(process, lambda: is_saving(checkpoints))
        else:
            time.sleep(chance.uniform(0, 0.6))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        inside += is_saving(checkpoints)
        arguments = ["--resume", str(folder)]

    done = run(tmp_path, "--resume", str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{kills} kills, {inside} of them inside a save")
    assert kills == KILLS
    assert inside >= KILLS // 6
    assert_same_bits(folder, straight_run, steps)


def newest_step(checkpoints):
    found = checkpoint.sorted_checkpoints(checkpoints)
    return int(found[0].name[5:]) if found else 0


def is_saving(checkpoints):
    return any(checkpoints.glob(".step_*.tmp"))


def wait_until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.001)
