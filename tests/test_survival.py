"""Machines that share nothing, ranks that die, kills at any moment (DESIGN.md invariant 5): real torchrun agents, real signals."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_train import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    command,
    needs_prolog,
    rows,
    run,
    save_two,
)  # noqa: F401 (a fixture)

from runtime import checkpoint

pytestmark = needs_prolog


def agents(folders, *arguments):
    """One torchrun agent per folder, each with one rank: machines that share no path -> their processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(folders)}",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    pipes = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [
        subprocess.Popen(
            [*start, f"--node_rank={i}", str(ROOT / "train.py"), *arguments], cwd=folder, **pipes
        )
        for i, folder in enumerate(folders)
    ]


def finish(processes, timeout=200):
    done = []
    for process in processes:
        try:
            done.append(process.communicate(timeout=timeout))
        finally:
            process.kill()
    return done


def test_two_machines_that_share_no_folder_train_like_one_and_resume(straight, tmp_path):  # noqa: F811
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    processes = agents(folders, *SMALL, "--name", "two", "--steps", "2")
    texts = finish(processes)
    assert [p.returncode for p in processes] == [0, 0], texts[0][1][-2000:] + texts[1][1][-2000:]
    assert (folders[0] / "runs/two/checkpoints/step_2").exists()
    assert sorted(p.name for p in (folders[1] / "runs/two").iterdir()) == [
        "config.json",
        "warm_start",
        "warm_start.init",
    ]  # nothing is written twice
    resumed = agents(folders, "--resume", "runs/two", "--steps", "4")
    texts = finish(resumed)
    assert [p.returncode for p in resumed] == [0, 0], texts[0][1][-2000:] + texts[1][1][-2000:]
    exact = ("reward", "pass_rate", "num_tokens", "frac_reward_zero_std")
    for one, two in zip(rows(straight), rows(folders[0] / "runs/two"), strict=True):
        assert {k: one[k] for k in exact} == {k: two[k] for k in exact} and two[
            "loss"
        ] == pytest.approx(one["loss"], abs=1e-4)


def test_one_two_and_four_ranks_draw_the_same_samples_and_learn_the_same(tmp_path):
    """Ten steps; the run on four ranks stops after five and goes on with two."""
    ten = [*SMALL, "--steps", "10", "--name"]
    for ranks, arguments in (
        (1, [*ten, "1"]),
        (2, [*ten, "2"]),
        (4, [*ten, "4", "--steps", "5"]),
        (2, ["--resume", "runs/4", "--steps", "10"]),
    ):
        done = run(tmp_path, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path / "runs/1"
    texts = lambda folder: {
        (r["step"], r["problem"], r["sample"]): (r["text"], r["reward"], r["advantage"])
        for r in rows(folder, "samples.jsonl")
    }
    exact = ("reward", "pass_rate", "completions/mean_length", "frac_reward_zero_std", "num_tokens")
    for many in (tmp_path / "runs/2", tmp_path / "runs/4"):
        for one, other in zip(rows(alone), rows(many), strict=True):
            assert {k: one[k] for k in exact} == {k: other[k] for k in exact}
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-4) and other[
                "grad_norm"
            ] == pytest.approx(one["grad_norm"], rel=1e-2)
        written = texts(many)  # rank 0's part of the step
        assert len(written) >= 40 and written == {key: texts(alone)[key] for key in written}


def test_a_problem_on_one_machine_ends_all_with_its_sentence(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    started = time.monotonic()
    processes = agents(
        folders, *SMALL, "--name", "x", "--task", "sums", "--model", str(folders[1] / "only_here")
    )
    texts = finish(processes)
    assert time.monotonic() - started < 60 and all(p.returncode for p in processes)
    assert "only_here is not a folder with a checkpoint" in texts[0][1]


def child_ranks(agent):
    """Process ids of an agent's ranks."""
    try:
        return [
            int(pid) for pid in open(f"/proc/{agent.pid}/task/{agent.pid}/children").read().split()
        ]
    except FileNotFoundError:
        return []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies_takes_the_run_down_at_once_or_torchrun_brings_it_back(
    straight, tmp_path, restarts
):  # noqa: F811
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        f"--max_restarts={restarts}",
    ]
    agent = subprocess.Popen(
        [*start, str(ROOT / "train.py"), *SMALL, "--name", "died"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "runs/died"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/step_2").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim = next(
        pid
        for pid in child_ranks(agent)
        if b"RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()
    )
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    stderr = agent.communicate(timeout=120)[1]
    if restarts:
        assert agent.returncode == 0, stderr[-6000:]
        assert [r["step"] for r in rows(folder)] == [1, 2, 3, 4] and (
            folder / "checkpoints/step_4"
        ).exists()
        assert rows(folder)[3]["reward"] == rows(straight)[3]["reward"]
    else:
        assert agent.returncode != 0 and time.monotonic() - killed < 30 and "SIGKILL" in stderr


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    model, optimizer = save_two(tmp_path)
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, step, model, optimizer, {"updates": step}, None, keep=1, best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_2", "step_5"]


KILLS = int(os.environ.get("RARECODE_KILLS", 3))  # the full torture: RARECODE_KILLS=50


def test_killed_at_random_moments_a_run_ends_as_the_straight_one(tmp_path):
    """SIGKILL at random moments, every third one inside a save; after each the run is resumed, and at the end metrics and weights are the straight run's."""
    steps = 5 * KILLS  # between two kills a run gets one to four steps further
    long = [
        *SMALL,
        "--steps",
        str(steps),
        "--save_every",
        "1",
        "--prompts",
        "2",
        "--max_new_tokens",
        "12",
        "--eval_problems",
        "2",
    ]
    done = run(tmp_path, *long, "--name", "straight")
    assert done.returncode == 0, done.stderr[-2000:]
    chance, folder, arguments, inside, kills = (
        random.Random(0),
        tmp_path / "runs/torn",
        [*long, "--name", "torn"],
        0,
        0,
    )
    newest = lambda: max(
        [int(p.name[5:]) for p in checkpoint.sorted_checkpoints(folder / "checkpoints")], default=0
    )
    while kills < KILLS and newest() < steps:
        process, before = (
            subprocess.Popen(
                command(*arguments),
                cwd=tmp_path,
                env=ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            ),
            newest(),
        )
        wait_until(process, lambda: newest() > before)
        if kills % 3 == 0:
            wait_until(process, lambda: any((folder / "checkpoints").glob(".step_*.tmp")))
        else:
            time.sleep(chance.uniform(0, 0.6))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        inside += any((folder / "checkpoints").glob(".step_*.tmp"))
        arguments = ["--resume", str(folder)]
    done = run(tmp_path, "--resume", str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{kills} kills, {inside} of them inside a save")
    assert kills == KILLS and inside >= KILLS // 6
    straight_run = tmp_path / "runs/straight"
    assert (folder / "metrics.jsonl").read_bytes() == (straight_run / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (folder / f"checkpoints/step_{steps}" / name).read_bytes() == (
            straight_run / f"checkpoints/step_{steps}" / name
        ).read_bytes()


def wait_until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.001)
