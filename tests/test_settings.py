"""Settings, recipes and files that cannot work get one sentence before the first step."""

import dataclasses
import json
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from grpo import LOSSES
from runs import ENVIRONMENT, ROOT, command, needs_prolog
from runtime import hugging_face
from runtime.tokenizer import train_bpe
from settings import Settings, loss_in_words, parse_settings
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
    ("--advantage trr++", "self-play has trr++, and nothing else has it"),
    ("--loss cispo --clip_high 0.28", "--clip_high 0.28 is not used by --loss cispo"),
    ("--loss gspo --cispo_cap 5", "--cispo_cap 5.0 is not used by --loss gspo"),
    ("--loss cispo --cispo_cap nan", "finite"),
    ("--reward correct=nan", "--reward correct=nan: write names with numbers"),
    ("--tis 2", "it needs --old_logprobs trainer"),
    ("--rate_low 0.5 --rate_high 0.2", "no problem would be asked again"),
    ("--advantage distill", "--teacher DIR and --advantage distill go together"),
    ("--teacher small", "--teacher DIR and --advantage distill go together"),
    ("--gold 0.1 --old_logprobs trainer --reward random", "there is no control"),
    ("--gold 0.1", "needs --old_logprobs trainer"),
    ("--tis_mask true", "give that too"),
    ("--advantage pass@k --samples 2", "no more than the group's --samples, which are 2"),
    ("--advantage pass@k --reward correct=2", "for rewards of 0 and 1"),
    ("--advantage pass@k --overlong_buffer 8", "for rewards of 0 and 1"),
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


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_flags_go_on_top(recipe):
    settings, _, origin = parse_settings(["--recipe", str(recipe), "--steps", "7"], "")
    assert settings.steps == 7
    assert f"recipes/{recipe.name}" in origin.sentence


BY_NAME = {  # loss -> advantage, lower and upper clip, cap: the papers' own
    "grpo": ("grpo", 0.2, 0.2, None),
    "dr_grpo": ("mean", 0.2, 0.2, None),
    "dapo": ("grpo", 0.2, 0.28, None),
    "gspo": ("grpo", 3e-4, 4e-4, None),
    "cispo": ("grpo", None, None, 5.0),
}


def of_the_loss(settings):
    return settings.advantage, settings.clip_low, settings.clip_high, settings.cispo_cap


def read(*arguments):
    return parse_settings(list(arguments), "")[0]


def test_every_loss_has_its_papers_values_by_name():
    assert set(BY_NAME) == set(LOSSES)
    for loss, expected in BY_NAME.items():
        assert of_the_loss(Settings(loss=loss)) == expected
        assert of_the_loss(read("--task", "sums", "--loss", loss)) == expected


def test_a_loss_named_beside_a_recipe_of_another_loss_brings_its_own_values():
    """oorl.toml has dapo with clip 0.2 and 0.2 and another advantage, meant for its loss."""
    recipe = ("--recipe", str(ROOT / "recipes/oorl.toml"))
    baseline = ("reinforce++_baseline", 0.2, 0.2, None)
    assert of_the_loss(read(*recipe)) == baseline
    assert of_the_loss(read(*recipe, "--loss", "dapo")) == baseline
    assert of_the_loss(read(*recipe, "--loss", "gspo")) == BY_NAME["gspo"]
    more = ("--loss", "gspo", "--clip_high", "0.01", "--advantage", "rloo")
    assert of_the_loss(read(*recipe, *more)) == ("rloo", 3e-4, 0.01, None)


def test_self_play_keeps_its_advantage_whatever_the_loss():
    settings = read("--recipe", str(ROOT / "recipes/azr_racket.toml"), "--loss", "gspo")
    assert of_the_loss(settings) == ("trr++", 3e-4, 4e-4, None)


def test_a_resumed_run_keeps_what_it_had_and_another_loss_brings_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Settings(loss="gspo"))))
    assert of_the_loss(read("--resume", str(tmp_path))) == BY_NAME["gspo"]
    assert of_the_loss(read("--resume", str(tmp_path), "--loss", "cispo")) == BY_NAME["cispo"]


def test_the_start_says_what_is_not_the_method_that_the_loss_is_named_after():
    said = loss_in_words(Settings(loss="dr_grpo"))
    assert said == (
        "loss dr_grpo: advantage mean, clip_low 0.2, clip_high 0.2, as Dr. GRPO (arXiv 2503.20783)"
    )
    said = loss_in_words(Settings(loss="dr_grpo", advantage="grpo", clip_high=0.28))
    assert "this is not Dr. GRPO" in said
    assert said.endswith("which has advantage mean, clip_high 0.2")


def write_recipes(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)


def test_a_recipe_may_change_another_one(tmp_path):
    below = 'steps = 5\nloss = "gspo"\nclip_high = 0.1\n[reward]\ncorrect = 2\nwrong = -1\n'
    write_recipes(tmp_path, below=below, same='base = "below.toml"\nlr = 0.5\n')
    settings = read("--recipe", str(tmp_path / "same.toml"), "--steps", "7")
    assert (settings.steps, settings.lr, settings.clip_high) == (7, 0.5, 0.1)
    assert settings.reward == "correct=2,wrong=-1"

    write_recipes(tmp_path, other='base = "below.toml"\nloss = "dapo"\n')
    assert of_the_loss(read("--recipe", str(tmp_path / "other.toml"))) == BY_NAME["dapo"]


@pytest.mark.parametrize(
    "text,sentence",
    [
        ('base = "none.toml"', "no recipe"),
        ("base = 3", "no recipe"),
        ('base = "wrong.toml"', "has a base of its own"),
        ("[lang]\nlua = 1", "lang must be str"),
        ('[reward]\ncorrect = "much"', "write names with numbers"),
        ("[reward]\n", "write names with numbers"),
    ],
)
@needs_prolog
def test_a_recipe_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path, wrong=text)
    with pytest.raises((SystemExit, ValueError), match=sentence):
        train.main(["--task", "sums", "--model", "tiny", "--recipe", "wrong.toml"])


def test_every_setting_stands_in_a_section_of_the_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    before_sections, _, sections = text.partition("what is trained on what:")
    for setting in dataclasses.fields(Settings):
        assert f"--{setting.name} " in sections.replace("\n", " ")


def test_every_recipe_that_a_page_names_is_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RECIPES]
    for page in pages:
        for name in re.findall(r"recipes/(\w+\.toml)", page.read_text("utf-8")):
            assert (ROOT / "recipes" / name).is_file(), f"{page.name} names recipes/{name}"
