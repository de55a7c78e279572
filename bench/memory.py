"""python -m bench.memory: BENCHMARKS.md's tables of memory and network, from shapes alone.

The settings are those of recipes/gsm8k.toml. runtime/memory.py plans the memory; a step of the
network's table has 256 samples of 1,024 tokens on each rank.
"""

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
STEP_TOKENS = 256 * 1024  # on each rank


def memory_table(settings):
    """Lines of the table: bytes of a rank by what they are for."""
    columns = ("model", "ranks", "masters + gradients + optimizer", "gathered", "activations")
    lines = heading(*columns, "loss", "sampler", "in all", "left of 80 GB")
    for size, ranks in MEMORY_ROWS:
        parts = memory.plan(memory.qwen(size), settings, ranks, cuda=True)
        total = sum(parts.values())
        values = [parts["masters"] + parts["gradients"] + parts["optimizer"]]
        values += [parts[name] for name in ("gathered", "activations", "loss", "sampler")]
        values += [total, 80e9 - total]
        gigabytes = " | ".join(f"{value / GB:.1f}" for value in values)
        lines.append(f"| {size} | {ranks} | {gigabytes} |")
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
    passes = STEP_TOKENS // settings.token_budget
    for size, ranks in NETWORK_ROWS:
        config = memory.qwen(size)
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
