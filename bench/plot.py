"""The curve of one or more runs from their own files.

    python -m bench.plot runs/A runs/B ... --out curve.svg

Pass rate of the training samples per step as lines, held-out pass@1 of every evaluation as dots. A
picture when matplotlib is installed, and lines of text. With few prompts per step the lines are
noise: --mean 10 draws the mean of the last ten steps.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Curve:
    """What is drawn of one run, each by step."""

    name: str
    rates: dict[int, float]  # pass rate of the training samples
    held_out: dict[int, float]  # pass@1; step 0 is the evaluation before training


def read(folder, mean=1):
    """The Curve of a run folder. mean: steps that a point of its line is the mean of."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        sys.exit(f"{folder} is not a run folder (it has no metrics.jsonl)")
    rates = {}
    for row in map(json.loads, lines):
        rate = row.get("pass_rate", row.get("reward"))
        if rate is not None:
            rates[row["step"]] = rate

    held_out = {}
    for path in (folder / "eval").glob("step_*.jsonl"):
        samples = map(json.loads, path.read_text().splitlines())
        correct = [row["correct"] for row in samples if row["status"] != "sandbox_error"]
        held_out[int(path.stem.removeprefix("step_"))] = sum(correct) / max(1, len(correct))
    return Curve(folder.name, running_mean(rates, mean), dict(sorted(held_out.items())))


def running_mean(rates, count):
    """{step: mean of this and the count - 1 steps before}, from the first step that has so many.

    {1: 0, 2: 1, 3: 0} and 2 -> {2: 0.5, 3: 0.5}.
    """
    steps = list(rates)
    means = {}
    for i in range(count - 1, len(steps)):
        window = steps[i + 1 - count : i + 1]
        means[steps[i]] = sum(rates[step] for step in window) / count
    return means


def text(curve):
    """One run in two lines."""
    top = max([1e-9, *curve.rates.values()])
    bars = ""
    for rate in curve.rates.values():
        bars += BARS[round(max(0.0, rate) / top * (len(BARS) - 1))]
    evaluations = "  ".join(f"step {step}: {rate:.3f}" for step, rate in curve.held_out.items())
    return (
        f"{curve.name:<20} pass rate {bars} (top {top:.3f})\n"
        f"{'':<20} held-out pass@1  {evaluations}"
    )


def picture(curves, out):
    """Draw all runs into one file. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rarecode"  # the same file for the same data
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for curve in curves:
        (line,) = axes.plot(
            list(curve.rates), list(curve.rates.values()), linewidth=1, label=curve.name
        )
        axes.plot(
            list(curve.held_out),
            list(curve.held_out.values()),
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
    curves = [read(folder, options.mean) for folder in options.runs]

    for curve in curves:
        print(text(curve))
    try:
        picture(curves, options.out)
        print(f"wrote {options.out}")
    except ImportError:
        print("no picture: pip install matplotlib")


if __name__ == "__main__":
    main()
