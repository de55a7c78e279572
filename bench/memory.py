"""python -m bench.memory: BENCHMARKS.md's tables of memory and network, from shapes alone.

The settings are those of recipes/gsm8k.toml. runtime/memory.py plans the memory; a step of the
network's table has 256 samples of 1,024 tokens on each rank.
"""

from dataclasses import replace

from runtime import memory
from runtime.memory import GB
from settings import RECIPES, Settings, read_recipe

MEMORY_ROWS = (
    ("0.5B", 1),
    ("1.5B", 1),
    ("3B", 1),
    ("3B", 8),
    ("7B", 8),
    ("14B", 16),
    ("32B", 64),
)
NETWORK_ROWS = (("7B", 8), ("7B", 64), ("14B", 16), ("32B", 64))
STEP_SAMPLES = 256  # on each rank
STEP_TOKENS = STEP_SAMPLES * 1024
CARD = 80e9  # bytes


def memory_table(settings):
    """Lines of the table: bytes of a rank by what they are for."""
    columns = ("model", "ranks", "tokens a micro-batch", "masters + gradients + optimizer")
    columns += ("weights in 16 bits", "activations", "loss", "in all", "left of 80 GB")
    lines = heading(*columns)
    for size, ranks in MEMORY_ROWS:
        config = memory.qwen(size)
        found = memory.fitted(config, settings, ranks, CARD)
        parts = memory.plan(config, found, ranks, cuda=True)
        total = sum(parts.values())
        copies = ("gathered", "model", "sampler")
        values = [parts["masters"] + parts["gradients"] + parts["optimizer"]]
        values += [sum(parts.get(name, 0) for name in copies)]
        values += [parts["activations"], parts["loss"], total, CARD - total]
        gigabytes = " | ".join(f"{value / GB:.1f}" for value in values)
        twice = ", computed twice" if found.gradient_checkpointing else ""
        tokens = f"{memory.micro_batch_tokens(found, ranks):,}{twice}"
        lines.append(f"| {size} | {ranks} | {tokens} | {gigabytes} |")
    return lines


def network_table(settings):
    """Lines of the table: what a rank sends and receives in a step, and how long that takes."""
    lines = heading(
        "model",
        "ranks",
        "micro-batches a rank",
        "GB through each rank's links",
        "seconds at 50 GB/s",
        "seconds of arithmetic at 400 TFLOP/s",
    )
    for size, ranks in NETWORK_ROWS:
        config = memory.qwen(size)
        step = replace(settings, prompts=ranks * STEP_SAMPLES // settings.samples)
        budget = memory.fitted(config, step, ranks, CARD).token_budget
        passes = -(-STEP_TOKENS // budget)
        everything, _, _ = memory.parameters(config)
        sent = network_bytes(everything, passes, ranks)
        flops = 8 * everything * STEP_TOKENS  # 8, not 6: the forward is made twice
        seconds = f"{sent / 50e9:.1f} | {flops / 400e12:.1f}"
        lines.append(f"| {size} | {ranks} | {passes} | {sent / GB:.0f} | {seconds} |")
    return lines


def network_bytes(parameters, passes, ranks):
    """What one rank sends and receives in a step.

    Per micro-batch two gathers in 16 bits and a reduction in fp32, and once the sampler's weights
    from fp32. 7.6e9 parameters, 16 passes, 8 ranks -> 8.8e11 bytes.
    """
    per_parameter = passes * (2 + 2 + 4) + 4
    return per_parameter * parameters * (ranks - 1) / ranks


def heading(*columns):
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]


def main():
    settings = Settings(**read_recipe(RECIPES / "gsm8k.toml"))
    for line in [*memory_table(settings), "", *network_table(settings)]:
        print(line)


if __name__ == "__main__":
    main()
