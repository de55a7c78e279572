"""The curve of one or more runs from their own files: python -m bench.plot runs/A runs/B ... --out curve.svg

Pass rate of the training samples per step as lines, held-out pass@1 of every evaluation as dots. A picture when matplotlib is installed, else lines of text.
With few prompts per step the lines are noise: --mean 10 draws the mean of the last ten steps.
"""

import argparse
import json
import sys
from pathlib import Path

BARS = " ▁▂▃▄▅▆▇█"


def read(folder):
    """(pass rates by step, {step: held-out pass@1}) of a run; step 0 comes from eval/step_0.jsonl."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        sys.exit(f"{folder} is no run folder (it has no metrics.jsonl)")
    held_out = {}
    for path in (folder / "eval").glob("step_*.jsonl"):
        verdicts = [json.loads(line)["correct"] for line in path.read_text().splitlines()]
        held_out[int(path.stem.removeprefix("step_"))] = sum(verdicts) / max(1, len(verdicts))
    rate = {row["step"]: row.get("pass_rate", row.get("reward")) for row in rows}
    return {step: r for step, r in rate.items() if r is not None}, dict(sorted(held_out.items()))


def text(folder, rates, held_out):
    """One run in two lines."""
    top = max(1e-9, *rates.values())
    bars = "".join(BARS[round(max(0.0, r) / top * (len(BARS) - 1))] for r in rates.values())
    evaluations = "  ".join(f"step {step}: {value:.3f}" for step, value in held_out.items())
    return f"{folder.name:<20} pass rate {bars} (top {top:.3f})\n{'':<20} held-out pass@1  {evaluations}"


def running_mean(rates, count):
    """{step: mean of this and the count - 1 steps before}, from the first step that has so many: {1: 0, 2: 1, 3: 0}, 2 -> {2: 0.5, 3: 0.5}."""
    steps = list(rates)
    return {
        steps[i]: sum(rates[step] for step in steps[i + 1 - count : i + 1]) / count
        for i in range(count - 1, len(steps))
    }


def picture(runs, out):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rarecode"  # the same file for the same data
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for folder, rates, held_out in runs:
        (line,) = axes.plot(list(rates), list(rates.values()), linewidth=1, label=folder.name)
        axes.plot(
            list(held_out),
            list(held_out.values()),
            "o--",
            color=line.get_color(),
            markersize=5,
            linewidth=0.6,
        )
    axes.set(xlabel="step", ylabel="pass rate (line), held-out (dots)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curve.svg"))
    parser.add_argument(
        "--mean", type=int, default=1, help="steps that a point of a line is the mean of"
    )
    options = parser.parse_args()
    runs = [
        (folder, running_mean(rates, options.mean), held_out)
        for folder, (rates, held_out) in ((folder, read(folder)) for folder in options.runs)
    ]
    for run in runs:
        print(text(*run))
    try:
        picture(runs, options.out)
        print(f"wrote {options.out}")
    except ImportError:
        print("no picture: pip install matplotlib")


if __name__ == "__main__":
    main()
