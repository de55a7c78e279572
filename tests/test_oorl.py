"""OORL end to end: translation and GEPO in one run of train.py, a tiny random model on a CPU."""

import json
from pathlib import Path

import pytest
import torch

import train
from model import Config, random_model
from runs import ROOT, rows, whole_run
from runtime.hugging_face import save_model
from runtime.tokenizer import train_bpe
from settings import parse_settings, read_recipe

PROGRAM = "def f(a):\n    return a + 1\n"
LUA = "```lua\nfunction f(a)\n  return a + 1\nend\n```"


def json_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def group(number):
    """f(x) = x + number: two winners that differ in a space, three losers that add something else."""

    def ir(added, pad=""):
        return f"define i32 @f(i32 %0) {{\n  %2 = add i32 %0, {added}{pad}\n  ret i32 %2\n}}\n"

    return {
        "id": f"g{number}",
        "family": f"file{number}.c",
        "language": "c",
        "source": f"int f(int x) {{ return x + {number}; }}",
        "entry": "f",
        "winners": [{"level": "Oz", "ir": ir(number)}, {"level": "O3", "ir": ir(number, " ")}],
        "losers": [{"kind": "constant", "ir": ir(number + n)} for n in (1, 2, 3)],
        "cheap": [],
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model folder, translation problems of a user, and GEPO groups: all that a run needs."""
    folder = tmp_path_factory.mktemp("oorl")
    request = "Translate this Python code to Lua. define i32 @f(i32 %0) { ret i32 %0 }"
    tokenizer = train_bpe([PROGRAM, LUA, request] * 20, 320, folder / "model")
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
    weights = random_model(config).state_dict()
    save_model(weights, config, folder / "model", dtype=torch.float32)

    tests = [{"args": [n], "expected": n + 1} for n in range(3)]
    problem = {"source": PROGRAM, "source_language": "python", "entry": "f", "tests": tests}
    json_lines(folder / "problems.jsonl", [{"id": f"p{n}", **problem} for n in range(40)])
    json_lines(folder / "groups.jsonl", [group(n) for n in range(40)])
    return folder


def arguments(files, *more):
    words = f"""--recipe {ROOT}/recipes/oorl.toml --model {files}/model --lang lua,perl
        --translate_data {files}/problems.jsonl --gepo_data {files}/groups.jsonl --gepo_batch 4
        --steps 3 --prompts 2 --samples 2 --max_new_tokens 24 --max_prompt_tokens 600 --gepo 0.01
        --lr 1e-3 --warmup 0 --eval_every 0 --eval_problems 4 --save_every 2 --wandb off
        --reward random"""
    return [*words.split(), *more]


def test_oorl_runs_end_to_end_and_resumes(files, tmp_path, monkeypatch, capsys):
    """Translation with REINFORCE++ and the KL in the reward, GEPO beside it.

    The ranking is taken before and after; a resumed run reads the reference that it had.
    """
    monkeypatch.chdir(tmp_path)
    whole = Path("runs/whole")
    train.main(arguments(files, "--name", "whole"))
    assert "loss dapo: advantage reinforce++_baseline" in capsys.readouterr().out
    before, *steps = rows(whole)
    assert before["step"] == 0
    assert before["eval/gepo/rank_accuracy"] == 0.5
    assert before["eval/gepo/winner_std"] == 0.0
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["gepo/loss"] > 0
        assert row["gepo/packed"] == 1.0
        assert row["grad_norm"] > 0
        # Both parts' norms: the sum's is at most their sum.
        assert row["gepo/rl_grad_norm"] > 0 and row["gepo/grad_norm"] > 0
        assert row["grad_norm"] <= row["gepo/rl_grad_norm"] + row["gepo/grad_norm"] + 1e-6
        assert row["gepo/rank_accuracy/constant"] == row["gepo/rank_accuracy"]  # the only kind
        assert row["rewards/format/mean"] == 0.0
    assert steps[-1]["eval/gepo/rank_accuracy"] != 0.5
    assert "eval/pass@1" in steps[-1]
    for phase in ("pass_rate", "eval/pass@1"):  # each target's own
        assert any(f"{phase}/{target}" in steps[-1] for target in ("lua", "perl"))

    reference = (whole / "gepo_reference.json").read_bytes()
    metrics = (whole / "metrics.jsonl").read_bytes()
    (whole / "checkpoints/step_3").rename(tmp_path / "step_3")  # as if it had died after step 2
    train.main(["--resume", str(whole)])
    assert (whole / "metrics.jsonl").read_bytes() == metrics
    assert (whole / "gepo_reference.json").read_bytes() == reference


def test_gepo_takes_no_step_of_its_own_unless_told_to(files, tmp_path, monkeypatch):
    """A random model earns nothing: the only gradient would be GEPO's.

    AdamW would make it a whole step. --gepo_alone takes it, as the paper's sum says.
    """
    monkeypatch.chdir(tmp_path)
    real = ["--reward", "correct=1", "--kl_coef", "0", "--steps", "1"]
    train.main(arguments(files, *real, "--name", "waits"))
    train.main(arguments(files, *real, "--name", "alone", "--gepo_alone", "true"))
    train.main(arguments(files, *real, "--name", "rl", "--gepo", "0"))
    _, waits = rows(Path("runs/waits"))
    _, alone = rows(Path("runs/alone"))
    (rl,) = rows(Path("runs/rl"))

    assert waits["grad_norm"] == 0.0
    assert waits["gepo/taken"] == 0.0
    assert waits["eval/gepo/rank_accuracy"] == 0.5  # the weights are those of the reference
    assert alone["loss"] == 0.0
    assert alone["gepo/taken"] == 1.0
    assert alone["gepo/rl_grad_norm"] == 0.0
    assert alone["grad_norm"] == pytest.approx(alone["gepo/grad_norm"]) and alone["grad_norm"] > 0
    assert rl["grad_norm"] == 0.0
    assert not any("gepo" in name for name in rl)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(files, tmp_path):
    """GEPO's groups are spread over the ranks; packed or one by one, numbers are one process's."""
    found = []
    for ranks, budget in ((1, "16384"), (2, "16384"), (2, "300")):
        more = ["--token_budget", budget, "--steps", "2", "--gepo_batch", "3"]
        name = f"r{ranks}-{budget}"
        found.append(rows(whole_run(tmp_path, *arguments(files, *more), name=name, ranks=ranks)))
    assert [metrics[1]["gepo/packed"] for metrics in found] == [1.0, 1.0, 0.0]

    compared = ("loss", "grad_norm", "gepo/loss", "gepo/margin")
    compared += ("eval/gepo/rank_accuracy", "eval/gepo/winner_std")
    for other in found[1:]:
        for one, two in zip(found[0], other):
            for name in set(compared) & set(one):
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    "more,sentence",
    [
        ("--gepo_data none.jsonl", "gepo.py build"),
        ("--gepo_winners 3", "leaves 0 groups .*gepo.py build's --winners and --losers"),
        ("--gepo_kinds swap,spelling", "'spelling' is no kind of edit; choose of run, cheap, con"),
        ("--translate_data bad.jsonl", "line 1 is malformed .* at least one"),
        ("--lang lua,cobol", "unknown language 'cobol'"),
        ("--lang python", "no problem of .* can be translated to python"),
        ("--reward correct=2", "translate has one reward"),
        ("--model tiny", "pretrained --model"),
        ("--task gsm8k", "only --task translate"),
        ("--advantage reinforce", "advantage"),
    ],
)
def test_bad_settings_have_one_sentence(files, tmp_path, monkeypatch, more, sentence):
    monkeypatch.chdir(tmp_path)
    no_tests = {"id": 1, "source": "x", "source_language": "python", "tests": []}
    json_lines(tmp_path / "bad.jsonl", [no_tests])
    with pytest.raises((SystemExit, ValueError), match=sentence):
        train.main(arguments(files, "--name", "bad", *more.split()))


def test_the_recipe_has_the_papers_values():
    recipe = read_recipe(ROOT / "recipes/oorl.toml")
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
    assert {name: recipe[name] for name in paper} == paper
    assert recipe["steps"] * recipe["prompts"] == 2400
    assert recipe["warmup"] == 0.03 * recipe["steps"]
    settings, _, _ = parse_settings(["--task", "translate"], "")
    assert settings.gepo == 0.01  # the task's own recipe


def test_the_ablations_differ_from_the_recipe_in_nothing_else():
    """The paper's Table 3: RL, RL and DPO, RL and GEPO."""
    whole = read_recipe(ROOT / "recipes/oorl.toml")
    changed = {}
    for arm in ("oorl_rl", "oorl_dpo"):
        values = read_recipe(ROOT / f"recipes/{arm}.toml")
        assert values.keys() == whole.keys()
        changed[arm] = {name: values[name] for name in values if values[name] != whole[name]}
    assert changed["oorl_rl"] == {"gepo": 0.0}
    assert changed["oorl_dpo"] == {"gepo_winners": 1, "gepo_losers": 1, "gepo_lam": 0.0}
