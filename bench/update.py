"""The update alone: gradient, clipping and optimizer step of one rollout, as train.py makes them.

    python -m bench update                 one GPU: 16 prompts x 16 samples, 512 + 256 tokens,
                                           random weights of the 0.5B and 1.5B shapes
    python -m bench update --smoke         tiny shapes on any machine: shows that it runs, its
                                           figures mean nothing

Each shape runs with what the memory plan chooses, then with smaller micro-batches, activations
computed twice, and prompts not shared. The first update stands apart (cold: kernels compile,
memory is taken); warm is the median of the others. MFU is of the data sheet's rate on a known GPU,
with 6 operations per parameter and token that goes through the model; the plan's bytes stand
beside the measured peak.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import json
import random
from dataclasses import replace

import torch

import model as model_file
from batches import Sequence, make_optimizer
from bench.clock import Timing, call, device_name
from build import Run
from runtime import distributed, memory
from settings import Settings
from train import update

TINY = model_file.Config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


def make_sequences(settings, vocabulary):
    """A rollout's sequences: random tokens, advantages of both signs in every group."""
    chance = random.Random(0)

    def tokens(count):
        return [chance.randrange(vocabulary) for _ in range(count)]

    sequences = []
    for group in range(settings.prompts):
        prompt = tokens(settings.max_prompt_tokens)
        for number in range(settings.samples):
            completion = tokens(settings.max_new_tokens)
            logprobs = [-11.9] * len(completion)
            advantage = 1.0 if number % 2 else -1.0
            sequences.append(Sequence(prompt, completion, logprobs, advantage, group))
    return sequences


def bench_shape(name, config, settings, device, rounds):
    """Rows of one shape; all variants train the same model, one after the other."""
    model = distributed.shard(model_file.random_model(config, std=0.02), device)
    optimizer = make_optimizer(model)
    sequences = make_sequences(settings, config.vocab_size)
    chosen, _ = memory.fit(config, settings, device)
    smaller = replace(chosen, token_budget=min(16_384, chosen.token_budget))
    variants = {
        "as the plan says": chosen,
        "16,384 tokens": smaller,
        "16,384, computed twice": replace(smaller, gradient_checkpointing=True),
        "prompts not shared": replace(chosen, share_prompts=False),
    }

    nothing = dict.fromkeys("folder language tokenizer tokenizer_folder sampler judge".split())
    nothing |= {"curriculum": None, "held_out": [], "peak_flops": memory.peak_flops(device)}
    rows = []
    for label, variant in variants.items():
        model.gradient_checkpointing = variant.gradient_checkpointing
        run = Run(variant, device, model=model, optimizer=optimizer, **nothing)
        rows.append({"shape": name, "update": label} | measure(run, sequences, rounds))
    return rows


def measure(run, sequences, rounds):
    """Cold and warm seconds, MFU and peak memory of updates on the same sequences."""
    cuda = run.device.type == "cuda"
    calls = []
    for number in range(1 + rounds):
        if cuda and number:
            torch.cuda.reset_peak_memory_stats()
        calls.append(call(lambda: update(run, 1, sequences)))

    timing = Timing([one.wall for one in calls])
    tokens = calls[-1].result["num_train_tokens"]
    parameters = sum(p.numel() for p in run.model.parameters())
    plan = memory.plan(run.model.config, run.settings, 1, cuda)
    return {
        "token_budget": run.settings.token_budget,
        "computed_twice": run.settings.gradient_checkpointing,
        "tokens": tokens,
        **timing.columns(),
        "mfu": 6 * parameters * tokens / timing.warm / run.peak_flops,
        "planned_gb": sum(plan.values()) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def line(row):
    peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-"
    twice = "twice" if row["computed_twice"] else "once"
    return (
        f"{row['shape']:>6} {row['update']:<24} {row['token_budget']:>7,} {twice:>6}"
        f" {row['tokens']:>10,.0f} {row['cold_s']:>8.3f} {row['warm_s']:>8.3f}"
        f" {row['spread_s']:>8.3f} {row['mfu']:>6.3f} {row['planned_gb']:>8.1f} {peak:>7}"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", default="0.5B,1.5B")
    parser.add_argument("--rounds", type=int, default=3, help="warm updates of each row")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    options = parser.parse_args(arguments)

    device = distributed.setup()
    if device.type == "cpu" and not options.smoke:
        raise SystemExit(
            "python -m bench update needs a CUDA GPU; --smoke runs tiny shapes on this machine"
        )
    work = dict(prompts=16, samples=16, max_prompt_tokens=512, max_new_tokens=256)
    if options.smoke:
        work = dict(prompts=2, samples=4, max_prompt_tokens=12, max_new_tokens=6)

    print(f"{device_name()}, torch {torch.__version__}")
    print(
        f"{'shape':>6} {'update':<24} {'budget':>7} {'layers':>6} {'tokens':>10} {'cold s':>8}"
        f" {'warm s':>8} {'spread':>8} {'MFU':>6} {'plan GB':>8} {'peak GB':>7}"
    )
    rows = []
    for name in ["smoke"] if options.smoke else options.shapes.split(","):
        config = TINY if options.smoke else memory.qwen(name)
        for row in bench_shape(name, config, Settings(**work), device, options.rounds):
            rows.append(row)
            print(line(row), flush=True)
    print(json.dumps({"device": device_name(), "torch": torch.__version__, "rows": rows}))
    distributed.finish()


if __name__ == "__main__":
    main()
