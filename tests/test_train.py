"""The whole loop, small: exact resume, interruption, ranks, bad input (DESIGN.md invariants 5 and 13). Real sampler, SWI-Prolog, sandbox."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import build
import model as model_file
import train
from batches import make_optimizer
from runtime import checkpoint, hugging_face
from runtime.logs import RunLog
from runtime.tokenizer import train_bpe
from tasks.problems import Problem
from tasks.render import Step

ROOT = Path(__file__).resolve().parent.parent
needs_prolog = pytest.mark.skipif(
    shutil.which("swipl") is None, reason="swipl not found: apt-get install swi-prolog-nox"
)
# The random reward gives every step a gradient, whatever an untrained model writes.
SMALL = "--problems 200 --warm_start 2 --steps 4 --prompts 4 --samples 4 --max_new_tokens 24 --eval_problems 4 --save_every 2 --reward random --wandb off".split()
# Everything that a resume must remember: prompts drawn for refilled groups, the reference model, adapters.
ALL = [
    *SMALL,
    *"--dynamic_sampling 2 --overlong_buffer 8 --kl_coef 0.05 --entropy_coef 0.01 --minibatches 2 --samples 2 --lora_rank 4".split(),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments, ranks=1):
    start = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    )
    return [*start, str(ROOT / "train.py"), *arguments]


def cut_short(folder, how, *arguments):
    """Start a run named "cut" and stop it by signal `how` in the middle of step 3 or 4 -> (stderr, return code)."""
    heard = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs ignore Ctrl-C, and their children inherit that
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(
        command(*arguments, "--name", "cut"), cwd=folder, env=ENVIRONMENT, preexec_fn=heard, **pipes
    )
    deadline = time.monotonic() + 120
    while (
        not (folder / "runs/cut/checkpoints/step_2").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)  # a step takes 0.2 s
    process.send_signal(how)
    return process.communicate(timeout=60)[1], process.returncode


def run(folder, *arguments, ranks=1):
    return subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder, *SMALL, "--name", "straight")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "before" in done.stdout and "step 4/4" in done.stdout
    return folder / "runs" / "straight"


def rows(run_folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_folder / name).read_text().splitlines()]


@needs_prolog
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_run_resumes_to_the_same_bits(straight, tmp_path, how):
    """Stopped in the middle of step 3 or 4, resumed from step 2: metrics, weights and moments equal the straight run's."""
    cut = tmp_path / "runs" / "cut"
    for _ in range(3):  # on a busy machine the run may end before it is seen
        stderr, code = cut_short(tmp_path, how, *SMALL)
        if code != 0:
            break
        shutil.rmtree(cut)
    assert code != 0
    if how == signal.SIGINT:
        assert "continue with" in stderr and "Traceback" not in stderr
    with open(cut / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "rew')  # what a kill in the middle of a write leaves
    done = run(tmp_path, "--resume", str(cut))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (cut / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (cut / "checkpoints/step_4" / name).read_bytes() == (
            straight / "checkpoints/step_4" / name
        ).read_bytes()


@pytest.fixture(scope="module")
def straight_all(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight_all")
    done = run(folder, *ALL, "--name", "straight")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "straight"


@needs_prolog
def test_run_with_lora_kl_and_refilled_groups_resumes_to_the_same_bits(straight_all, tmp_path):
    cut_short(tmp_path, signal.SIGKILL, *ALL)
    cut = tmp_path / "runs" / "cut"
    done = run(tmp_path, "--resume", str(cut))
    assert done.returncode == 0, done.stderr[-2000:]
    assert (cut / "metrics.jsonl").read_bytes() == (straight_all / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        assert (cut / "checkpoints/step_4" / name).read_bytes() == (
            straight_all / "checkpoints/step_4" / name
        ).read_bytes()


@needs_prolog
def test_groups_without_signal_are_refilled_and_the_reference_is_the_start(straight_all):
    drawn = [
        json.loads((straight_all / f"checkpoints/step_{n}/state.json").read_text())["drawn"]
        for n in (2, 4)
    ]
    assert (
        drawn[0] > 8 and drawn[1] > drawn[0] + 8
    )  # 4 prompts a step, and more where both coins of a pair fell alike
    kl = [row["kl/k3"] for row in rows(straight_all)]
    assert 0 <= kl[0] < kl[-1] / 5 and kl[-1] > 1e-6
    assert all(
        row["sampling/sampling_logp_difference/max"] < 1e-5 for row in rows(straight_all)
    )  # the sampler has the adapters, which have moved


@needs_prolog
def test_two_ranks_refill_the_same_groups(straight_all, tmp_path):
    done = run(tmp_path, *ALL, "--name", "two", "--steps", "2", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(rows(straight_all), rows(tmp_path / "runs/two")):
        assert (one["num_tokens"], one["reward"]) == (
            two["num_tokens"],
            pytest.approx(two["reward"]),
        )
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4) and two[
            "grad_norm"
        ] == pytest.approx(one["grad_norm"], rel=1e-3)


@needs_prolog
def test_sampler_and_trainer_agree_and_a_run_leaves_readable_files(straight):
    for row in rows(straight):
        assert (
            row["sampling/sampling_logp_difference/max"] < 1e-5
        )  # DESIGN.md invariant 1, in the loop
        assert row["grad_norm"] > 0 and row["step"] == rows(straight).index(row) + 1
    for row in rows(straight, "times.jsonl"):  # what sampling did not hide of the programs' time
        assert 0 <= row["time/reward"] < row["time/step"] and row["time/generate"] > 0
    assert json.loads((straight / "config.json").read_text())["task"] == "sums"
    assert (straight / "source" / "train.py").exists() and len(
        rows(straight, "samples.jsonl")
    ) == 4 * 8
    assert (
        hugging_face.load_model(straight / "checkpoints" / "step_4").config.num_hidden_layers == 5
    )


def small_model():
    shapes = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return model_file.random_model(model_file.Config.from_dict({"model_type": "qwen2", **shapes}))


def save_two(folder):
    model = small_model()
    optimizer = make_optimizer(model)
    for step in (1, 2):
        checkpoint.save(folder, step, model, optimizer, {"updates": step}, None, keep=5)
    return model, optimizer


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, harm):
    save_two(tmp_path)
    path = tmp_path / "step_2" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    {
        "truncate": lambda: path.write_bytes(data[:-9]),
        "flip": lambda: path.write_bytes(data),
        "remove": path.unlink,
    }[harm]()
    assert checkpoint.newest(tmp_path).name == "step_1"
    assert "step_2" in capsys.readouterr().err and (tmp_path / "step_2").exists()


def test_write_failure_keeps_the_earlier_checkpoint_and_leaves_no_litter(tmp_path):
    """A real failing write (a file-size limit stands for a full disk) in a child, whose limit does not reach this process."""
    save_two(tmp_path)
    program = f"""
import resource, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from test_train import small_model, make_optimizer, checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = small_model()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.save({str(tmp_path)!r}, 3, model, make_optimizer(model), {{"updates": 3}}, None, keep=1)
except OSError as problem:
    print("OSError", problem)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.stdout.startswith("OSError"), done.stderr[-1500:]
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2"]
        and checkpoint.newest(tmp_path).name == "step_2"
    )


def test_restore_gives_back_weights_and_moments(tmp_path):
    model, optimizer = small_model(), None
    optimizer = make_optimizer(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    checkpoint.save(tmp_path, 7, model, optimizer, {"updates": 1, "wandb_id": None}, None, keep=1)
    again = small_model()
    other = make_optimizer(again)
    assert checkpoint.restore(tmp_path / "step_7", again, other)["step"] == 7
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q) and torch.equal(
            optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"]
        )


BAD_INPUT = [
    (["--lang", "klingon"], "klingon"),
    (["--task", "riddles", "--model", "tiny"], "riddles"),
    (["--recipe", "recipes/none.toml"], "no recipe"),
    (["--resume", "runs/none"], "not a run folder"),
    (["--name", "taken"], "exists: continue it with --resume"),
    (["--model", "empty"], "no config.json"),
    (["--model", "broken"], "damaged"),
    (["--model", "small", "--max_prompt_tokens", "3"], "no problem is left"),
    (["--task", "gsm8k", "--data", "data"], "line 2"),
    (["--reward", "correct:1"], "--reward"),
    (["--loss", "ppo"], "unknown loss"),
    (["--advantage", "gae"], "gae"),
    (["--tis", "2"], "choose sampler or trainer"),
    pytest.param(
        ["--exact", "true"],
        "--exact is for GPUs",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs"),
    ),
]


@needs_prolog
@pytest.mark.parametrize(
    "arguments,sentence",
    BAD_INPUT,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "train.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 2"}\n{"question": 3\n'
    )
    made = small_model()
    for name in ("broken", "small"):
        hugging_face.save_model(dict(made.named_parameters()), made.config, tmp_path / name)
        train_bpe(["a few words"], 300, tmp_path / name)
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    recipe = (
        []
        if {"--recipe", "--resume"} & set(arguments)
        else ["--recipe", str(ROOT / "recipes" / "tiny.toml")]
    )
    with pytest.raises((SystemExit, ValueError)) as raised:
        train.main([*recipe, *arguments])
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_missing_interpreter_is_one_sentence_with_the_install_command(tmp_path):
    environment = {**ENVIRONMENT, "PATH": str(tmp_path)}  # no interpreter there
    done = subprocess.run(
        command("--lang", "prolog"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "apt-get install swi-prolog-nox" in done.stderr
    )
    assert not (tmp_path / "runs").exists()


def test_unknown_flag_and_recipe_setting_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--temprature", "1"])
    assert "--temprature" in capsys.readouterr().err
    (tmp_path / "r.toml").write_text('lr = "fast"\n')
    with pytest.raises(SystemExit, match="lr must be float"):
        train.main(["--recipe", str(tmp_path / "r.toml")])


def small_sums(task, split, data=None, count=None, seed=0):
    """One-step sums of two small numbers; training and held-out pairs are disjoint. Small enough to be learned in seconds."""
    made = []
    for a in range(2, 30):
        for b in range(2, 30):
            if (split == "test") == ((a * 7 + b) % 5 == 0):
                step = Step("v1", f"{a}+{b}", Fraction(a + b))
                made.append(
                    Problem(f"small/{split}/{a}/{b}", "sums", f"{a} plus {b}?", step.value, [step])
                )
    random.Random(0).shuffle(made)
    return made[: count or len(made)]


@needs_prolog
def test_training_helps_on_held_out_problems_and_a_random_reward_does_not(tmp_path, monkeypatch):
    """DESIGN.md invariant 13, small: the warm start writes '=' or ':=' in 7 of 10 programs, and only running them shows which are wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load_problems", small_sums)
    settings = "--prompts 8 --samples 8 --max_new_tokens 80 --eval_problems 40 --eval_samples 2 --save_every 100 --wandb off".split()
    train.main(["--name", "real", "--warm_start", "100:0.7", "--steps", "10", *settings])
    warm = ["--recipe", str(ROOT / "recipes/tiny.toml"), "--model", "runs/real/warm_start"]
    train.main([*warm, "--name", "random", "--reward", "random", "--steps", "10", *settings])
    passed = lambda name, step: (
        sum(r["correct"] for r in rows(tmp_path / "runs" / name, f"eval/step_{step}.jsonl")) / 80
    )
    before, after, random_after = passed("real", 0), passed("real", 10), passed("random", 10)
    assert passed("random", 0) == before > 0.02
    assert after > before + 0.1 and random_after < before + 0.1


def test_wandb_goes_on_under_the_same_id_and_its_keys_do_not_grow(tmp_path, monkeypatch):
    """The real wandb, offline: what it would send is read back from its own files."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    row = {"id": "p", "correct": True, "text": "t"}
    log = RunLog(tmp_path, {"seed": 0}, wandb_mode="offline")
    for step in (1, 2):
        log.step(step, {"reward": step / 4}, {"time/step": 1.0})
        log.evaluation(step, [row])
    first = log.wandb_id
    log.close()
    log = RunLog(tmp_path, {"seed": 0}, resume_step=2, wandb_mode="offline", wandb_id=first)
    log.step(3, {"reward": 0.75}, {"time/step": 1.0})
    keys = set(log.wandb.summary.keys())
    log.close()
    assert log.wandb_id == first and {
        p.name.split("-")[-1] for p in (tmp_path / "wandb").glob("offline-run-*")
    } == {first}
    assert not any(ch.isdigit() for key in keys for ch in key) and [
        r["step"] for r in rows(tmp_path)
    ] == [1, 2, 3]
    tables = {p.name for p in (tmp_path / "wandb").rglob("*.table.json")}
    assert tables and all(
        len(json.loads(next((tmp_path / "wandb").rglob(name)).read_text())["data"]) == 1
        for name in tables
    )
