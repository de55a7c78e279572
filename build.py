"""From settings to the live parts of a run: task and judge, starting checkpoint, model, optimizer, sampler."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch

import gepo
import grpo
import sft
from batches import make_optimizer
from eval import prompt_ids
from rewards import Judge
from rollout import prompt_messages
from runtime import distributed, hugging_face, lora, memory
from runtime.exact import make_exact
from runtime.tokenizer import ChatTokenizer
from sampler import Sampler
from selfplay import loop as selfplay
from settings import Settings
from tasks import translate
from tasks.problems import load_problems


@dataclass
class Run:
    """The live parts of one run, handed to the functions below."""

    settings: Settings
    device: torch.device
    folder: Path
    language: object
    tokenizer: ChatTokenizer
    tokenizer_folder: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    judge: Judge
    problems: list
    held_out: list
    ask: Callable | None = None  # the prompt of a held-out problem
    reference: torch.nn.Module | None = None  # the model that kl_coef holds the policy to
    groups: gepo.Gepo | None = None  # what --gepo trains on between the RL steps
    peak_flops: float = 1.0  # of one rank, for MFU
    updates: int = 0
    drawn: int = 0  # prompts drawn from the data so far
    lengths: dict = field(default_factory=dict)  # problem id -> mean tokens of its last completions
    play: selfplay.Play | None = None  # --task selfplay
    best: tuple = (-1.0, 0)  # highest pass@1 of an evaluation during training, and its step


def new_folder(s):
    """runs/NAME for a new run; a name that exists is refused, so that nothing is overwritten (unless torchrun restarts a run that died early)."""
    name = s.name or f"{s.task}-{s.lang.replace(',', '-')}-{datetime.now():%m%d-%H%M%S}"
    folder = Path("runs") / distributed.broadcast(name)
    if distributed.broadcast(folder.exists()) and not distributed.restarted():
        raise SystemExit(
            f"{folder} exists: go on with it by --resume {folder}, or choose another --name"
        )
    return folder


def restarted_run(s):
    """After a restart by torchrun: the folder of the run that died, the newest one with these settings, or None when it had not begun."""
    found = [
        path.parent
        for path in Path("runs").glob(f"{s.name or '*'}/config.json")
        if json.loads(path.read_text()) == asdict(s)
    ]
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime, default=None)


def warm_start(s, folder, problems, language, device, report):
    """The checkpoint folder to start from: the user's, or the tiny model made for this run (once: a resume finds it)."""
    if s.model != "tiny":
        return hugging_face.find_checkpoint(s.model)
    out = folder / "warm_start"
    if not distributed.broadcast(out.exists()):  # rank 0's machine decides
        supervised = sft.WarmStart(
            task=s.task,
            lang=s.lang,
            out=str(out),
            examples=s.examples,
            short_prompt=s.short_prompt,
            references=s.references,
            steps=s.warm_start_steps,
            batch=16,
            lr=2e-3,
            token_budget=s.token_budget,
            seed=s.seed,
            mistakes=s.warm_start_mistakes,
        )
        sft.run(supervised, problems, language, device, report)
    distributed.mirror(out)
    return out


def usable(problems, tokenizer, prompt, limit, report):
    """Drop problems whose prompt is longer than the limit; say how many."""
    kept = [p for p in problems if len(prompt_ids(tokenizer, prompt(p))) <= limit]
    if len(kept) < len(problems):
        report(
            f"{len(problems) - len(kept)} of {len(problems)} problems dropped: their prompt is longer than --max_prompt_tokens {limit}"
        )
    if not kept:
        raise SystemExit(
            f"no problem is left: every prompt is longer than --max_prompt_tokens {limit}; raise it, or lower --examples"
        )
    return kept


def build(s, folder, language, pool, device, report):
    """Load problems, model, optimizer, sampler and judge. What can be wrong in the settings is tried before the warm start."""
    problems, held_out, judge, ask = load_task(s, language, pool)
    grpo.token_weights(s.loss, [1], s.max_new_tokens)
    if s.old_logprobs not in ("sampler", "trainer") or (s.tis and s.old_logprobs == "sampler"):
        raise SystemExit(
            f"--old_logprobs {s.old_logprobs} --tis {s.tis}: choose sampler or trainer, and trainer with --tis, which compares the two"
        )
    grpo.check_advantage(s.advantage)
    if s.exact and (device.type == "cpu" or s.lora_rank):
        raise SystemExit(
            "--exact is for GPUs and without --lora_rank: on a CPU samples never depend on the batch, and an adapter is merged for sampling"
        )
    source = warm_start(s, folder, problems, language, device, report)
    memory.check(hugging_face.read_config(source), s, device, report)
    model = hugging_face.load_model(source)
    tokenizer = ChatTokenizer(source)
    model.gradient_checkpointing = s.gradient_checkpointing
    plain = (
        device.type == "cpu" and not torch.distributed.is_initialized() and not s.lora_rank
    )  # one torchrun rank is sharded, too
    sampler_model = (
        model
        if plain
        else hugging_face.load_model(
            source, torch.bfloat16 if device.type == "cuda" else torch.float32, device
        ).requires_grad_(False)
    )
    if s.lora_rank:
        lora.attach(model, s.lora_rank, s.lora_alpha or s.lora_rank, s.seed)
    if s.exact:
        make_exact(model)
    model = distributed.shard(model, device)
    run = Run(
        s,
        device,
        folder,
        language,
        tokenizer,
        source,
        model,
        make_optimizer(model, s.weight_decay, s.beta2),
        Sampler(sampler_model, slots=s.slots, memory=s.sampler_gb * 1e9 or None, exact=s.exact),
        judge,
        problems,
        held_out,
        ask,
        peak_flops=memory.peak_flops(device),
    )
    if s.kl_coef and not s.lora_rank:
        run.reference = distributed.shard(
            hugging_face.load_model(source, sampler_model.embed.weight.dtype).requires_grad_(False),
            device,
        )
    if s.gepo:  # before anything is restored: the reference is the policy that the run starts from
        run.groups = gepo.prepare(s, tokenizer, run.model, device, folder, report)
    if s.task == "selfplay":
        run.play = selfplay.Play(s, language, pool, run.sampler, tokenizer)
    else:
        run.problems = usable(problems, tokenizer, ask, s.max_prompt_tokens, report)
    run.held_out = usable(held_out, tokenizer, ask, s.max_prompt_tokens, lambda *_: None)
    return run


def load_task(s, language, pool):
    """(problems, held-out problems, their judge, the prompt of a problem) of --task."""
    if s.task == "selfplay":
        return [], *selfplay.load_evaluation(s, language, pool)
    ask = lambda p: prompt_messages(s, language, p)
    if s.task == "translate":
        return *translate.load_both(s), translate.make_translate_judge(s, pool), ask
    judge = make_judge(s, pool, language)
    problems = load_problems(
        s.task, "train", data=s.data or None, count=s.problems or None, seed=s.seed
    )
    held_out = load_problems(s.task, "test", data=s.data or None, count=s.eval_problems, seed=0)
    return problems, held_out, judge, ask


def make_judge(s, pool, language):
    """--reward as a Judge: 'name=weight,...' or 'random'."""
    if s.syntax_mix and "syntax=" not in s.reward:
        raise SystemExit("--syntax_mix needs the syntax check: --reward correct=1,syntax=0")
    if s.reward == "random":
        return Judge(pool, language, random_reward=True, seed=s.seed)
    try:
        components = {
            name: float(weight)
            for name, weight in (part.split("=") for part in s.reward.split(","))
        }
    except ValueError:
        raise SystemExit(
            f"--reward {s.reward}: write random, or components with weights as correct=2,wrong=-1,tags=0.75"
        ) from None
    return Judge(pool, language, components, gate=s.format_gate)
