"""Settings of a run: one dataclass in sections, one sentence per field.

Flags, --help and recipes (TOML) come from it.
"""

import argparse
import json
import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

import torch

from grpo import ADVANTAGES, LOSSES

RECIPES = Path(__file__).parent / "recipes"

# --loss -> (the method that it is named after, what it brings where nothing else is given).
# Self-play has an advantage of its own. GRPO's papers give no number for the clip: 0.2 is PPO's.
METHODS = {
    "grpo": (
        "GRPO (arXiv 2402.03300)",
        {"advantage": "grpo", "clip_low": 0.2, "clip_high": 0.2},
    ),
    "dr_grpo": (
        "Dr. GRPO (arXiv 2503.20783)",
        {"advantage": "mean", "clip_low": 0.2, "clip_high": 0.2},
    ),
    "dapo": (
        "DAPO (arXiv 2503.14476)",
        {"advantage": "grpo", "clip_low": 0.2, "clip_high": 0.28},
    ),
    "gspo": (
        "GSPO (arXiv 2507.18071)",
        {"advantage": "grpo", "clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "cispo": (
        "CISPO (arXiv 2506.13585) with the cap of ScaleRL (arXiv 2510.13786)",
        {"advantage": "grpo", "cispo_cap": 5.0},
    ),
}
BROUGHT = ("advantage", "clip_low", "clip_high", "cispo_cap")
SELFPLAY_ADVANTAGE = "trr++"


def setting(default, text, section=None, least=None, most=None, choices=(), table=False):
    """A field with its sentence for --help.

    default: None is for what another setting brings. section: the title of the section that begins
    here. least, most: bounds of a number. choices: all values that there are.
    table: text of names with numbers, as a=1,b=2; in a recipe it may be a table of TOML.
    """
    known = {"least": least, "most": most, "choices": choices, "table": table}
    return field(default=default, metadata={"help": text, "section": section, **known})


@dataclass
class Settings:
    """Every setting of a run."""

    task: str = setting(
        "gsm8k",
        "problems to train on: sums (built in), gsm8k, translate or selfplay (the model makes its "
        "own)",
        section="what is trained on what",
        choices=("sums", "gsm8k", "translate", "selfplay"),
    )
    lang: str = setting(
        "prolog",
        "language to write, any name in sandbox/languages/; translate draws one of several, as "
        "lua,racket,java, for each problem",
    )
    model: str = setting(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "checkpoint folder or hub id; 'tiny' builds and warm-starts a 1M-parameter model",
    )
    data: str = setting(
        "", "folder with data sets (default: RARECODE_DATA, then ../shared/data, else download)"
    )
    problems: int = setting(0, "train on only so many problems of the task; 0 = all", least=0)
    examples: int = setting(1, "worked examples in the prompt: 0, 1 or 5", choices=(0, 1, 5))
    short_prompt: bool = setting(
        False, "leave the long instructions out (for models trained on this format)"
    )
    warm_start: str = setting(
        "0",
        "model tiny: supervised steps (of 16 problems) before reinforcement learning and, after a "
        "colon, the share of demonstrations with a typical mistake of the language, as 800:0.7",
    )

    name: str = setting(
        "",
        "everything goes to runs/NAME (default: task, language and time)",
        section="the run",
    )
    seed: int = setting(0, "decides data order and every sampled token")
    steps: int = setting(1500, "rollout-and-update steps", least=0)
    save_every: int = setting(
        100, "steps between checkpoints (the last step is always saved)", least=1
    )
    keep: int = setting(
        2, "newest checkpoints to keep, beside the best of the evaluated ones", least=0
    )
    wandb: str = setting(
        "auto",
        "auto (online with a key, else offline), online, offline or off",
        choices=("auto", "online", "offline", "off"),
    )

    prompts: int = setting(
        32,
        "prompts per step, over all ranks (selfplay: for each task and role, 6 times as many)",
        section="rollouts",
        least=1,
    )
    samples: int = setting(8, "completions per prompt (the group)", least=1)
    max_prompt_tokens: int = setting(
        1024, "problems with a longer prompt are dropped, and counted at the start", least=1
    )
    max_new_tokens: int = setting(512, "longest completion", least=1)
    temperature: float = setting(1.0, "of rollouts; the trainer's log-probs use it too")
    dynamic_sampling: int = setting(
        0,
        "most rounds of new prompts in place of groups whose rewards are all equal (DAPO); 0 = off",
        least=0,
    )
    rate_low: float = setting(
        0.0,
        "a problem is asked again only if so many of its last samples were right; 0.01 leaves out "
        "what is too hard, --rate_high 0.9 what is solved (ScaleRL)",
        least=0,
        most=1,
    )
    rate_high: float = setting(1.0, "and not more than so many", least=0, most=1)
    max_known_steps: int = setting(
        0,
        "sums, gsm8k: only problems whose known answer has at most so many steps; 0 = all",
        least=0,
    )
    slots: int = setting(
        0,
        "sequences sampled at the same time on one rank; 0 = as many as memory holds, at most 1024 "
        "(256 on a CPU)",
        least=0,
    )

    reward: str = setting(
        "correct=1",
        "components of rewards.py with weights, as correct=2,wrong=-1; 'random' is the control "
        "that must not learn",
        section="rewards",
        table=True,
    )
    format_gate: bool = setting(
        True,
        "no reward without the right format (published sets add a format reward instead: false)",
    )
    syntax_mix: bool = setting(
        False,
        "reward = s * syntax + (1 - s) * reward, s = share of the step's programs with syntax "
        "errors (SLMFix); needs syntax=0 in --reward",
    )
    overlong_buffer: int = setting(
        0,
        "soft penalty on the last so many tokens before max_new_tokens, down to -1 (DAPO); 0 = off",
        least=0,
    )
    reward_deadline: float = setting(
        300.0, "seconds for all programs of a step; what is not judged by then is masked", least=0
    )
    sandbox: str = setting(
        "kernel",
        "weakest isolation level to accept: kernel or namespaces; portable is not a sandbox",
        choices=("kernel", "namespaces"),
    )

    loss: str = setting(
        "dapo",
        "grpo, dr_grpo, dapo, gspo or cispo (grpo.py); it brings its paper's advantage and clips",
        section="advantage and loss",
        choices=LOSSES,
    )
    advantage: str = setting(
        None,
        "grpo, mean, rloo, batch, pass@k, reinforce++, reinforce++_baseline or distill (grpo.py); "
        "selfplay: trr++",
        choices=ADVANTAGES,
    )
    teacher: str = setting(
        "",
        "--advantage distill: folder or hub id of a larger model with the same tokenizer, whose "
        "log-probs of the policy's own samples it learns from",
    )
    pass_k: int = setting(4, "k of --advantage pass@k: so many samples are one try", least=1)
    positive_weight: float = setting(
        1.0,
        "factor of positive advantages; below 1 wrong answers teach more than right ones, which "
        "keeps variety (0.1: arXiv 2506.01347)",
        least=0,
    )
    clip_low: float = setting(
        None, "lower clip of the ratio: 0.2, gspo 3e-4, cispo none", least=0, most=1
    )
    clip_high: float = setting(
        None,
        "upper clip of the ratio: 0.2, dapo 0.28 (clip-higher), gspo 4e-4, cispo none",
        least=0,
    )
    cispo_cap: float = setting(
        None, "cispo: a token's weight is at most this: 5 (ScaleRL)", least=0
    )
    kl_coef: float = setting(
        0.0,
        "weight of the KL to the starting model, with the right gradient (grpo.reference_kl)",
        least=0,
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", least=0)
    old_logprobs: str = setting(
        "sampler",
        "log-probs that the ratio starts from: sampler (free) or trainer (one more forward pass)",
        choices=("sampler", "trainer"),
    )
    tis: float = setting(
        0.0,
        "truncated importance weight: a token's loss times min(trainer / sampler probability, "
        "this); needs old_logprobs trainer; 0 = off",
        least=0,
    )
    tis_mask: bool = setting(
        False, "a token beyond --tis counts nothing, instead of --tis times (masked)"
    )
    gold: float = setting(
        0.0,
        "sums, gsm8k: advantage of a problem's known right program where all its samples are wrong; "
        "needs old_logprobs trainer; 0 = off",
        least=0,
    )
    minibatches: int = setting(1, "optimizer steps per pass over a rollout", least=1)
    epochs: int = setting(1, "passes over a rollout", least=1)

    lr: float = setting(1e-6, "peak learning rate", section="optimizer", least=0)
    schedule: str = setting(
        "constant",
        "after the warm-up: constant, linear or cosine",
        choices=("constant", "linear", "cosine"),
    )
    warmup: int = setting(10, "steps of linear learning-rate warm-up", least=0)
    weight_decay: float = setting(0.0, "AdamW weight decay of matrices", least=0)
    beta2: float = setting(0.99, "AdamW's second-moment decay", least=0, most=1)
    max_norm: float = setting(1.0, "clip the global gradient norm here; 0 = no clipping", least=0)
    lora_rank: int = setting(
        0,
        "train adapters of this rank beside every linear layer instead of the weights, alpha = "
        "rank (the first paper: 32); 0 = all weights",
        least=0,
    )

    token_budget: int = setting(
        0,
        "most tokens in one micro-batch of one rank; 0 = as many as the memory plan has room for "
        "(on a CPU 16384)",
        section="memory and arithmetic",
        least=0,
    )
    share_prompts: bool = setting(
        True, "compute a prompt once for all completions of its group in the update"
    )
    gradient_checkpointing: bool = setting(
        True,
        "compute activations again in the backward pass; on a GPU only where they do not fit "
        "otherwise",
    )
    exact: bool = setting(
        False,
        "on a GPU: sampler and trainer do the same arithmetic, log-probs equal to the last bit "
        "(runtime/exact.py); slower",
    )

    eval_every: int = setting(
        100,
        "steps between evaluations on held-out and validation problems; 0 = only before and after, "
        "on held-out problems",
        section="evaluation in the loop",
        least=0,
    )
    eval_problems: int = setting(200, "held-out problems of an evaluation", least=1)
    validation_problems: int = setting(
        200,
        "problems of the training split that are not trained on and choose the best checkpoint, at "
        "most a tenth of it (tasks/data.py: hold_out); 0 = none, and no best checkpoint is kept",
        least=0,
    )
    eval_samples: int = setting(1, "completions per evaluated problem", least=1)
    eval_temperature: float = setting(0.0, "of evaluation; 0 = greedy", least=0)
    eval_greedy: bool = setting(
        False,
        "one greedy completion per held-out problem beside those at eval_temperature, where that is "
        "not 0 (eval/greedy/pass@1): gain apart from sharpening",
    )

    translate_data: str = setting(
        "",
        "JSON lines of your own problems (docs/oorl.md) instead of the built-in sets",
        section="OORL: translation and GEPO",
    )
    gepo: float = setting(
        0.0,
        "weight of the GEPO loss on LLVM-IR groups beside the RL loss, whose weight is 1 "
        "(gepo.py); 0 = off",
        least=0,
    )
    gepo_data: str = setting(".data/gepo/groups.jsonl", "groups that python gepo.py build made")
    gepo_batch: int = setting(8, "groups per step, over all ranks", least=1)
    gepo_winners: int = setting(2, "n, equivalent IRs of a group", least=1)
    gepo_losers: int = setting(
        2, "m, inequivalent IRs of a group; n = m = 1 with --gepo_lam 0 is DPO", least=1
    )
    gepo_beta: float = setting(0.1, "factor of the log-ratio to the starting policy", least=0)
    gepo_lam: float = setting(1.0, "weight of the variance of the winners' rewards", least=0)
    gepo_eps: float = setting(
        0.0, "variance that costs nothing (the paper's constrained form: 0.01 to 0.1)", least=0
    )
    gepo_length_norm: bool = setting(False, "mean log-prob per token instead of the sum")
    gepo_unbiased: bool = setting(False, "sample variance instead of population variance")
    gepo_alone: bool = setting(
        False,
        "take GEPO also where RL has no signal, as the paper's sum says; AdamW makes that a whole "
        "step, whatever the weight",
    )
    gepo_kinds: str = setting(
        "run",
        "kinds of losers, with commas: constant, predicate, operand, drop, swap, type, operation, "
        "or run (all of them), cheap (the paper's: edits that nobody has run, many no valid IR)",
    )
    gepo_admit_winners: int = setting(
        2, "groups with fewer winners are left out whatever n: arms on the same groups", least=1
    )
    gepo_admit_losers: int = setting(2, "groups with fewer losers, whatever m", least=1)
    gepo_members: str = setting(
        "auto",
        "a group's members in one forward pass or one by one: packed, serial or auto (packed where "
        "--token_budget allows)",
        choices=("auto", "packed", "serial"),
    )
    gepo_max_tokens: int = setting(
        2048, "groups with a longer member (prompt and IR) are left out, and counted", least=1
    )

    propose_reward: str = setting(
        "switch:64",
        "eq3, eq4, switch:N (eq3 up to step N, then eq4) or blend (from one to the other by the "
        "solver's accuracy)",
        section="self-play",
    )
    solve_weight: float = setting(
        1.0,
        "lambda of equation (1): the solver's advantages count so many times the proposer's",
        least=0,
    )
    solve_penalties: str = setting(
        "",
        "rewards of answers by kind of error in place of equation (2), as wrong=-0.5 (the public "
        "implementation's) or wrong=-0.2,syntax=-0.8: wrong, no_output and the reasons of "
        "selfplay/puzzles.py",
        table=True,
    )
    propose_penalties: str = setting(
        "",
        "rewards of refused proposals by reason in place of -1, as syntax=-0.8 "
        "(selfplay/puzzles.py)",
        table=True,
    )
    refuse_copies: bool = setting(
        False,
        "refuse proposals that copy a reference in their prompt or stand in the buffer already "
        "(propose/copy_frac, propose/known_frac); false, as published: they are paid",
    )
    learn_samples: int = setting(
        8,
        "answers that tell how learnable a proposal is, sampled at the training temperature",
        least=1,
    )
    references: int = setting(6, "earlier programs that a proposer sees", least=0)
    composite: float = setting(
        0.0, "share of proposals that must build on one or two earlier programs", least=0, most=1
    )
    buffer_size: int = setting(
        16384, "most entries of each of the three buffers; the oldest go first", least=1
    )
    seed_problems: int = setting(
        256, "entries of each buffer before the first step, proposed by the model itself", least=0
    )
    seeds: str = setting(
        "",
        "files to take seeds from instead, with commas: JSON lines with snippet, input(s), or a "
        "checkpoint's selfplay.json",
    )
    eval_bench: str = setting(
        "triples",
        "what is evaluated in the loop: triples (built-in input/output prediction), humaneval or "
        "mbpp",
        choices=("triples", "humaneval", "mbpp"),
    )

    def __post_init__(self):
        """What the loss brings, where nothing else is given."""
        for name, value in brought_by_loss(self.task, self.loss).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# ---- what a loss chosen by name brings ----


def brought_by_loss(task, loss):
    """{setting: value} of a --loss; of one that does not exist nothing."""
    _, values = METHODS.get(loss, ("", {}))
    return values | {"advantage": SELFPLAY_ADVANTAGE} if task == "selfplay" else values


def with_flags(values, given):
    """The settings of a recipe or an earlier run, with flags on top.

    Another loss brings its own advantage and clips: what stands there was meant for that one.
    """
    loss = values.get("loss", Settings.loss)
    if given.get("loss", loss) != loss:
        values = {name: value for name, value in values.items() if name not in BROUGHT}
    return {**values, **given}


def loss_in_words(settings):
    """One sentence on the loss, its advantage and clips; where they are not its paper's, which."""
    paper, _ = METHODS[settings.loss]
    own = brought_by_loss(settings.task, settings.loss)
    said = ", ".join(f"{name} {getattr(settings, name)}" for name in own)
    others = [f"{name} {own[name]}" for name in own if getattr(settings, name) != own[name]]
    if not others:
        return f"loss {settings.loss}: {said}, as {paper}"
    return f"loss {settings.loss}: {said}; this is not {paper}, which has {', '.join(others)}"


def check_loss(settings):
    """SystemExit with one sentence for an advantage or a clip that the run would not use."""
    is_selfplay = settings.task == "selfplay"
    if (settings.advantage == SELFPLAY_ADVANTAGE) != is_selfplay:
        raise SystemExit(
            f"--advantage {settings.advantage} --task {settings.task}: self-play has "
            f"{SELFPLAY_ADVANTAGE}, and nothing else has it; leave --advantage out"
        )
    own = brought_by_loss(settings.task, settings.loss)
    for name in BROUGHT:
        value = getattr(settings, name)
        if value is not None and name not in own:
            raise SystemExit(
                f"--{name} {value} is not used by --loss {settings.loss}, which has "
                f"{', '.join(own)}; leave it out"
            )


# ---- flags ----


EARLIER = "an earlier start"  # origin of what --resume finds in config.json


@dataclass
class Origin:
    """Where the settings of a start come from."""

    sentence: str  # recipes/tiny.toml (no GPU found: the built-in small run)
    settings: dict[str, str]  # name -> recipe, command line or --loss; the others: their default


def find_origin(sentence, below, values, given, settings):
    """The Origin of settings.

    values: what stands in a recipe or an earlier run, whose name is `below`, with the flags
    (`given`) on top.
    """
    found = dict.fromkeys(values, below) | dict.fromkeys(given, "command line")
    for name in BROUGHT:
        if name not in values and getattr(settings, name) is not None:
            found[name] = f"--loss {settings.loss}"
    return Origin(sentence, found)


def add_flags(parser, cls):
    """One flag per field of a settings dataclass, in its sections.

    A flag that is not given leaves no trace, so that a recipe can show through.
    """
    group = parser
    for setting in fields(cls):
        if setting.metadata["section"]:
            group = parser.add_argument_group(setting.metadata["section"])
        default = "by --loss" if setting.default is None else setting.default
        group.add_argument(
            f"--{setting.name}",
            type=parse_bool if setting.type is bool else setting.type,
            default=argparse.SUPPRESS,
            help=f"{setting.metadata['help']} [{default}]".replace("%", "%%"),
            metavar="",
        )


def parse_bool(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_settings(arguments, description):
    """Flags over recipe over defaults.

    Returns (Settings, folder of the run to resume or None, Origin).
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        metavar="",
        help="TOML file with settings [recipes/gsm8k.toml with a GPU; without one recipes/tiny.toml, "
        "or recipes/laptop.toml for a model of yours]",
    )
    parser.add_argument(
        "--resume",
        metavar="",
        help="folder of the run to continue, from its newest whole checkpoint",
    )
    add_flags(parser, Settings)
    given = vars(parser.parse_args(arguments))
    recipe = given.pop("recipe")
    resume = given.pop("resume")

    if resume:
        values = with_flags(read_config(Path(resume)), given)
        below, sentence = EARLIER, f"{resume} (resumed)"
    else:
        path, why = (Path(recipe), "the recipe you named") if recipe else default_recipe(given)
        values = with_flags(read_recipe(path), given)
        below = f"{path.parent.name}/{path.name}"
        sentence = f"{below} ({why})"
    settings = Settings(**values)
    check_limits(settings)
    origin = find_origin(sentence, below, values, given, settings)
    return settings, Path(resume) if resume else None, origin


def check_limits(settings):
    """SystemExit with one sentence for a value that no run can use."""
    check_values(settings)
    check_loss(settings)
    check_name(settings.name)


def check_values(settings):
    """SystemExit for a value outside its bounds or choices, of any dataclass of setting()s."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if value is None:  # of another loss
            continue
        least, most = setting.metadata["least"], setting.metadata["most"]
        choices = setting.metadata["choices"]
        is_number = isinstance(value, int | float)
        if is_number and not math.isfinite(value):
            raise SystemExit(f"--{setting.name} {value}: give a finite number")
        if least is not None and value < least:
            raise SystemExit(f"--{setting.name} {value}: give at least {least}")
        if most is not None and value > most:
            raise SystemExit(f"--{setting.name} {value}: give at most {most}")
        if choices and value not in choices:
            known = ", ".join(map(str, choices))
            raise SystemExit(f"unknown {setting.name} {value!r}: choose one of {known}")


def check_name(name):
    """SystemExit with one sentence when runs/NAME would not be a folder below runs/."""
    path = PurePosixPath(name)
    is_elsewhere = path.is_absolute() or ".." in path.parts or "\0" in name
    if name and (is_elsewhere or not path.parts):
        raise SystemExit(f"--name {name!r}: a run stays under runs/; give a name such as first")


# ---- recipes and old runs ----


def default_recipe(given):
    """(recipe, why): the user's own command needs none.

    With a GPU it is the first paper's run, without one the built-in small run.
    """
    gpu = torch.cuda.is_available()
    task = given.get("task")
    model = given.get("model", "tiny")

    if task == "translate":
        return RECIPES / "oorl.toml", "OORL's code translation"
    if task == "selfplay" and model == "tiny" and not gpu:
        return RECIPES / "azr_tiny.toml", "self-play without a GPU"
    if task == "selfplay":
        return RECIPES / "azr_racket.toml", "Absolute-Zero self-play"

    if model != "tiny" and task in (None, "gsm8k") and not gpu:
        return RECIPES / "laptop.toml", "you named a model, and there is no GPU"
    if model != "tiny" or task not in (None, "sums"):
        return RECIPES / "gsm8k.toml", "you named a model or a task"
    if "model" in given or "task" in given:
        return RECIPES / "tiny.toml", "you asked for it"
    if gpu:
        return RECIPES / "gsm8k.toml", "there is a GPU: the first paper's run, GSM8K"
    return RECIPES / "tiny.toml", "no GPU found: the built-in small run"


def read_recipe(path):
    """{setting: value} of a TOML file, checked by name and type.

    base = "other.toml": the whole recipe beside it that this one changes.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(recipe.name for recipe in RECIPES.glob("*.toml")))
        raise SystemExit(f"no recipe {path}: choose one of {known} in recipes/") from None
    except tomllib.TOMLDecodeError as problem:
        raise SystemExit(f"{path} is not valid TOML: {problem}") from None

    base = values.pop("base", None)
    settings = {setting.name: setting for setting in fields(Settings)}
    for name, value in values.items():
        if name not in settings:
            raise SystemExit(
                f"{path}: unknown setting {name!r}; python train.py --help lists them all"
            )
        if type(value) is dict and settings[name].metadata["table"]:
            value = ",".join(f"{key}={number}" for key, number in value.items())
            values[name] = value
        wanted = settings[name].type
        whole_number = wanted is float and type(value) is int
        if type(value) is not wanted and not whole_number:
            raise SystemExit(f"{path}: {name} must be {wanted.__name__}, not {value!r}")
    return with_flags(read_base(path, base), values) if base else values


def read_base(path, base):
    """The settings of the recipe that a recipe changes, which has no base itself."""
    below = path.parent / str(base)
    if below.is_file() and "base" in tomllib.loads(below.read_text()):
        raise SystemExit(f"{path}: base must be a whole recipe, and {base} has a base of its own")
    return read_recipe(below)


def read_table(name, text):
    """--NAME a=1,b=2 -> {"a": 1.0, "b": 2.0}; SystemExit with one sentence for anything else."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        found = {key: float(number) for key, number in pairs}
    except ValueError:
        found = {"": math.nan}
    if not all(map(math.isfinite, found.values())):
        raise SystemExit(f"--{name} {text}: write names with numbers, as a=2,b=-1")
    return found


def read_config(folder):
    """The resolved settings of an earlier run."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise SystemExit(
            f"{folder} is not a run folder (it has no config.json); runs are under runs/"
        ) from None
    gone = sorted(set(values) - {setting.name for setting in fields(Settings)})
    if gone:
        raise SystemExit(
            f"{path} has settings that no longer exist ({', '.join(gone)}): an older version made "
            f"this run; continue it with the code in {folder}/source, or start a new run"
        )
    # A run from before there was a validation slice trains on the whole split.
    return {"validation_problems": 0, **values}
