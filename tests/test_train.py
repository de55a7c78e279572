"""The whole loop, small: exact resume, interruption, ranks, learning. Real sampler and sandbox."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest

import build
import train
from runs import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    assert_same_bits,
    command,
    needs_prolog,
    resume,
    rows,
    whole_run,
)
from runtime import hugging_face
from tasks.problems import Problem
from tasks.render import Step

# All that a resume must remember: prompts drawn for refilled groups, the reference, adapters.
ALL = [
    *SMALL,
    *"""--dynamic_sampling 2 --overlong_buffer 8 --kl_coef 0.05 --entropy_coef 0.01 --minibatches 2
        --samples 2 --lora_rank 4""".split(),
]

# ---- stopping and continuing ----


def cut_short(folder, how, *arguments, step=2):
    """Start a run named "cut" and stop it by signal `how` as soon as `step` is saved.

    Returns (its folder, stderr, return code).
    """

    def hear_ctrl_c():
        """A shell's background jobs ignore Ctrl-C, and their children inherit that."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    folder.mkdir(exist_ok=True)
    cut = folder / "runs" / "cut"
    process = subprocess.Popen(
        command(*arguments, "--name", "cut"),
        cwd=folder,
        env=ENVIRONMENT,
        preexec_fn=hear_ctrl_c,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (cut / f"checkpoints/step_{step}").exists() and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.002)
    process.send_signal(how)
    stderr = process.communicate(timeout=60)[1]
    return cut, stderr, process.returncode


@needs_prolog
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_run_resumes_to_the_same_bits(straight, tmp_path, how):
    """Stopped in step 3 or 4, resumed from step 2: as if nothing had happened."""
    for _ in range(3):  # on a busy machine the run may end before it is seen
        cut, stderr, code = cut_short(tmp_path, how, *SMALL)
        if code != 0:
            break
        shutil.rmtree(cut)
    assert code != 0
    if how == signal.SIGINT:
        assert "continue with" in stderr and "Traceback" not in stderr
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')  # what a kill in the middle of a write leaves
    resume(cut)
    assert_same_bits(cut, straight, 4)


@needs_prolog
@pytest.mark.slow
def test_a_kill_in_an_evaluation_costs_no_step(tmp_path):
    """Step 4 is saved before it is evaluated: resuming repeats the evaluation and no step."""
    long_evaluation = [*SMALL, "--eval_problems", "40", "--eval_samples", "4"]
    straight_run = whole_run(tmp_path / "a", *long_evaluation, name="straight")
    for _ in range(3):
        cut, _, code = cut_short(tmp_path / "b", signal.SIGKILL, *long_evaluation, step=4)
        if code != 0:
            break
        shutil.rmtree(cut)
    assert code != 0
    assert [row["step"] for row in rows(cut)] == [1, 2, 3]
    resume(cut)
    assert_same_bits(cut, straight_run, 4)
    assert rows(cut, "samples.jsonl") == rows(straight_run, "samples.jsonl")


@needs_prolog
def test_two_threads_give_the_same_bits_twice(tmp_path):
    """Prompts are shared, so rows of the hidden states are read several times (finding X4)."""
    threads = {"OMP_NUM_THREADS": "2"}
    first = whole_run(tmp_path, *SMALL, name="first", environment=threads)
    assert_same_bits(whole_run(tmp_path, *SMALL, name="second", environment=threads), first, 4)


@pytest.fixture(scope="module")
def straight_all(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("straight_all"), *ALL, name="straight")


@needs_prolog
@pytest.mark.slow
def test_run_with_lora_kl_and_refilled_groups_resumes_to_the_same_bits(straight_all, tmp_path):
    cut, _, _ = cut_short(tmp_path, signal.SIGKILL, *ALL)
    resume(cut)
    assert_same_bits(cut, straight_all, 4, "adapter/adapter_model.safetensors")


@needs_prolog
@pytest.mark.slow
def test_groups_without_signal_are_refilled_and_the_reference_is_the_start(straight_all):
    drawn = []
    for step in (2, 4):
        state = (straight_all / f"checkpoints/step_{step}/state.json").read_text()
        drawn.append(json.loads(state)["drawn"])
    # 4 prompts a step, and more where both coins of a pair fell alike.
    assert drawn[0] > 8
    assert drawn[1] > drawn[0] + 8

    metrics = rows(straight_all)
    kl = [row["kl/k3"] for row in metrics]
    assert 0 <= kl[0] < kl[-1] / 5
    assert kl[-1] > 1e-6
    # The sampler has the adapters, which have moved.
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-5 for row in metrics)


@needs_prolog
@pytest.mark.slow
def test_two_ranks_refill_the_same_groups(straight_all, tmp_path):
    both = whole_run(tmp_path, *ALL, "--steps", "2", name="two", ranks=2)
    for one, two in zip(rows(straight_all), rows(both)):
        assert one["num_tokens"] == two["num_tokens"]
        assert two["reward"] == pytest.approx(one["reward"])
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@needs_prolog
def test_sampler_and_trainer_agree_and_a_run_leaves_readable_files(straight):
    for number, row in enumerate(rows(straight), 1):
        assert row["step"] == number
        assert row["sampling/sampling_logp_difference/max"] < 1e-5
        assert row["grad_norm"] > 0
    for row in rows(straight, "times.jsonl"):  # reward: what sampling did not hide
        assert 0 <= row["time/reward"] < row["time/step"]
        assert row["time/generate"] > 0
    assert json.loads((straight / "config.json").read_text())["task"] == "sums"
    assert len(rows(straight, "samples.jsonl")) == 4 * 8
    assert hugging_face.load_model(straight / "checkpoints/step_4").config.num_hidden_layers == 5


@needs_prolog
@pytest.mark.slow
def test_a_runs_source_is_all_that_it_takes_to_repeat_it(straight):
    source = straight / "source"
    help_of_the_copy = [sys.executable, str(source / "train.py"), "--help"]
    done = subprocess.run(help_of_the_copy, capture_output=True, text=True, cwd=source, timeout=60)
    assert done.returncode == 0 and "--lang" in done.stdout
    assert (source / "recipes/tiny.toml").exists()


# ---- learning ----


def small_sums(task, split, data=None, count=None, seed=0):
    """One-step sums of two small numbers, learned in seconds; no held-out pair is trained on."""
    made = []
    for a in range(2, 30):
        for b in range(2, 30):
            held_out = (a * 7 + b) % 5 == 0
            if held_out == (split == "test"):
                step = Step("v1", f"{a}+{b}", Fraction(a + b))
                name = f"small/{split}/{a}/{b}"
                made.append(Problem(name, "sums", f"{a} plus {b}?", step.value, [step]))
    random.Random(0).shuffle(made)
    return made[: count or len(made)]


@needs_prolog
def test_training_helps_on_held_out_problems_and_a_random_reward_does_not(tmp_path, monkeypatch):
    """The warm start writes '=' or ':=' in 7 of 10 programs; only running them shows which."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load_problems", small_sums)
    settings = """--prompts 8 --samples 8 --max_new_tokens 80 --eval_problems 40 --eval_samples 2
        --save_every 100 --wandb off --steps 10""".split()
    train.main(["--name", "real", "--warm_start", "100:0.7", *settings])
    same_start = ["--recipe", str(ROOT / "recipes/tiny.toml"), "--model", "runs/real/warm_start"]
    train.main([*same_start, "--name", "random", "--reward", "random", *settings])

    def passed(name, step):
        samples = rows(tmp_path / "runs" / name, f"eval/step_{step}.jsonl")
        return sum(sample["correct"] for sample in samples) / 80

    before = passed("real", 0)
    assert passed("random", 0) == before > 0.02
    assert passed("real", 10) > before + 0.1
    assert passed("random", 10) < before + 0.1
