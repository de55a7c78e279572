"""From settings to the live parts of a run: task, judge, starting checkpoint, model, optimizer,
sampler."""

import glob
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import ModuleType

import torch

import gepo
import rollout
import sft
from batches import make_optimizer
from eval import prompt_ids
from rewards import Judge
from runtime import checkpoint, distributed, hugging_face, lora, memory
from runtime.exact import make_exact
from runtime.tokenizer import ChatTokenizer
from sampler import Request, Sampler
from selfplay import loop as selfplay
from settings import Settings, loss_in_words, read_table
from tasks import translate
from tasks.curriculum import Curriculum
from tasks.data import hold_out, take
from tasks.problems import load_problems, question_of, with_few_steps, with_known_steps


@dataclass
class Validation:
    """Problems of the training split that are not trained on: they choose the best checkpoint."""

    problems: list
    judge: object
    ask: Callable


STEPS_KNOWN = ("sums", "gsm8k")  # tasks whose right programs can be rendered


@dataclass
class Task:
    """What is trained on and evaluated, and who judges it."""

    problems: list  # self-play: none, the model makes its own
    validation: Validation
    held_out: list  # of the test split, which is only reported
    judge: object  # of held-out problems, and of the others where there are any
    ask: Callable  # problem -> chat messages, or text to continue


@dataclass
class Run:
    """The live parts of one run."""

    settings: Settings
    device: torch.device
    folder: Path
    language: object
    tokenizer: ChatTokenizer
    tokenizer_folder: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    judge: object
    curriculum: Curriculum
    held_out: list
    ask: Callable | None = None  # the prompt of a held-out problem
    validation: Validation | None = None
    task: ModuleType = rollout  # or selfplay.loop: rollout() and set_advantages() of a step
    reference: torch.nn.Module | None = None  # what kl_coef holds the policy to, or its teacher
    groups: gepo.Gepo | None = None  # what --gepo trains on between the RL steps
    play: selfplay.Play | None = None  # --task selfplay
    peak_flops: float = 1.0  # of one rank, for MFU
    need: memory.Need | None = None
    updates: int = 0
    lengths: dict = field(default_factory=dict)  # problem id -> mean tokens of its last completions
    best: tuple = (-1.0, 0)  # highest pass@1 on the validation problems so far, and its step


def build(settings, folder, language, pool, device, report):
    """A Run at its first step. What can be wrong in the settings is tried before the warm start."""
    task = load_task(settings, language, pool, report)
    check(settings, device)
    report(loss_in_words(settings))

    source = starting_checkpoint(settings, folder, task.problems, language, device, report)
    config = hugging_face.read_config(source)
    settings, pages = memory.fit(config, settings, device)
    need = memory.check(config, settings, device, report, pages=pages)
    checkpoint.require_room(folder / "checkpoints", config, settings)
    tokenizer = ChatTokenizer(source)

    model = hugging_face.load_model(source)
    model.gradient_checkpointing = settings.gradient_checkpointing
    sampler_model = policy_copy(settings, model, source, device)
    if settings.lora_rank:
        lora.attach(model, settings.lora_rank, alpha=settings.lora_rank, seed=settings.seed)
    if settings.exact:
        make_exact(model)
    model = distributed.shard(model, device)

    bounds = (settings.rate_low, settings.rate_high)
    curriculum = Curriculum(task.problems, settings.seed, *bounds)
    run = Run(
        settings=settings,
        device=device,
        folder=folder,
        language=language,
        tokenizer=tokenizer,
        tokenizer_folder=source,
        model=model,
        optimizer=make_optimizer(model, settings.weight_decay, settings.beta2),
        sampler=make_sampler(settings, sampler_model, tokenizer, pages),
        judge=task.judge,
        curriculum=curriculum,
        held_out=task.held_out,
        ask=task.ask,
        peak_flops=memory.peak_flops(device),
        need=need,
    )
    if settings.teacher or (settings.kl_coef and not settings.lora_rank):
        # With adapters the starting model is the one without them.
        of = source
        if settings.teacher:
            of = hugging_face.find_checkpoint(settings.teacher)
            check_same_tokens(tokenizer, of)
        reference = hugging_face.load_model(of, sampler_model.embed.weight.dtype)
        run.reference = distributed.shard(reference.requires_grad_(False), device)
    if settings.gepo:
        # Before anything is restored: GEPO's reference is the policy that the run starts from.
        run.groups = gepo.prepare(settings, tokenizer, model, device, folder, report)

    limit = longest_prompt(settings, model.config.max_position_embeddings)
    if settings.task == "selfplay":
        run.task = selfplay
        run.play = selfplay.Play(settings, language, pool, run.sampler, tokenizer)
    else:
        curriculum.problems = usable(task.problems, tokenizer, task.ask, limit, report)
    # Drawn from what fits: of 100 questions drawn first, 20 had a prompt of at most 70 tokens.
    fitting = usable(task.held_out, tokenizer, task.ask, limit, report, "held-out ")
    run.held_out = take(fitting, settings.eval_problems, seed=0)
    if settings.eval_every and task.validation.problems:
        run.validation = task.validation
        run.validation.problems = usable(
            task.validation.problems, tokenizer, task.validation.ask, limit, report, "validation "
        )
        report(
            f"{len(run.validation.problems)} validation problems, not trained on, choose the best "
            "checkpoint"
        )
    return run


# ---- task and judge ----


def load_task(settings, language, pool, report):
    """The Task of --task. What is missing is said here, in one sentence."""
    if settings.task == "selfplay":
        validation = Validation(*selfplay.load_validation(settings, language, pool))
        return Task([], validation, *selfplay.load_evaluation(settings, language, pool))

    def ask(problem):
        return rollout.prompt_messages(settings, language, problem)

    if settings.task == "translate":
        judge = translate.make_translate_judge(settings, pool)
        problems, validation, held_out = translate.load_splits(settings, report)
    else:
        judge = make_judge(settings, pool, language)
        problems, validation, held_out = load_splits(settings)
    return Task(problems, Validation(validation, judge, ask), held_out, judge, ask)


def load_splits(settings):
    """(problems to train on, validation problems, held-out problems) of sums and gsm8k."""
    data = settings.data or None
    count = settings.problems or None
    whole = None
    reported = None
    if settings.task == "sums":  # the generator makes as many as are asked for
        whole = count + settings.validation_problems if count else None
        reported = settings.eval_problems
    split = load_problems(settings.task, "train", data=data, count=whole, seed=settings.seed)
    problems, validation = hold_out(split, settings.validation_problems, question_of)
    if settings.task == "gsm8k" and (settings.max_known_steps or settings.gold):
        problems = with_known_steps(problems, data)
    if settings.max_known_steps:
        problems = with_few_steps(problems, settings.max_known_steps)
    held_out = load_problems(settings.task, "test", data=data, count=reported, seed=0)
    return take(problems, count, settings.seed), validation, held_out


def make_judge(settings, pool, language):
    """--reward as a Judge: 'name=weight,...' or 'random'."""
    if settings.syntax_mix and "syntax=" not in settings.reward:
        raise SystemExit("--syntax_mix needs the syntax check: --reward correct=1,syntax=0")
    if settings.reward == "random":
        return Judge(pool, language, random_reward=True, seed=settings.seed)
    components = read_table("reward", settings.reward)
    return Judge(pool, language, components, gate=settings.format_gate)


def longest_prompt(settings, positions):
    """Most tokens of a prompt: --max_prompt_tokens, or what the model's positions leave."""
    left = positions - settings.max_new_tokens
    if left < 1 or (settings.task == "selfplay" and left < settings.max_prompt_tokens):
        raise SystemExit(
            f"--max_prompt_tokens {settings.max_prompt_tokens} and --max_new_tokens "
            f"{settings.max_new_tokens} do not fit the model's {positions} positions: lower one"
        )
    return min(settings.max_prompt_tokens, left)


def usable(problems, tokenizer, ask, limit, report, kind=""):
    """Drop problems whose prompt is longer than the limit; say how many."""
    kept = [problem for problem in problems if len(prompt_ids(tokenizer, ask(problem))) <= limit]
    if len(kept) < len(problems):
        report(
            f"{len(problems) - len(kept)} of {len(problems)} {kind}problems dropped: their prompt "
            f"is longer than {limit} tokens (--max_prompt_tokens, or what the model's positions "
            "leave beside --max_new_tokens)"
        )
    if not kept:
        raise SystemExit(
            f"no {kind}problem is left: every prompt is longer than {limit} tokens; raise "
            "--max_prompt_tokens, or lower --examples"
        )
    return kept


def check(settings, device):
    """One sentence for settings that cannot work together."""
    one_reward_a_group = settings.samples == 1 and settings.task != "selfplay"
    if one_reward_a_group and settings.advantage not in ("reinforce++", "distill"):
        raise SystemExit(
            f"--samples 1 --advantage {settings.advantage}: a group of one has nothing to be compared "
            "with; take more samples, or --advantage reinforce++"
        )
    if settings.temperature <= 0:
        raise SystemExit(
            f"--temperature {settings.temperature}: greedy samples of a prompt are all alike and the "
            "loss divides by it; give more than 0 (--eval_temperature 0 is greedy evaluation)"
        )
    if (settings.advantage == "distill") != bool(settings.teacher) or (
        settings.teacher and (settings.kl_coef or settings.dynamic_sampling or settings.gold)
    ):
        raise SystemExit(
            "--teacher DIR and --advantage distill go together: the teacher's log-probs take the "
            "place of rewards, and of --kl_coef, --dynamic_sampling and --gold"
        )
    if settings.rate_low > settings.rate_high:
        raise SystemExit(
            f"--rate_low {settings.rate_low} lies above --rate_high {settings.rate_high}: no "
            "problem would be asked again"
        )
    if settings.advantage == "pass@k":
        check_pass_at_k(settings)
    if settings.gold and (settings.old_logprobs == "sampler" or settings.task not in STEPS_KNOWN):
        raise SystemExit(
            "--gold is for sums and gsm8k, whose right programs are known, and needs "
            "--old_logprobs trainer: no sampler has drawn them"
        )
    if settings.gold and settings.reward == "random":
        raise SystemExit("--gold tells what is right: with --reward random there is no control")
    if settings.tis_mask and not settings.tis:
        raise SystemExit("--tis_mask says what is done beyond --tis: give that too, as --tis 2")
    if settings.tis and settings.old_logprobs == "sampler":
        raise SystemExit(
            f"--tis {settings.tis} compares the trainer's log-probs with the sampler's: it needs "
            "--old_logprobs trainer"
        )
    if settings.overlong_buffer > settings.max_new_tokens:
        raise SystemExit(
            f"--overlong_buffer {settings.overlong_buffer} is longer than --max_new_tokens "
            f"{settings.max_new_tokens}: every completion would be punished"
        )
    if settings.exact and (device.type == "cpu" or settings.lora_rank):
        raise SystemExit(
            "--exact is for GPUs and without --lora_rank: on a CPU samples never depend on the "
            "batch, and an adapter is merged for sampling"
        )
    parse_warm_start(settings.warm_start)


def check_same_tokens(tokenizer, folder):
    """SystemExit where a teacher's ids mean other texts."""
    if ChatTokenizer(folder).tokens() != tokenizer.tokens():
        raise SystemExit(
            f"the teacher {folder} has another tokenizer than the model: it cannot score its tokens"
        )


def check_pass_at_k(settings):
    """SystemExit where a try of k samples is not paid 0 or 1, or needs more than there are."""
    is_shaped = settings.syntax_mix or settings.overlong_buffer
    if is_shaped or settings.reward not in ("correct=1", "random"):
        raise SystemExit(
            "--advantage pass@k is for rewards of 0 and 1: --reward correct=1 or random, without "
            "--syntax_mix and --overlong_buffer"
        )
    if settings.pass_k > settings.samples:
        raise SystemExit(
            f"--pass_k {settings.pass_k}: a try takes no more than the group's --samples, which "
            f"are {settings.samples}"
        )


# ---- models ----


def starting_checkpoint(settings, folder, problems, language, device, report):
    """Folder of the checkpoint to start from: the user's, or the tiny model made for this run.

    The tiny model is made once: a resume finds it.
    """
    if settings.model != "tiny":
        return hugging_face.find_checkpoint(settings.model)
    out = folder / "warm_start"
    if not distributed.broadcast(out.exists()):  # rank 0's machine decides
        steps, mistakes = parse_warm_start(settings.warm_start)
        supervised = sft.WarmStart(
            task=settings.task,
            lang=settings.lang,
            out=str(out),
            examples=settings.examples,
            short_prompt=settings.short_prompt,
            references=settings.references,
            steps=steps,
            batch=16,
            lr=2e-3,
            token_budget=settings.token_budget or sft.WarmStart.token_budget,
            seed=settings.seed,
            mistakes=mistakes,
        )
        sft.run(supervised, problems, language, device, report)
    distributed.mirror(out)
    return out


def parse_warm_start(text):
    """'800:0.7' -> (800 supervised steps, 0.7 of the demonstrations with a typical mistake)."""
    steps, _, mistakes = text.partition(":")
    try:
        return int(steps), float(mistakes or 0)
    except ValueError:
        raise SystemExit(
            f"--warm_start {text}: write supervised steps, and after a colon the share of "
            "demonstrations with a mistake, as 800:0.7"
        ) from None


def policy_copy(settings, model, source, device):
    """The model that the sampler reads: the trainer's own in one process, else a copy, in bf16 on
    a GPU."""
    one_process = not torch.distributed.is_initialized()
    if one_process and not settings.lora_rank:  # one torchrun rank is sharded, too
        return model
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return hugging_face.load_model(source, dtype, device).requires_grad_(False)


def make_sampler(settings, model, tokenizer, memory):
    """The run's sampler; on a GPU its pages and graphs are made once, for the largest step."""
    expected = []
    if model.embed.weight.is_cuda:
        largest = Request(
            prompt=[0] * settings.max_prompt_tokens,
            n=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
        )
        expected = [largest] * -(-settings.prompts // distributed.world_size())
    return Sampler(model, settings.slots, memory=memory, exact=settings.exact, expected=expected)


# ---- folders ----


def new_folder(settings):
    """runs/NAME for a new run. A name that exists is refused, so that nothing is overwritten.

    Unless torchrun restarts a run that died early.
    """
    languages = settings.lang.replace(",", "-")
    name = settings.name or f"{settings.task}-{languages}-{datetime.now():%m%d-%H%M%S}"
    folder = Path("runs") / distributed.broadcast(name)
    if distributed.broadcast(folder.exists()) and not distributed.restarted():
        raise SystemExit(
            f"{folder} exists: continue it with --resume {folder}, or choose another --name"
        )
    return folder


def restarted_run(settings):
    """After a restart by torchrun: the folder of the run that died, or None when it had not begun.

    That is the newest run with these settings.
    """
    found = []
    name = glob.escape(settings.name) or "*"
    for path in Path("runs").glob(f"{name}/config.json"):
        if json.loads(path.read_text()) == asdict(settings):
            found.append(path)
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parent
