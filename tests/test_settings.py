"""Settings, recipes and files that cannot work get one sentence before the first step."""

import dataclasses
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from runs import ENVIRONMENT, ROOT, command, needs_prolog
from runtime import hugging_face
from runtime.tokenizer import train_bpe
from settings import Settings, parse_settings, read_recipe
from test_checkpoint import small_model

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
BAD_INPUT = [
    ("--lang klingon", "klingon"),
    ("--task riddles --model tiny", "riddles"),
    ("--recipe recipes/none.toml", "no recipe"),
    ("--resume runs/none", "not a run folder"),
    ("--resume runs/older", "no longer exist (mask_truncated)"),
    ("--name taken", "exists: continue it with --resume"),
    ("--name ../x", "a run stays under runs/"),
    ("--name /tmp/x", "a run stays under runs/"),
    ("--name x/../../y", "a run stays under runs/"),
    ("--name .", "a run stays under runs/"),
    ("--model empty", "no config.json"),
    ("--model broken", "damaged"),
    ("--model quantised", "weights are quantised (quantization_config: fp8)"),
    ("--model diverged", "norm.weight holds NaN or infinity in 32 of 32 values"),
    ("--model other", "embedding has 200 rows"),
    ("--model small --max_prompt_tokens 3", "no problem is left"),
    ("--task gsm8k --data data", "line 2"),
    ("--reward correct:1", "--reward"),
    ("--loss ppo", "unknown loss"),
    ("--advantage gae", "unknown advantage"),
    ("--tis 2", "it needs --old_logprobs trainer"),
    ("--old_logprobs model", "unknown old_logprobs"),
    ("--temperature 0", "greedy samples"),
    ("--samples 1", "a group of one"),
    ("--lr nan", "finite"),
    ("--save_every 0", "at least 1"),
    ("--clip_low 2", "at most 1"),
    ("--schedule cosin", "unknown schedule"),
    ("--max_new_tokens 40000 --model small", "do not fit the model"),
    ("--warm_start many", "as 800:0.7"),
    pytest.param(
        "--exact true",
        "--exact is for GPUs",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs"),
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with runs, models and data that have something wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken").mkdir(parents=True)
    (tmp_path / "runs/older").mkdir()
    older = {**dataclasses.asdict(Settings()), "mask_truncated": False}
    (tmp_path / "runs/older/config.json").write_text(json.dumps(older))

    (tmp_path / "empty").mkdir()
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    good, cut = '{"question": "1+1?", "answer": "#### 2"}', '{"question": 3'
    (tmp_path / "data/gsm8k/train.jsonl").write_text(f"{good}\n{cut}\n")

    made = small_model()
    for name in ("broken", "small", "quantised", "diverged", "other"):
        hugging_face.save_model(dict(made.named_parameters()), made.config, tmp_path / name)
        train_bpe(["a few words"], 300, tmp_path / name)
    said = json.loads((tmp_path / "small/config.json").read_text())
    quantised = said | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "quantised/config.json").write_text(json.dumps(quantised))
    (tmp_path / "other/config.json").write_text(json.dumps(said | {"vocab_size": 200}))
    tensors = load_file(tmp_path / "diverged/model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "diverged/model.safetensors")
    weights = tmp_path / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return tmp_path


@needs_prolog
@pytest.mark.parametrize("arguments,sentence", BAD_INPUT)
def test_bad_input_gets_one_sentence(folder, arguments, sentence):
    if "--recipe" not in arguments and "--resume" not in arguments:
        arguments = f"--recipe {ROOT}/recipes/tiny.toml {arguments}"
    with pytest.raises((SystemExit, ValueError)) as raised:
        train.main(arguments.split())
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_interpreter_is_one_sentence_with_the_install_command(tmp_path):
    done = subprocess.run(
        command("--lang", "prolog"),
        cwd=tmp_path,
        env={**ENVIRONMENT, "PATH": str(tmp_path)},  # no interpreter there
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt-get install swi-prolog-nox" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_unknown_flag_and_recipe_setting_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--temprature", "1"])
    assert "--temprature" in capsys.readouterr().err
    (tmp_path / "r.toml").write_text('lr = "fast"\n')
    with pytest.raises(SystemExit, match="lr must be float"):
        train.main(["--recipe", str(tmp_path / "r.toml")])


def test_a_recipe_goes_on_top_of_its_base(tmp_path):
    (tmp_path / "whole.toml").write_text("prompts = 5\nsamples = 6\n")
    (tmp_path / "arm.toml").write_text('base = "whole.toml"\nsamples = 7\n')
    assert read_recipe(tmp_path / "arm.toml") == {"prompts": 5, "samples": 7}
    (tmp_path / "whole.toml").write_text('base = "arm.toml"\n')
    with pytest.raises(SystemExit, match="leads back to it"):
        read_recipe(tmp_path / "arm.toml")
    (tmp_path / "arm.toml").write_text('base = "gone.toml"\n')
    with pytest.raises(SystemExit, match="no recipe .*gone.toml"):
        read_recipe(tmp_path / "arm.toml")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_flags_go_on_top(recipe):
    settings, _, why = parse_settings(["--recipe", str(recipe), "--steps", "7"], "")
    assert settings.steps == 7
    assert f"recipes/{recipe.name}" in why


def test_every_setting_stands_in_a_section_of_the_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    before_sections, _, sections = text.partition("what is trained on what:")
    for setting in dataclasses.fields(Settings):
        assert f"--{setting.name} " in sections.replace("\n", " ")
