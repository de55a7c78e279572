"""What one H200 should need for a rollout and an update, from shapes and a few measured constants.

    python -m bench.predict            table: predicted beside measured, and predictions for the
                                       sampler as it is with 1,024 slots
    python -m bench.predict --json     the same, one JSON object per line

A rollout is its schedule: rows are filled, decoded a few steps at a time, and refilled at every
look. A step is a sum over its kernels, each of them a start and the larger of reading and
arithmetic. The constants below were read from one NVIDIA H200 (26 November 2026, commit 73dc1a7,
torch 2.11, triton 3.6): those of kernels from traces and from sweeps of single steps, the host's
from the first and the third rollout of the table, the update's waits from its first four rows.
The other measured rows are no input.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass, replace

import numpy as np

from model import Config
from runtime.memory import parameters, qwen

# Ceilings of the same run: bytes/s of a copy, operations/s of a bf16 product.
BANDWIDTH = 4.25e12
RATE = 680e12
PEAK = 989e12  # the data sheet's rate, for MFU
L2_BANDWIDTH = 2.5 * BANDWIDTH  # what several rows read of one prompt
US = 1e-6

# Every matrix product of a step takes so long to get going (64 rows: 4.2 us for a floor of 0.5).
PRODUCT_START = 4.0 * US
# The head with the draw, over its floor: reading the weight, arithmetic.
HEAD_READING = 1.2
HEAD_ARITHMETIC = 1.45
# Norms, rotation, SwiGLU, merge: a start each, then their bytes.
ROW_KERNEL = 1.4 * US
MERGE_HEAD = 0.93e-9  # of one query head of one row
# Attention: a start, then a wave of programs takes 2.5 us more than its bytes.
WAVE = 2.5 * US
MULTIPROCESSORS = 132
# The same tokens in rows of unequal length, or in groups that have lost rows: 1.73 / 1.34 of the
# floor at 256 x 1,024.
RAGGED = 1.29
SPLIT = 256  # tokens of one program
PAGE = 128  # tokens; whole ones are shared
# The kernel of shared prefixes, which a step paid whether or not anything was shared.
PREFIX_BUSY = 10.5 * US
PREFIX_ROW = 18.7e-9  # of one KV head of one row
# Between two kernels of a CUDA graph.
GAP = 0.23 * US

# Host: one launch outside a graph; one look that finds dead rows; one look that starts rows (0.44 s
# for 165 and 53 of them, 0.31 s for 124 and 1).
LAUNCH = 40 * US
LAUNCHES_OF_A_LAYER = 15.6
FINISHED_LOOK = 2.4e-3
STARTED_LOOK = 0.8e-3
PREFILL_RATE = 396e12  # operations/s of the body's products, attention and the rest included

# Training. Products run at RATE. Flash attention at head dim 64; elementwise kernels move 1.8
# times the bytes that they have to.
FLASH_RATE = 158e12
ELEMENTWISE = 1.8
FSDP = 22e-3  # copies, casts and reductions of 0.49e9 parameters on one rank
PARAMETERS_OF_FSDP = 494e6
# What the host makes the GPU wait: once an update, and at every micro-batch of 24 layers.
UPDATE_WAIT = 40e-3
MICRO_BATCH_WAIT = 50e-3

SMOLLM = dict(
    model_type="qwen2",
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Code:
    """What the sampler does, as far as its time depends on it. The defaults: commit 73dc1a7, whose
    figures were measured."""

    slots: int = 512
    look: int = 8  # steps between two looks
    late: int = 0  # looks by which the host is behind: so long an ended row still runs
    prefix_kernel: bool = True
    merges_one_split: bool = True  # a row's only partial result goes through the merge, too
    programs: int = 4  # of attention on one multiprocessor
    host_is_hidden: bool = False  # nobody waits for a look
    least_started: int = 1  # rows that a prefill waits for
    step_kernels: int = 38  # outside the layers
    step_kernel: float = 2.2 * US


# The sampler as it is: sampler.py's chunk and lag, all slots that it takes, a prefill for 1/16 of
# them; kernels/attention.py without a prefix kernel (programs: `python -m bench.aot`); outside the
# layers the first kernel, the embedding, the last norm, the draw and the choice.
PRESENT = Code(
    slots=1024,
    look=8,
    late=1,
    prefix_kernel=False,
    merges_one_split=False,
    programs=6,
    host_is_hidden=True,
    least_started=64,
    step_kernels=5,
)


@dataclass(frozen=True)
class Sample:
    """One row of a workload, with all tokens that it will have."""

    prompt: int  # number of its prompt
    prompt_tokens: int
    tokens: int


def shape_config(name):
    """Config of 0.5B, 1.5B, ... or 135M."""
    return Config.from_dict(SMOLLM) if name == "135M" else qwen(name)


# ---- workloads ----


def ragged(prompts, samples, prompt_tokens, longest, mean, seed=0):
    """Samples that end with probability 1 / mean at every token, at `longest` at the latest."""
    chance = np.random.default_rng(seed)
    lengths = np.minimum(chance.geometric(1 / mean, prompts * samples), longest)
    return [Sample(i // samples, prompt_tokens, int(n)) for i, n in enumerate(lengths)]


def nano_vllm():
    """nano-vllm's own bench: 256 requests of 100 to 1,024 tokens in and out, as bench.sampler's."""
    chance = random.Random(0)
    for _ in range(64 * 512):  # bench.sampler draws the prompts of the other workload first
        chance.randrange(151_936)
    rows = []
    for i in range(256):
        length = chance.randint(100, 1024)
        for _ in range(length):
            chance.randrange(151_936)
        rows.append(Sample(i, length, chance.randint(100, 1024)))
    # The sampler starts the longest first.
    return sorted(rows, key=lambda row: (-row.tokens, -row.prompt_tokens))


# ---- a rollout ----


def rollout_seconds(config, samples, code):
    """Seconds of sampling `samples` in their order, with everything warm."""
    queue = list(reversed(samples))
    running = []
    done = np.zeros(0, dtype=np.int64)
    prefilled = set()
    seconds = 0.0

    while queue or running:
        # Refill.
        free = min(code.slots - len(running), len(queue))
        if free >= code.least_started or (free and not running):
            started = [queue.pop() for _ in range(free)]
            running += started
            done = np.concatenate([done, np.zeros(free, dtype=np.int64)])
            new = {row.prompt: row.prompt_tokens for row in started if row.prompt not in prefilled}
            prefilled |= new.keys()
            seconds += prefill_seconds(config, sum(new.values()), code)
            seconds += 0 if code.host_is_hidden else STARTED_LOOK

        # A few steps, half way through them for the mean context. What has ended sees nothing.
        contexts = np.array([row.prompt_tokens for row in running]) + done + code.look // 2
        contexts[done >= np.array([row.tokens for row in running])] = 0
        shared = {row.prompt: (row.prompt_tokens - 1) // PAGE * PAGE for row in running}
        has_groups = len(shared) < len(running)
        prompts = sum(shared.values()) if has_groups else 0
        seconds += code.look * step_seconds(config, contexts, prompts, len(shared), code)

        # Look.
        done = done + code.look
        lives = done < np.array([row.tokens + code.late * code.look for row in running])
        if not lives.all():
            seconds += 0 if code.host_is_hidden else FINISHED_LOOK
        running = [row for row, alive in zip(running, lives) if alive]
        done = done[lives]
    return seconds


def prefill_seconds(config, tokens, code):
    """One packed pass over prompts: the GPU's work, or the host's launches if they take longer."""
    if not tokens:
        return 0.0
    everything, _, ends = parameters(config)
    work = 2 * (everything - ends) * tokens / PREFILL_RATE
    launches = LAUNCHES_OF_A_LAYER * config.num_hidden_layers * LAUNCH
    return work if code.host_is_hidden else max(work, launches)


def step_seconds(config, contexts, prompts, groups, code, even=False):
    """One decode step as a CUDA graph.

    contexts: [rows] tokens that each row sees, 0 where it has ended.
    prompts: tokens of the pages that rows share, once each; 0 when every row has its own.
    groups: how many prompts there are.
    even: all rows are equally long and all groups whole, as in a benchmark of steps.
    """
    live = len(contexts)
    rows = live if live <= 32 else -(-live // 64) * 64  # a graph's size
    hidden, inter = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = heads * config.head_dim
    qkv = width + 2 * kv_heads * config.head_dim

    matrices = (hidden * qkv, width * hidden, 2 * hidden * inter, inter * hidden)
    layer = sum(PRODUCT_START + product_floor(weights, rows) for weights in matrices)
    # Two norms, the rotation with its page write, SwiGLU: values read and written.
    for values in (4 * hidden, 4 * hidden, 2 * qkv, 3 * inter):
        layer += ROW_KERNEL + 2 * values * rows / BANDWIDTH
    merged = rows if code.merges_one_split else int((contexts > SPLIT).sum())
    layer += ROW_KERNEL + MERGE_HEAD * heads * merged
    kernels = 4 + 4 + 2

    # Keys and values: what the kernel reads from memory, and again from L2 for the other rows.
    token_bytes = 4 * kv_heads * config.head_dim
    read = int(contexts.sum())
    once = read
    splits = np.ceil(contexts / SPLIT).sum()
    if prompts:
        own = read - prompts * np.count_nonzero(contexts) / groups
        once = own + prompts
        if code.prefix_kernel:
            read = once = own
            splits -= prompts / groups // SPLIT * live  # a row's own tokens begin within a split
    attention = WAVE * (1 + splits * kv_heads / (code.programs * MULTIPROCESSORS))
    attention += token_bytes * (once / BANDWIDTH + (read - once) / L2_BANDWIDTH)
    if code.prefix_kernel:
        empty = 1.5 * US + PREFIX_ROW * kv_heads * rows
        attention += max(empty, PREFIX_BUSY) if prompts else empty
        kernels += 1
    layer += attention if even else RAGGED * attention

    launches = config.num_hidden_layers * kernels + code.step_kernels
    return (
        config.num_hidden_layers * layer
        + head_seconds(config, rows)
        + code.step_kernels * code.step_kernel
        + launches * GAP
    )


def product_floor(weights, rows):
    return max(2 * weights / BANDWIDTH, 2 * weights * rows / RATE)


def head_seconds(config, rows):
    weights = config.vocab_size * config.hidden_size
    reading = HEAD_READING * 2 * weights / BANDWIDTH
    return max(reading, HEAD_ARITHMETIC * 2 * weights * rows / RATE)


# ---- an update ----


@dataclass(frozen=True)
class Update:
    """One optimizer step over prompts x samples sequences. The defaults: commit 73dc1a7."""

    prompts: int = 16
    samples: int = 16
    prompt_tokens: int = 512
    new_tokens: int = 256
    budget: int = 16_384
    checkpointing: bool = True
    share_prompts: bool = True
    fsdp: bool = True
    waits: bool = True  # the host packs between micro-batches and reads sums inside them
    fused_rotation: bool = False  # bias and rotation in one kernel

    @property
    def sequences(self):
        return self.prompts * self.samples

    @property
    def tokens(self):
        """Through the model."""
        copies = self.prompts if self.share_prompts else self.sequences
        return copies * self.prompt_tokens + self.sequences * self.new_tokens

    @property
    def pairs(self):
        """Query and key that see each other, of one head."""
        new = self.new_tokens * (self.prompt_tokens + self.new_tokens / 2)
        copies = self.prompts if self.share_prompts else self.sequences
        return copies * self.prompt_tokens**2 / 2 + self.sequences * new


def update_seconds(config, update):
    """Seconds of gradient, clipping and optimizer step, with everything warm."""
    everything, _, ends = parameters(config)
    layers = config.num_hidden_layers
    hidden, inter = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    qkv = width + 2 * config.num_key_value_heads * config.head_dim

    # Forward 1, backward 2, and 1 more where the forward is made again.
    again = 1 if update.checkpointing else 0
    body = 2 * (3 + again) * (everything - ends) * update.tokens
    head = 8 * config.vocab_size * hidden * update.sequences * update.new_tokens
    # Flash forward 1, backward 2.5.
    attention = 4 * (3.5 + again) * width * update.pairs * layers

    # Values that elementwise kernels read or write of a token in a layer.
    forward = 3 * inter + 8 * hidden + 6 * qkv
    backward = 5 * inter + 8 * hidden + (4 if update.fused_rotation else 12) * qkv
    moved = (1 + again) * forward + backward
    seconds = (body + head) / RATE + attention / FLASH_RATE
    seconds += ELEMENTWISE * 2 * moved * update.tokens * layers / BANDWIDTH

    # AdamW: gradient, weight and moments read, the last three written.
    seconds += 28 * everything / BANDWIDTH
    if update.fsdp:
        seconds += FSDP * everything / PARAMETERS_OF_FSDP
    if update.waits:
        micro_batches = -(-update.tokens // update.budget)
        wait = MICRO_BATCH_WAIT if update.fsdp else 0.6 * MICRO_BATCH_WAIT
        wait *= (1 + again / 3) * layers / 24
        seconds += UPDATE_WAIT + micro_batches * wait
    return seconds


def mfu(config, update, seconds):
    """6 operations per parameter and token, of the data sheet's rate."""
    return 6 * parameters(config)[0] * update.tokens / seconds / PEAK


# ---- the table ----


def rollout_rows():
    """(what, tokens/s predicted, measured or None)."""
    half = qwen("0.5B")
    small = shape_config("135M")
    grpo = ragged(64, 16, 512, 1024, 400)
    nano = nano_vllm()
    run = ragged(64, 16, 400, 256, 110)
    measured = Code()

    cases = [
        ("0.5B GRPO, 512 slots", half, grpo, measured, 81_900),
        ("0.5B GRPO, 512 slots, look 32", half, grpo, replace(measured, look=32), 91_792),
        ("0.5B GRPO, 1,024 slots", half, grpo, replace(measured, slots=1024), 103_491),
        (
            "0.5B GRPO, 1,024 slots, look 32",
            half,
            grpo,
            replace(measured, slots=1024, look=32),
            107_722,
        ),
        ("0.5B nano-vllm", half, nano, measured, 51_565),
        (
            "0.5B nano-vllm, no prefix kernel, look 32",
            half,
            nano,
            replace(measured, prefix_kernel=False, look=32),
            63_157,
        ),
        ("135M run, 256 slots", small, run, replace(measured, slots=256), 46_874),
        ("135M run, 1,024 slots", small, run, replace(measured, slots=1024), 107_137),
        ("0.5B GRPO, the code as it is", half, grpo, PRESENT, None),
        ("0.5B nano-vllm, the code as it is", half, nano, PRESENT, None),
        ("135M run, the code as it is", small, run, PRESENT, None),
    ]
    rows = []
    for name, config, samples, code, found in cases:
        tokens = sum(sample.tokens for sample in samples)
        rows.append((name, tokens / rollout_seconds(config, samples, code), found))
    return rows


def update_rows():
    """(what, MFU predicted, measured or None)."""
    half = qwen("0.5B")
    base = Update()
    whole = replace(base, budget=65_536, checkpointing=False)
    ahead = replace(whole, waits=False)
    alone = replace(ahead, fsdp=False, fused_rotation=True)
    long = replace(alone, budget=41_984)
    cases = [
        ("0.5B, 16,384 tokens, checkpointing", half, base, 0.202),
        ("0.5B, 65,536, checkpointing", half, replace(base, budget=65_536), 0.270),
        ("0.5B, 16,384", half, replace(base, checkpointing=False), 0.264),
        ("0.5B, 65,536", half, whole, 0.328),
        ("0.5B, 65,536, no FSDP", half, replace(whole, fsdp=False), 0.359),
        ("0.5B, 65,536, prompts not shared", half, replace(whole, share_prompts=False), 0.457),
        ("0.5B, 65,536, nothing waits", half, ahead, None),
        ("0.5B, 65,536: the code as it is", half, alone, 0.406),
        ("1.5B, 41,984: the code as it is", qwen("1.5B"), long, 0.502),
    ]
    return [(n, mfu(c, u, update_seconds(c, u)), found) for n, c, u, found in cases]


def error(predicted, measured):
    """Share by which a prediction is off; None where nothing was measured."""
    return None if measured is None else predicted / measured - 1


def table(title, rows, text):
    lines = [f"| {title} | predicted | measured | off by |", "| --- | --- | --- | --- |"]
    for name, predicted, measured in rows:
        found = "not measured" if measured is None else text(measured)
        off = "" if measured is None else f"{100 * error(predicted, measured):+.0f} %"
        lines.append(f"| {name} | {text(predicted)} | {found} | {off} |")
    return lines


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(arguments)

    rollouts, updates = rollout_rows(), update_rows()
    if options.json:
        for kind, rows in (("tokens/s", rollouts), ("mfu", updates)):
            for name, predicted, measured in rows:
                row = {"case": name, "unit": kind, "predicted": predicted, "measured": measured}
                print(json.dumps(row))
        return
    print("\n".join(table("rollout, warm, tokens/s", rollouts, "{:,.0f}".format)))
    print()
    print("\n".join(table("update, MFU (16 x 16, 512 + 256 tokens)", updates, "{:.3f}".format)))


if __name__ == "__main__":
    sys.exit(main())
