"""One GRPO step, split into its parts, through train.py's own functions.

    python -m bench step                                                       one GPU: 64 prompts x 16 samples, prompt 512, response 256, 0.5B and 1.5B
                                                                               (random weights); without a GPU the built-in tiny shape, 32 x 8
    python -m bench step --model DIR --prompts 4 --samples 8 --response 64     a real checkpoint on GSM8K questions
    python -m bench step --model DIR ... --trl                                 the same work with TRL's GRPOTrainer in the same run, when it is installed

Each shape runs with prompts computed once per group and with every sequence whole. No sequence stops early, rewards are a fair coin, so that every
step has a gradient; a rendered right program per sample runs in SWI-Prolog beside it, so that "reward" is a real wait.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import model as model_file
import sft
from batches import make_optimizer
from build import Run
from rewards import Judge
from runtime import distributed, hugging_face, memory
from runtime.tokenizer import ChatTokenizer
from sampler import Sampler
from sandbox import Pool
from sandbox.languages import load_language
from settings import Settings
from tasks.problems import load_problems
from tasks.render import solution
from train import train_step

PHASES = ("generate", "reward", "logprob", "update", "weights", "step")


class FixedPrompts:
    """In place of a tokenizer: a prompt of exactly `length` random tokens per question, and no stop token."""

    stop_ids = ()

    def __init__(self, length, vocabulary):
        self.length, self.vocabulary = length, vocabulary

    def encode_chat(self, program_messages):
        chance = random.Random(program_messages[-1]["content"])
        return [chance.randrange(self.vocabulary) for _ in range(self.length)]

    def decode(self, ids):
        return ""


class NoStop(ChatTokenizer):
    """The real tokenizer with no stop token, so that every completion has the same length."""

    def __init__(self, folder):
        super().__init__(folder)
        self.stop_ids = ()


class RightPrograms(Judge):
    """Runs the problem's own right program for every sample, as a program of its own (the cache would know it), and rewards a coin."""

    def submit(self, problem, text, sample=0):
        right = solution(problem, self.language)
        return super().submit(
            problem,
            right.replace(
                "<code>\n", f"<code>\n{self.language.comment} sample {sample} {id(text)}\n"
            ),
            sample,
        )


def make_run(model, tokenizer, s, pool, device):
    """A Run without folder, evaluation or warm start."""
    language = load_language("prolog")
    config = model.config
    memory.check(config, s, device, print)
    sampler_model = model
    if device.type == "cuda":
        sampler_model = (
            model_file.random_model(config, dtype=torch.bfloat16).to(device).requires_grad_(False)
        )
    model.gradient_checkpointing = s.gradient_checkpointing
    model = distributed.shard(model, device)
    problems = (
        load_problems("sums", "train", count=512)
        if isinstance(tokenizer, FixedPrompts)
        else load_problems("gsm8k_steps", "train", count=512)
    )
    judge = RightPrograms(pool, language, random_reward=True)
    sampler = Sampler(sampler_model, slots=s.slots)
    return Run(
        s,
        device,
        None,
        language,
        tokenizer,
        None,
        model,
        make_optimizer(model),
        sampler,
        judge,
        problems,
        [],
        peak_flops=memory.peak_flops(device),
    )


def bench(name, load, tokenizer, s, pool, device, steps):
    """Median seconds of each phase over `steps` steps after one to warm up, for both ways to treat prompts -> rows."""
    rows = []
    for share in (True, False):
        run = make_run(load(), tokenizer, s, pool, device)
        run.settings.share_prompts = share
        measured = []
        for step in range(1, steps + 2):
            measured.append(train_step(run, step)[:2])
        times = [t for _, t in measured[1:]]
        middle = lambda key: statistics.median(t[key] for t in times)
        row = {
            "shape": name,
            "share_prompts": share,
            **{phase: round(middle(f"time/{phase}"), 3) for phase in PHASES},
        }
        row |= {
            "step_spread": round(
                max(t["time/step"] for t in times) - min(t["time/step"] for t in times), 3
            )
        }
        row |= {
            "train_tokens": measured[-1][0]["num_train_tokens"],
            "mfu": round(middle("perf/mfu"), 3),
            "peak_gb": round(middle("perf/peak_mem_gb"), 2),
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        del run
    return rows


def bench_trl(folder, prompts, s, steps):
    """TRL's GRPOTrainer with the same model, prompts, samples and length, fp32 on a CPU, coin rewards without a sandbox -> row."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        marks = []

        def on_step_begin(self, *arguments, **more):
            self.marks.append(time.perf_counter())

        def on_step_end(self, *arguments, **more):
            self.marks.append(time.perf_counter())

    chance, data = (
        random.Random(0),
        Dataset(InMemoryTable.from_pydict({"prompt": prompts}), fingerprint="prompts"),
    )
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps + 1,
        per_device_train_batch_size=s.samples,
        gradient_accumulation_steps=s.prompts,
        num_generations=s.samples,
        max_completion_length=s.max_new_tokens,
        generation_kwargs={"min_new_tokens": s.max_new_tokens},
        beta=0.0,
        temperature=1.0,
        learning_rate=s.lr,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=s.gradient_checkpointing,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        model_init_kwargs={"dtype": "float32"},
    )
    reward = lambda completions, **_: [float(chance.random() < 0.5) for _ in completions]
    trainer = GRPOTrainer(
        model=str(folder), reward_funcs=reward, args=config, train_dataset=data, callbacks=[Clock()]
    )
    trainer.train()
    steps_taken = [b - a for a, b in zip(Clock.marks[::2], Clock.marks[1::2])][1:]
    row = {
        "shape": "TRL GRPOTrainer",
        "step": round(statistics.median(steps_taken), 2),
        "step_spread": round(max(steps_taken) - min(steps_taken), 2),
    }
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def bench_checkpoint(options, pool, device):
    """A real checkpoint on GSM8K questions, and TRL beside it."""
    tokenizer = NoStop(options.model)
    s = settings(options, short_prompt=True, examples=0)
    rows = bench(
        Path(options.model).name,
        lambda: hugging_face.load_model(options.model),
        tokenizer,
        s,
        pool,
        device,
        options.steps,
    )
    if options.trl:
        from tasks.problems import program_messages

        problems = load_problems("gsm8k_steps", "train", count=512)
        prompts = [
            program_messages(p, load_language("prolog"), examples=0, system=False) for p in problems
        ]
        rows.append(bench_trl(options.model, prompts, s, options.steps))
        print(f"{rows[-1]['step'] / rows[0]['step']:.2f} times as fast as TRL")
    return rows


def bench_random(options, pool, device):
    """Random weights of the Qwen2.5-Coder shapes on a GPU, the built-in tiny shape on a CPU."""
    if device.type == "cpu":
        options.prompts, options.samples, options.prompt, options.response = (
            options.prompts or 32,
            options.samples or 8,
            options.prompt or 45,
            options.response or 85,
        )
    s, rows = settings(options), []
    for size in options.shapes.split(",") if device.type == "cuda" else ["tiny"]:
        config = memory.qwen(size) if size != "tiny" else sft.tiny_config(768)
        load = lambda: model_file.random_model(config, std=0.02 if size != "tiny" else 0.08)
        rows += bench(
            size,
            load,
            FixedPrompts(options.prompt or 512, config.vocab_size),
            s,
            pool,
            device,
            options.steps,
        )
    return rows


def settings(options, **more):
    prompts, samples, response = (
        options.prompts or 64,
        options.samples or 16,
        options.response or 256,
    )
    return Settings(
        prompts=prompts,
        samples=samples,
        max_new_tokens=response,
        token_budget=options.token_budget,
        slots=512,
        gradient_checkpointing=torch.cuda.is_available(),
        **more,
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
    parser.add_argument("--token_budget", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trl", action="store_true", help="TRL's GRPOTrainer on the same work")
    options = parser.parse_args(arguments)
    if load_language("prolog").missing():
        sys.exit(load_language("prolog").missing())
    with Pool() as pool:
        device = distributed.setup()
        name = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
        )
        print(f"{name}, torch {torch.__version__}")
        rows = (bench_checkpoint if options.model else bench_random)(options, pool, device)
    print(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}))
    distributed.finish()


if __name__ == "__main__":
    main()
