"""The table of bench/gpu.sh, from the logs of its stages.

    python -m bench.gpu FOLDER

A stage that failed or ran out of time has one row that says so; what it printed is in its log.
"""

import json
import sys
from pathlib import Path

from bench import predict

COLUMNS = ("stage", "what", "cold s", "warm s", "result", "target", "predicted")
# What is aimed at, on one H200: stage, what -> text.
TARGETS = {
    ("sampler", "0.5B GRPO"): "45 % of the roofline",
    ("sampler", "0.5B nano-vllm"): "42 % of the roofline",
    ("sampler", "0.5B GRPO, exact"): "15 % slower",
    ("sampler_135M", "135M run"): "0.6 s",
    ("update", "0.5B, as the plan says"): "MFU 0.42",
    ("update", "1.5B, as the plan says"): "MFU 0.45",
    ("step_135M", "135M, prompts shared"): "1.1 s",
}


def stage_rows(name, log):
    """Rows of the table from what a stage printed: (what, cold s, warm s, result) each."""
    lines = log.strip().splitlines()
    if name == "tests":
        return [("pytest", None, None, lines[-1].strip("= "))]
    found = json.loads(lines[-1])
    rows = []
    for row in found["rows"]:
        rows.append(row_of(row))
    return [row for row in rows if row]


def row_of(row):
    """One row of a bench's JSON; None for what the table leaves out."""
    if "update" in row:
        peak = f", peak {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
        text = f"MFU {row['mfu']:.3f}{peak} of {row['planned_gb']:.1f} planned"
        return f"{row['shape']}, {row['update']}", row["cold_s"], row["warm_s"], text

    if "workload" in row:
        share = row["tok_s"] / row["roofline_tok_s"]
        text = f"{row['tok_s']:,.0f} tokens/s, {share:.0%} of the roofline"
        return named(row, row["workload"]), row["cold_s"], row["warm_s"], text

    if "batch" in row:
        what = f"step of {row['batch']} rows, {row['samples_per_prompt']} a prompt"
        text = f"{row['warm_s'] / row['floor_s']:.2f} of the floor"
        return named(row, what), row["cold_s"], row["warm_s"], text

    if "gap" in row:
        text = f"log-prob gap: mean {row['mean']:.1e}, largest {row['max']:.1e}"
        return named(row, row["gap"]), None, None, text

    if "warm" in row:  # a step, or TRL's
        what = row["shape"]
        text = ""
        if "mfu" in row:
            what += ", prompts shared" if row["share_prompts"] else ", prompts not shared"
            parts = ("generate", "update")
            text = ", ".join(f"{part} {row['warm'][part]:.2f} s" for part in parts)
        return what, row["cold"]["step"], row["warm"]["step"], text

    if "kernel" in row:
        ours = row["ours"]
        what = f"{row['model']} {row['kernel']}, {row['size']}"
        if "failed" in ours:
            return what, None, None, ours["failed"]
        text = f"{1e3 * ours['median']:.1f} us"
        if row["floor"]:
            text += f", {ours['median'] / row['floor']:.2f} of the floor ({row['target']})"
        return what, ours["first_call"] / 1e3, ours["median"] / 1e3, text
    return None


def named(row, what):
    """With the model's name, unless the workload says it."""
    model = row["model"]
    return what if what.startswith(model) else f"{model} {what}"


def predictions():
    """what -> text, of the rows that bench/predict.py knows for this code."""
    found = {}
    for name, rate, _ in predict.rollout_rows():
        if name.endswith(", the code as it is"):
            found[name.removesuffix(", the code as it is")] = f"{rate:,.0f} tokens/s"
    for name, mfu, _ in predict.update_rows():
        if name.endswith("the code as it is"):
            shape = name.partition(",")[0]
            found[f"{shape}, as the plan says"] = f"MFU {mfu:.2f}"
    return found


def table(folder):
    """Lines of the table."""
    predicted = predictions()
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for text in (folder / "stages").read_text().splitlines():
        stage, status, seconds = text.split()
        try:
            log = (folder / f"{stage}.log").read_text() if status != "skipped" else ""
            rows = stage_rows(stage, log)
        except (ValueError, IndexError, KeyError):  # no last line of JSON: it did not finish
            rows = []
        if status != "0":
            why = {"124": "out of time", "137": "out of time", "skipped": "no time was left"}
            said = why.get(status, f"exit status {status}")
            rows.append(("the stage", None, None, f"{said} after {seconds} s: {stage}.log"))

        for what, cold, warm, result in rows:
            times = [f"{time:.3g}" if time is not None else "" for time in (cold, warm)]
            target = TARGETS.get((stage, what), "")
            cells = (stage, what, *times, result, target, predicted.get(what, ""))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments):
    if len(arguments) != 1 or not (Path(arguments[0]) / "stages").exists():
        raise SystemExit("usage: python -m bench.gpu FOLDER, the OUT of bench/gpu.sh")
    print("\n".join(table(Path(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
