"""One GRPO step, split into its phases, through train.py's own functions.

    python -m bench step                    one GPU: 64 prompts x 16 samples, prompt 512, response
                                            256, 0.5B and 1.5B (random weights); without a GPU the
                                            built-in tiny shape, 32 x 8
    python -m bench step --model DIR --prompts 4 --samples 8 --response 64
                                            a real checkpoint on GSM8K questions
    python -m bench step ... --trl          the same work with TRL's GRPOTrainer, when installed;
                                            random weights get the tokenizer of the built-in task,
                                            and prompts of as many digits

Each shape runs with prompts computed once per group and with every sequence whole. The first step
stands apart (cold); warm is the median of --steps more, with their spread. No sequence stops early,
rewards are a fair coin, so that every step has a gradient; a rendered right program per sample runs
in SWI-Prolog beside it, so that "reward" is a real wait.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import model as model_file
import sft
from batches import make_optimizer
from bench.clock import Timing, device_name
from bench.predict import shape_config
from build import Run
from rewards import Judge
from runtime import distributed, hugging_face, memory
from runtime.tokenizer import ChatTokenizer
from sampler import Sampler
from sandbox import Pool
from sandbox.languages import load_language
from settings import Settings
from tasks.curriculum import Curriculum
from tasks.problems import load_problems, program_messages
from tasks.render import solution
from train import train_step

PHASES = ("generate", "reward", "logprob", "advantages", "update", "weights", "step")


@dataclass(frozen=True)
class Work:
    """How large a step is."""

    prompts: int = 64
    samples: int = 16
    prompt: int = 512  # tokens of a random prompt; a real one is as long as it is
    response: int = 256


TINY_WORK = Work(prompts=32, samples=8, prompt=45, response=85)  # about the built-in run's


# ---- what stands in for parts of a run ----


class FixedPrompts:
    """In place of a tokenizer: `length` random tokens per question, and no stop token."""

    stop_ids = ()

    def __init__(self, length, vocabulary):
        self.length, self.vocabulary = length, vocabulary

    def encode_chat(self, messages):
        chance = random.Random(messages[-1]["content"])
        return [chance.randrange(self.vocabulary) for _ in range(self.length)]

    def decode(self, ids):
        return ""


class NoStop(ChatTokenizer):
    """The real tokenizer with no stop token, so that every completion has the same length."""

    def __init__(self, folder):
        super().__init__(folder)
        self.stop_ids = ()


class RightPrograms(Judge):
    """Runs the problem's own right program for every sample, and rewards a coin."""

    def submit(self, problem, text, sample=0):
        # A comment makes each a program of its own: the pool's cache would know it.
        mark = f"{self.language.comment} sample {sample} {id(text)}"
        right = solution(problem, self.language).replace("<code>\n", f"<code>\n{mark}\n")
        return super().submit(problem, right, sample)


def make_run(model, tokenizer, problems, settings, pool, device):
    """A Run without folder, evaluation or warm start."""
    settings, pages = memory.fit(model.config, settings, device)
    memory.check(model.config, settings, device, print, pages=pages)
    language = load_language("prolog")
    model.gradient_checkpointing = settings.gradient_checkpointing
    model = distributed.shard(model, device)
    return Run(
        settings=settings,
        device=device,
        folder=None,
        language=language,
        tokenizer=tokenizer,
        tokenizer_folder=None,
        model=model,
        optimizer=make_optimizer(model),
        sampler=Sampler(model, settings.slots, memory=pages),
        judge=RightPrograms(pool, language, random_reward=True),
        curriculum=Curriculum(problems, settings.seed),
        held_out=[],
        peak_flops=memory.peak_flops(device),
    )


# ---- measuring ----


def bench(name, load, tokenizer, problems, settings, pool, device, steps):
    """Time a cold step and `steps` warm ones, for both ways to treat prompts -> rows."""
    rows = []
    for share in (True, False):
        settings = replace(settings, share_prompts=share)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = make_run(load(), tokenizer, problems, settings, pool, device)
        times = []
        for step in range(1, steps + 2):
            metrics, step_times, _ = train_step(run, step)
            times.append(step_times)
        del run  # its memory, before the next is built

        phases = {phase: Timing([t[f"time/{phase}"] for t in times]) for phase in PHASES}
        row = {
            "shape": name,
            "share_prompts": share,
            **phase_columns(phases),
            "train_tokens": metrics.get("num_train_tokens", 0.0),  # none without signal
            "mfu": round(statistics.median(t["perf/mfu"] for t in times[1:]), 3),
            "peak_gb": round(statistics.median(t["perf/peak_mem_gb"] for t in times[1:]), 2),
        }
        rows.append(row)
        print_phases(f"{name}, prompts {'shared' if share else 'not shared'}", phases)
        print(
            f"{row['train_tokens']:,.0f} tokens trained, MFU {row['mfu']}, "
            f"peak {row['peak_gb']} GB",
            flush=True,
        )
    return rows


def phase_columns(phases):
    """{cold, warm, spread: {phase: seconds}} for the last line of JSON."""
    return {
        "cold": {phase: round(timing.cold, 3) for phase, timing in phases.items()},
        "warm": {phase: round(timing.warm, 3) for phase, timing in phases.items()},
        "spread": {phase: round(timing.spread, 3) for phase, timing in phases.items()},
    }


def print_phases(title, phases):
    print(f"\n{title}\n{'seconds':<12}{'cold':>10}{'warm':>10}{'spread':>10}")
    for phase, timing in phases.items():
        print(f"{phase:<12}{timing.cold:>10.3f}{timing.warm:>10.3f}{timing.spread:>10.3f}")


def bench_trl(folder, prompts, settings, steps):
    """TRL's GRPOTrainer with the same model, prompts, samples and length -> row.

    fp32 on a CPU; coin rewards without a sandbox.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.started = 0.0
            self.seconds = []

        def on_step_begin(self, *arguments, **more):
            self.started = time.perf_counter()

        def on_step_end(self, *arguments, **more):
            self.seconds.append(time.perf_counter() - self.started)

    chance = random.Random(0)

    def reward(completions, **_):
        return [float(chance.random() < 0.5) for _ in completions]

    cuda = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps + 1,
        per_device_train_batch_size=settings.samples,
        gradient_accumulation_steps=settings.prompts,
        num_generations=settings.samples,
        max_completion_length=settings.max_new_tokens,
        generation_kwargs={"min_new_tokens": settings.max_new_tokens},
        beta=0.0,
        temperature=1.0,
        learning_rate=settings.lr,
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=settings.gradient_checkpointing,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        model_init_kwargs={"dtype": "float32"},
    )
    table = InMemoryTable.from_pydict({"prompt": prompts})
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset(table, fingerprint="prompts"),
        callbacks=[clock],
    )
    trainer.train()

    phases = {"step": Timing(clock.seconds)}
    print_phases("TRL GRPOTrainer", phases)
    return {"shape": "TRL GRPOTrainer", **phase_columns(phases)}


# ---- the two benches ----


def bench_checkpoint(options, pool, device):
    """A real checkpoint on GSM8K questions, and TRL beside it."""
    settings = replace(step_settings(options, Work()), short_prompt=True, examples=0)
    problems = load_problems("gsm8k_steps", "train", count=512)
    rows = bench(
        Path(options.model).name,
        partial(hugging_face.load_model, options.model),
        NoStop(options.model),
        problems,
        settings,
        pool,
        device,
        options.steps,
    )
    if options.trl:
        prompts = [program_messages(p, "prolog", examples=0, system=False) for p in problems]
        rows.append(bench_trl(options.model, prompts, settings, options.steps))
        faster = rows[-1]["warm"]["step"] / rows[0]["warm"]["step"]
        print(f"{faster:.2f} times as fast as TRL")
    return rows


def bench_random(options, pool, device):
    """Random weights of the Qwen2.5-Coder shapes on a GPU, the built-in tiny shape on a CPU."""
    cuda = device.type == "cuda"
    work = Work() if cuda else TINY_WORK
    settings = step_settings(options, work)
    problems = load_problems("sums", "train", count=512)
    rows = []
    for size in options.shapes.split(",") if cuda else ["tiny"]:
        if size == "tiny":
            config, std = sft.tiny_config(sft.BPE_TOKENS), 0.08
        else:
            config, std = shape_config(size), 0.02
        rows += bench(
            size,
            partial(model_file.random_model, config, std=std),
            FixedPrompts(options.prompt or work.prompt, config.vocab_size),
            problems,
            settings,
            pool,
            device,
            options.steps,
        )
        if options.trl:
            length = options.prompt or work.prompt
            with tempfile.TemporaryDirectory() as folder:
                save_random(config, std, problems, Path(folder))
                prompts = [digits(length, number) for number in range(settings.prompts)]
                rows.append(bench_trl(Path(folder) / "model", prompts, settings, options.steps))
    return rows


def save_random(config, std, problems, folder):
    """folder/model: random weights with the built-in task's tokenizer, for TRL."""
    language = load_language("prolog")

    def prompt(problem):
        return program_messages(problem, language, examples=0, system=False)

    sft.make_tiny(problems, language, prompt, folder / "tokenizer", seed=0)
    weights = dict(model_file.random_model(config, std=std).named_parameters())
    hugging_face.save_model(
        weights, config, folder / "model", torch.float32, tokenizer_from=folder / "tokenizer"
    )


def digits(length, seed):
    """A chat of `length` digits, each of them a token."""
    chance = random.Random(seed)
    text = "".join(chance.choice("0123456789") for _ in range(length))
    return [{"role": "user", "content": text}]


def step_settings(options, work):
    """Settings of a run whose steps are `work`, where the command line does not say otherwise."""
    return Settings(
        prompts=options.prompts or work.prompts,
        samples=options.samples or work.samples,
        max_new_tokens=options.response or work.response,
        token_budget=options.token_budget,
        slots=512,
        max_prompt_tokens=options.prompt or work.prompt,
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="checkpoint folder or hub id, on GSM8K questions")
    for name in ("prompts", "samples", "prompt", "response"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--shapes", default="0.5B,1.5B")
    parser.add_argument("--token_budget", type=int, default=0, help="0 = as many as fit")
    parser.add_argument("--steps", type=int, default=3, help="warm steps, after the cold one")
    parser.add_argument("--trl", action="store_true", help="TRL's GRPOTrainer on the same work")
    options = parser.parse_args(arguments)

    if sentence := load_language("prolog").missing():
        sys.exit(sentence)
    with Pool() as pool:
        device = distributed.setup()
        print(f"{device_name()}, torch {torch.__version__}")
        if options.model:
            rows = bench_checkpoint(options, pool, device)
        else:
            rows = bench_random(options, pool, device)
    print(json.dumps({"device": device_name(), "torch": torch.__version__, "rows": rows}))
    distributed.finish()


if __name__ == "__main__":
    main()
