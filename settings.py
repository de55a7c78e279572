"""Settings of a run: one dataclass, one sentence per field. Flags, --help and recipes (TOML) come from it."""

import argparse
import json
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

RECIPES = Path(__file__).parent / "recipes"


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Every setting of a run. Flags, --help and recipes (TOML) come from here."""

    task: str = setting(
        "gsm8k",
        "problems to train on: sums (built in), gsm8k, translate or selfplay (none: the model makes its own)",
    )
    lang: str = setting(
        "prolog",
        "language to write, any name in sandbox/languages/; translate draws one of several, as lua,racket,java, for each problem",
    )
    model: str = setting(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "checkpoint folder or hub id; 'tiny' builds and warm-starts a 1M-parameter model",
    )
    data: str = setting(
        "", "folder with data sets (default: RARECODE_DATA, then ../shared/data, else download)"
    )
    problems: int = setting(0, "train on only so many problems of the task; 0 = all")
    name: str = setting(
        "", "name of the run: everything goes to runs/NAME (default: task, language and time)"
    )
    seed: int = setting(0, "decides data order and every sampled token")
    steps: int = setting(1500, "rollout-and-update steps")
    prompts: int = setting(
        32,
        "prompts per step, over all ranks (selfplay: for each task and role, 6 times as many samples)",
    )
    samples: int = setting(8, "completions per prompt (the group)")
    examples: int = setting(1, "worked examples in the prompt: 0, 1 or 5")
    short_prompt: bool = setting(
        False, "leave the long instructions out (for models trained on this format)"
    )
    max_prompt_tokens: int = setting(
        1024, "problems with a longer prompt are dropped, and counted at the start"
    )
    max_new_tokens: int = setting(512, "longest completion")
    temperature: float = setting(1.0, "of rollouts; the trainer's log-probs use it too")
    reward: str = setting(
        "correct=1",
        "components of rewards.py with weights, as correct=2,wrong=-1; 'random' is the control that must not learn",
    )
    syntax_mix: bool = setting(
        False,
        "reward = s * syntax + (1 - s) * reward, s = share of the step's programs with syntax errors (SLMFix); needs syntax=0 in --reward",
    )
    format_gate: bool = setting(
        True,
        "no reward without the right format (published sets add a format reward instead: false)",
    )
    loss: str = setting("dapo", "grpo, dr_grpo, dapo, gspo or cispo (grpo.py)")
    advantage: str = setting(
        "grpo",
        "grpo, mean, rloo, batch, reinforce++ or reinforce++_baseline (grpo.py); selfplay: always trr++",
    )
    clip_low: float = setting(0.2, "lower clip of the ratio")
    clip_high: float = setting(0.28, "upper clip of the ratio (DAPO's clip-higher)")
    old_logprobs: str = setting(
        "sampler",
        "log-probs that the ratio starts from: sampler (free) or trainer (one more forward pass)",
    )
    tis: float = setting(
        0.0,
        "truncated importance weight: a token's loss times min(trainer / sampler probability, this); needs old_logprobs trainer; 0 = off",
    )
    minibatches: int = setting(1, "optimizer steps per pass over a rollout")
    epochs: int = setting(1, "passes over a rollout")
    kl_coef: float = setting(
        0.0, "weight of the KL to the starting model, with the right gradient (grpo.reference_kl)"
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus")
    dynamic_sampling: int = setting(
        0,
        "most rounds of new prompts in place of groups whose rewards are all equal (DAPO); 0 = off",
    )
    overlong_buffer: int = setting(
        0,
        "soft penalty on the last so many tokens before max_new_tokens, down to -1 (DAPO); 0 = off",
    )
    mask_truncated: bool = setting(
        False, "leave completions that hit max_new_tokens out of the loss"
    )
    translate_data: str = setting(
        "", "translate: JSON lines of your own problems (README) instead of the built-in sets"
    )
    gepo: float = setting(
        0.0,
        "weight of the GEPO loss on LLVM-IR groups beside the RL loss, whose weight is 1 (gepo.py); 0 = off",
    )
    gepo_data: str = setting(".data/gepo/groups.jsonl", "groups that python gepo.py build made")
    gepo_batch: int = setting(8, "groups per step, over all ranks")
    gepo_winners: int = setting(2, "n, equivalent IRs of a group")
    gepo_losers: int = setting(
        2, "m, inequivalent IRs of a group; n = m = 1 with --gepo_lam 0 is DPO"
    )
    gepo_beta: float = setting(0.1, "factor of the log-ratio to the starting policy")
    gepo_lam: float = setting(1.0, "weight of the variance of the winners' rewards")
    gepo_length_norm: bool = setting(False, "mean log-prob per token instead of the sum")
    gepo_unbiased: bool = setting(False, "sample variance instead of population variance")
    gepo_cheap: bool = setting(
        False, "also draw the paper's kind of losers: edits that nobody has run, many no valid IR"
    )
    gepo_max_tokens: int = setting(
        2048, "groups with a longer member (prompt and IR) are left out, and counted"
    )
    gepo_eval: int = setting(64, "held-out groups of an evaluation")
    lr: float = setting(1e-6, "peak learning rate")
    lora_rank: int = setting(
        0,
        "train adapters of this rank beside every linear layer instead of the weights (the first paper: 32); 0 = all weights",
    )
    lora_alpha: float = setting(
        0.0, "adapters are scaled by alpha / rank; 0 = alpha is the rank (the first paper's)"
    )
    schedule: str = setting("constant", "after the warm-up: constant, linear or cosine")
    warmup: int = setting(10, "steps of linear learning-rate warm-up")
    weight_decay: float = setting(0.0, "AdamW weight decay of matrices")
    beta2: float = setting(0.99, "AdamW's second-moment decay")
    max_norm: float = setting(1.0, "clip the global gradient norm here; 0 = no clipping")
    token_budget: int = setting(16384, "most tokens in one micro-batch of one rank")
    share_prompts: bool = setting(
        True, "compute a prompt once for all completions of its group in the update"
    )
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    sampler_gb: float = setting(
        0.0,
        "most GB of keys and values on one rank, held while training runs too; 0 = half of what is free at the start",
    )
    exact: bool = setting(
        False,
        "on a GPU: sampler and trainer do the same arithmetic, log-probs equal to the last bit (exact.py); slower",
    )
    slots: int = setting(256, "sequences sampled at the same time on one rank")
    eval_every: int = setting(
        100, "steps between evaluations on held-out problems; 0 = only before and after"
    )
    eval_problems: int = setting(200, "held-out problems of an evaluation")
    eval_samples: int = setting(1, "completions per held-out problem")
    eval_temperature: float = setting(0.0, "of evaluation; 0 = greedy")
    save_every: int = setting(100, "steps between checkpoints (the last step is always saved)")
    keep: int = setting(2, "newest checkpoints to keep, beside the best of the evaluated ones")
    reward_deadline: float = setting(
        300.0, "seconds for all programs of a step; what is not judged by then is masked"
    )
    sandbox: str = setting(
        "kernel",
        "weakest isolation level to accept: kernel or namespaces; portable is not a sandbox",
    )
    wandb: str = setting("auto", "auto (online with a key, else offline), online, offline or off")
    logged_samples: int = setting(8, "rollouts per step written to samples.jsonl")
    propose_reward: str = setting(
        "switch",
        "selfplay: eq3, eq4, switch (eq3, then eq4) or blend (from one to the other by the solver's accuracy)",
    )
    propose_switch: int = setting(64, "selfplay: last step of eq3 with --propose_reward switch")
    learn_samples: int = setting(
        8,
        "selfplay: answers that tell how learnable a proposal is, sampled at the training temperature",
    )
    references: int = setting(6, "selfplay: earlier programs that a proposer sees")
    composite: float = setting(
        0.0, "selfplay: share of proposals that must build on one or two earlier programs"
    )
    buffer_size: int = setting(
        16384, "selfplay: most entries of each of the three buffers; the oldest go first"
    )
    seed_problems: int = setting(
        256, "selfplay: entries of each buffer before the first step, proposed by the model itself"
    )
    seeds: str = setting(
        "",
        "selfplay: files to take seeds from instead, with commas: JSON lines with snippet, input(s), or a checkpoint's selfplay.json",
    )
    eval_bench: str = setting(
        "triples",
        "selfplay: what is evaluated in the loop: triples (built-in input/output prediction), humaneval or mbpp",
    )
    warm_start_steps: int = setting(
        0,
        "supervised steps (of 16 problems) of the built-in tiny model before reinforcement learning",
    )
    warm_start_mistakes: float = setting(
        0.0, "share of those demonstrations with a typical mistake of the language (sft.py)"
    )


def add_flags(parser, cls):
    """One flag per field of a settings dataclass; a flag that is not given leaves no trace, so that a recipe can show through."""
    for f in fields(cls):
        kind = parse_bool if f.type is bool else f.type
        parser.add_argument(
            f"--{f.name}",
            type=kind,
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} [{f.default}]",
            metavar="",
        )


def parse_bool(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_settings(arguments, description):
    """Flags over recipe over defaults -> (Settings, folder of the run to resume or None, where the settings come from)."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        metavar="",
        help="TOML file with settings [recipes/gsm8k.toml with a GPU, recipes/tiny.toml without]",
    )
    parser.add_argument(
        "--resume",
        metavar="",
        help="folder of the run to go on with, from its newest whole checkpoint",
    )
    add_flags(parser, Settings)
    given = vars(parser.parse_args(arguments))
    recipe, resume = given.pop("recipe"), given.pop("resume")
    if resume:
        return (
            Settings(**{**read_config(Path(resume)), **given}),
            Path(resume),
            f"{resume} (resumed)",
        )
    recipe, why = (Path(recipe), "the recipe you named") if recipe else default_recipe(given)
    return (
        Settings(**{**read_recipe(recipe), **given}),
        None,
        f"{recipe.parent.name}/{recipe.name} ({why})",
    )


def default_recipe(given):
    """The user's own command needs no recipe: with a GPU it is the first paper's run, without one the built-in small run."""
    if given.get("task") == "translate":
        return RECIPES / "oorl.toml", "OORL's code translation"
    if given.get("task") == "selfplay":
        small = given.get("model", "tiny") == "tiny" and not torch.cuda.is_available()
        return (
            (RECIPES / "azr_tiny.toml", "self-play without a GPU")
            if small
            else (RECIPES / "azr_racket.toml", "Absolute-Zero self-play")
        )
    if given.get("model", "tiny") != "tiny" or given.get("task", "sums") != "sums":
        return RECIPES / "gsm8k.toml", "you named a model or a task"
    if torch.cuda.is_available() and not {"model", "task"} & set(given):
        return RECIPES / "gsm8k.toml", "there is a GPU: the first paper's run, GSM8K"
    return RECIPES / "tiny.toml", "you asked for it" if {"model", "task"} & set(
        given
    ) else "no GPU found: the built-in small run"


def read_recipe(path):
    """TOML -> dict of settings, checked by name and type."""
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(
            f"no recipe {path}: choose one of {', '.join(sorted(p.name for p in RECIPES.glob('*.toml')))} in recipes/"
        )
    except tomllib.TOMLDecodeError as problem:
        raise SystemExit(f"{path} is not valid TOML: {problem}")
    types = {f.name: f.type for f in fields(Settings)}
    for name, value in values.items():
        if name not in types:
            raise SystemExit(
                f"{path}: unknown setting {name!r}; python train.py --help lists them all"
            )
        if type(value) is not types[name] and not (types[name] is float and type(value) is int):
            raise SystemExit(f"{path}: {name} must be {types[name].__name__}, not {value!r}")
    return values


def read_config(folder):
    """The resolved settings of an earlier run."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise SystemExit(
            f"{folder} is no run folder (it has no config.json); runs are under runs/"
        ) from None
