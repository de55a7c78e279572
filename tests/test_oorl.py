"""OORL end to end: translation and GEPO in one run of train.py with a tiny model of random weights, on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from model import Config, random_model
from runtime.hugging_face import save_model
from runtime.tokenizer import train_bpe
from settings import parse_settings, read_recipe

REPO = Path(__file__).resolve().parent.parent
PROGRAM = "def f(a):\n    return a + 1\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, translation problems of a user, and GEPO groups: everything a run needs, made here."""
    folder = tmp_path_factory.mktemp("oorl")
    texts = [
        PROGRAM,
        "```lua\nfunction f(a)\n  return a + 1\nend\n```",
        "Translate this Python code to Lua. define i32 @f(i32 %0) { ret i32 %0 }",
    ] * 20
    tokenizer = train_bpe(texts, 320, folder / "model")
    config = Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        model_type="qwen3",
    )
    model = random_model(config)
    save_model(model.state_dict(), config, folder / "model", dtype=torch.float32)
    tests = [{"args": [n], "expected": n + 1} for n in range(3)]
    rows = [
        {
            "id": f"p{i}",
            "source": PROGRAM,
            "source_language": "python",
            "entry": "f",
            "tests": tests,
        }
        for i in range(40)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    groups = [
        {"id": f"g{i}", "c": f"int f(int x) {{ return x + {i}; }}", "entry": "f", "cheap": [],
         "winners": [{"level": level, "ir": f"define i32 @f(i32 %0) {{\n  %2 = add i32 %0, {i}{pad}\n  ret i32 %2\n}}\n"} for level, pad in (("Oz", ""), ("O3", " "))],
         "losers": [{"kind": "constant", "ir": f"define i32 @f(i32 %0) {{\n  %2 = add i32 %0, {i + n}\n  ret i32 %2\n}}\n"} for n in (1, 2, 3)]}
        for i in range(40)
    ]  # fmt: skip
    (folder / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    return folder


def arguments(files, *more):
    words = f"""--recipe {REPO}/recipes/oorl.toml --model {files}/model --lang lua,perl --translate_data {files}/problems.jsonl --gepo_data {files}/groups.jsonl
        --steps 3 --prompts 2 --samples 2 --max_new_tokens 24 --max_prompt_tokens 600 --gepo_batch 4 --gepo 0.01 --lr 1e-3 --warmup 0 --eval_every 0
        --eval_problems 4 --save_every 2 --wandb off --reward random"""
    return [*words.split(), *more]


def rows(run):
    return [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]


def test_oorl_runs_end_to_end_and_resumes(files, tmp_path, monkeypatch):
    """The recipe with a tiny Qwen3: translation with REINFORCE++ and KL in the reward, GEPO beside it, the ranking before and after; a resumed run reads
    the reference it had."""
    monkeypatch.chdir(tmp_path)
    train.main(arguments(files, "--name", "whole"))
    before, *steps = rows("whole")
    assert (
        before["step"] == 0
        and before["eval/gepo/rank_accuracy"] == 0.5
        and before["eval/gepo/winner_std"] == 0.0
    )
    assert [r["step"] for r in steps] == [1, 2, 3]
    for r in steps:
        assert (
            r["gepo/loss"] > 0
            and r["gepo/packed"] == 1.0
            and r["grad_norm"] > 0
            and r["rewards/format/mean"] == 0.0
        )
    assert steps[-1]["eval/gepo/rank_accuracy"] != 0.5 and "eval/pass@1" in steps[-1]
    reference = Path("runs/whole/gepo_reference.json").read_bytes()
    metrics = Path("runs/whole/metrics.jsonl").read_bytes()
    for path in Path("runs/whole/checkpoints").glob(
        "step_3*"
    ):  # as if it had been killed after step 2
        path.rename(tmp_path / path.name)
    train.main(["--resume", "runs/whole"])
    assert (
        Path("runs/whole/metrics.jsonl").read_bytes() == metrics
        and Path("runs/whole/gepo_reference.json").read_bytes() == reference
    )


def test_gepo_takes_part_even_when_rl_has_no_signal(files, tmp_path, monkeypatch):
    """The real reward: a random model earns nothing, so the only gradient is GEPO's; without GEPO the weights stay."""
    monkeypatch.chdir(tmp_path)
    real = ["--reward", "correct=1", "--kl_coef", "0", "--steps", "1"]
    train.main(arguments(files, *real, "--name", "both"))
    train.main(arguments(files, *real, "--gepo", "0", "--name", "rl"))
    assert rows("both")[1]["grad_norm"] > 0 and rows("both")[1]["loss"] == 0.0
    assert rows("rl")[0]["grad_norm"] == 0.0 and not any("gepo" in key for key in rows("rl")[0])


def test_two_ranks_take_the_steps_of_one(files, tmp_path):
    """GEPO's groups are spread over the ranks; packed and serialised, the losses and norms are those of one process."""
    found = []
    for ranks, budget in ((1, "16384"), (2, "16384"), (2, "300")):
        torchrun = (
            ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
            if ranks > 1
            else []
        )
        command = [sys.executable, *torchrun, str(REPO / "train.py")]
        done = subprocess.run(
            [
                *command,
                *arguments(
                    files,
                    "--name",
                    f"r{ranks}-{budget}",
                    "--token_budget",
                    budget,
                    "--steps",
                    "2",
                    "--gepo_batch",
                    "3",
                ),
            ],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(
            [
                json.loads(line)
                for line in (tmp_path / f"runs/r{ranks}-{budget}/metrics.jsonl")
                .read_text()
                .splitlines()
            ]
        )
    assert [r[1]["gepo/packed"] for r in found] == [1.0, 1.0, 0.0]
    for other in found[1:]:
        for a, b in zip(found[0], other):
            for key in (
                "loss",
                "grad_norm",
                "gepo/loss",
                "gepo/margin",
                "eval/gepo/rank_accuracy",
                "eval/gepo/winner_std",
            ):
                if key in a:
                    assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key


def test_bad_settings_have_one_sentence(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": 1, "source": "x", "source_language": "python", "tests": []}\n')
    for more, words in [
        (["--gepo_data", str(tmp_path / "none.jsonl")], "gepo.py build"),
        (["--gepo_winners", "3"], "leaves 0 groups"),
        (["--translate_data", str(bad)], "line 1 is malformed .* at least one"),
        (["--lang", "lua,cobol"], "unknown language 'cobol'"),
        (["--lang", "python"], "no problem of .* can be translated to python"),
        (["--reward", "correct=2"], "translate has one reward"),
        (["--model", "tiny"], "pretrained --model"),
        (["--task", "gsm8k"], "only --task translate"),
        (["--advantage", "reinforce"], "advantage"),
    ]:
        with pytest.raises((SystemExit, ValueError), match=words):
            train.main(arguments(files, "--name", "bad", *more))


def test_the_recipe_has_the_papers_values():
    recipe = read_recipe(REPO / "recipes/oorl.toml")
    paper = {
        "lr": 5e-7,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "prompts": 8,
        "gepo": 0.01,
        "gepo_lam": 1.0,
        "gepo_max_tokens": 8192,
        "model": "Qwen/Qwen3-8B",
    }
    assert parse_settings(["--task", "translate"], "")[0].gepo == 0.01  # the task's own recipe
    assert (
        {k: recipe[k] for k in paper} == paper
        and recipe["steps"] * recipe["prompts"] == 2400
        and recipe["warmup"] == 0.03 * recipe["steps"]
    )
