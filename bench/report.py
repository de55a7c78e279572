"""A run as one page: report.html, which opens from disk and needs nothing else.

    python -m bench.report runs/A                  writes runs/A/report.html
    python -m bench.report runs/A runs/B ...       several runs or seeds in one page, in the first's
                                                   folder, or --out FILE

Curves with intervals, the settings and where each comes from, held-out problems before and after,
samples of any step. train.py writes it at the end of every run; it can be made at any time.

run folder -> read_run: what the page shows, thinned -> encode: JSON without "<" -> the template
beside this file (HTML, CSS, JavaScript), which shows texts as texts: what a model wrote never runs.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from runtime.logs import replace
from settings import EARLIER, Settings
from tasks.statistics import changes, figure_rows, per_problem, rate_with_interval, side_by_side

TEMPLATE = Path(__file__).with_suffix(".html")
DATA = "{{DATA}}"  # the place of the JSON in the template
MOST_BYTES = 5_000_000  # of a page
TEXT_BYTES = 3_200_000  # of them for samples and problems of all runs
CURVE_VALUES = 120_000  # of all curves of all runs, at about 8 bytes
MOST_POINTS = 400  # of one curve: a chart has about as many pixels
MOST_CHARACTERS = 4_000  # of one text
OWN = ("name", "seed", "wandb")  # settings in which seeds of one experiment differ
KINDS = ("greedy", "eval", "validation")  # folders of evaluations in the loop
COUNTED = {"id", "correct", "status"}  # what a row of an evaluation needs to be counted


# ---- the page ----


def report_page(folder):
    """Write a run's page -> a sentence that names it."""
    try:
        return f"The run as a page: {write_page([folder])}"
    except Exception as problem:  # a full disk, say: the run itself has ended well
        return f"No page of this run ({problem}); python -m bench.report {folder} tries again"


def write_page(folders, out=None):
    """Write the page of run folders -> its path. ValueError with one sentence for no run folder.

    out: the file; default report.html in the first folder.
    """
    folders = list(dict.fromkeys(map(Path, folders)))
    runs = [read_run(folder, TEXT_BYTES // len(folders)) for folder in folders]
    thin_curves(runs)
    known = [(setting.name, setting.metadata["help"]) for setting in fields(Settings)]
    page = {"settings": known, "runs": grouped(runs)}

    # The template is cut where the data goes: a text that holds the mark changes nothing.
    head, tail = TEMPLATE.read_text("utf-8").split(DATA)
    text = head + encode(page) + tail
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(runs)} runs do not fit in a page of 5 MB: give fewer of them")
    out = Path(out) if out else folders[0] / "report.html"
    replace(out, text)
    return out


def encode(value):
    """JSON that can stand in a <script>: ASCII, and no "<" that could end it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def grouped(runs):
    """Runs as JSON, with one group for the seeds of the same settings."""
    keys = []
    for run in runs:
        shared = {name: value for name, value in run.settings.items() if name not in OWN}
        keys.append(json.dumps(shared, sort_keys=True) if shared else run.folder)
    groups = list(dict.fromkeys(keys))
    return [asdict(run) | {"group": groups.index(key)} for run, key in zip(runs, keys)]


# ---- one run ----


@dataclass
class RunData:
    """What the page shows of one run."""

    folder: str
    name: str  # the folder below runs/
    starts: list[str]  # where the settings of each start come from
    settings: dict
    origins: dict[str, str]  # setting -> recipe, command line or --loss; the others: default
    steps: list[int]
    curves: dict[str, list]  # metric -> its value at each of `steps`, None where there is none
    kinds: dict[str, str]  # kind of evaluation -> how it samples
    evaluations: dict[str, list]  # kind -> [{step, figures: {pass@1: (rate, low, high)}}]
    changes: list[dict]  # the table before and after
    problems: dict[str, dict]  # kind -> held-out problems before and after
    samples: list[dict]
    notes: list[str]  # what is missing, and what was left out


def read_run(folder, room):
    """RunData of a folder; what is missing or half written is said in its notes.

    room: bytes for its problems and samples. ValueError when the folder has nothing of a run.
    """
    if not any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "eval")):
        raise ValueError(
            f"{folder} is not a run folder (it has no config.json, metrics.jsonl or eval/): "
            "runs are under runs/"
        )
    notes = []
    starts, settings, origins = read_settings(folder, notes)
    by_step = {}
    for name in ("metrics.jsonl", "times.jsonl"):
        for row in read_rows(folder / name, {"step"}, notes):
            by_step.setdefault(row["step"], {}).update(row)
    steps = sorted(by_step)
    ends, figures = read_evaluations(folder, notes)
    kinds = names_of_kinds(settings)
    table, problems = before_and_after(ends, kinds)
    return RunData(
        folder=str(folder),
        name=folder.as_posix().removeprefix("runs/"),
        starts=starts,
        settings=settings,
        origins=origins,
        steps=steps,
        curves=curves_of([by_step[step] for step in steps]),
        kinds=kinds,
        evaluations=figures,
        changes=table,
        problems=thin_problems(problems, room * 6 // 10, notes),
        samples=thin_samples(folder, room * 4 // 10, notes),
        notes=notes,
    )


def read_settings(folder, notes):
    """(where each start's settings come from, settings of the last start, origin of each)."""
    starts = []
    settings = {}
    origins = {}
    if (folder / "starts.jsonl").exists():  # not in runs of older versions
        for row in read_rows(folder / "starts.jsonl", {"from", "settings", "origins"}, notes):
            for name, origin in row["origins"].items():
                if origin != EARLIER or not starts:  # that start's own line knows more
                    origins[name] = origin
            starts.append(row["from"])
            settings = row["settings"]
    if not settings:
        try:
            settings = dict(json.loads((folder / "config.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            notes.append("config.json is missing or cannot be read, so the settings are not known")
    return starts, settings, origins


def read_rows(path, needed, notes):
    """Objects of a JSON-lines file that have what is needed; the others are counted in notes."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    rows = []
    unread = 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                row = json.loads(line)
            except ValueError:  # a killed run leaves half a line
                row = None
            whole = isinstance(row, dict) and needed <= row.keys()
            if whole and isinstance(row.get("step", 0), int):
                rows.append(row)
            else:
                unread += 1
    if unread:
        notes.append(f"lines of {path.name} that cannot be read: {unread}")
    return rows


def curves_of(rows):
    """{metric: values} of metrics.jsonl's and times.jsonl's rows, step by step."""
    names = dict.fromkeys(name for row in rows for name in row)
    curves = {}
    for name in names:
        values = [number(row.get(name)) for row in rows]
        if name != "step" and any(value is not None for value in values):
            curves[name] = values
    return curves


def number(value):
    """A finite number with five digits, else None (a rate of no sample is null)."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(f"{value:.5g}") if is_number else None


# ---- evaluations ----


def read_evaluations(folder, notes):
    """(rows of each kind's first and last evaluation by step, figures of all its evaluations).

    figures: {kind: [{step, figures: {pass@1: (rate, low, high)}}]}. The rows in between are not
    kept: a long run has gigabytes of them.
    """
    ends = {}
    figures = {}
    for kind in KINDS:
        paths = {}
        for path in (folder / kind).glob("step_*.jsonl"):
            step = path.stem.removeprefix("step_")
            if step.isdigit():
                paths[int(step)] = path
        for step in sorted(paths):
            rows = read_rows(paths[step], COUNTED, notes)
            for row in rows:
                row |= {"id": str(row["id"]), "correct": row["correct"] is True}
            if not per_problem(rows):
                continue

            counted = figure_rows(rows)
            rates = {name: rate_with_interval(counted[name]) for name in counted}
            figures.setdefault(kind, []).append({"step": step, "figures": rates})
            first_and_last = ends.setdefault(kind, {})
            if len(first_and_last) == 2:
                first_and_last.popitem()  # it is not the last one
            first_and_last[step] = rows
    return ends, figures


def names_of_kinds(settings):
    """{kind: how it samples}; what is not known of an old run is not said."""
    temperature = settings.get("eval_temperature")
    if temperature is None:
        return {kind: kind for kind in KINDS}
    name = f"at temperature {temperature:g}" if temperature else "greedy"
    return {"greedy": "greedy", "eval": name, "validation": f"validation, {name}"}


def before_and_after(ends, kinds):
    """(the table of changes, held-out problems side by side by kind): first and last evaluation."""
    table = []
    problems = {}
    for kind in ("greedy", "eval"):
        steps = list(ends.get(kind, {}))
        if len(steps) < 2:
            continue
        before, after = ends[kind].values()
        for figure, change in changes(before, after).items():
            table.append({"figure": f"{figure} {kinds[kind]}", "steps": steps, **change})
        rows = [problem_row(pair) for pair in side_by_side(before, after)]
        problems[kind] = {"name": kinds[kind], "steps": steps, "rows": rows}
    return table, problems


def problem_row(pair):
    """A statistics.Pair as the page shows it."""
    return {
        "id": pair.id,
        "question": shortened(pair.before.get("question")),
        "answer": shortened(pair.before.get("answer")),
        "change": pair.change,
        "sides": [
            side_of(pair.before, pair.outcomes_before),
            side_of(pair.after, pair.outcomes_after),
        ],
    }


def side_of(row, outcomes):
    """What is shown of a sample, and how many of its problem's judged samples were right."""
    verdict = "wrong" if row["status"] == "ok" else str(row["status"])
    shown = {name: shortened(row.get(name)) for name in ("value", "program", "text", "tokens")}
    return {
        "verdict": "right" if row["correct"] else verdict,
        "right": sum(outcomes),
        "judged": len(outcomes),
        "constant": bool(row.get("constant")),
        "leaked": bool(row.get("leaked")),
        **shown,
    }


def shortened(value):
    """A value as text; of a long one beginning and end, and how much is left out."""
    text = "" if value is None else str(value)
    half = MOST_CHARACTERS // 2
    left_out = len(text) - 2 * half
    if left_out <= 0:
        return text
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


# ---- what fits ----


def thin_curves(runs):
    """Long curves become the means of some steps each, where all runs' values are too many."""
    curves = sum(len(run.curves) for run in runs)
    points = min(MOST_POINTS, max(10, CURVE_VALUES // max(1, curves)))
    for run in runs:
        size = math.ceil(len(run.steps) / points)
        if size > 1:
            run.notes.append(f"curves: a point is the mean of {size} steps")
            parts = [slice(i, i + size) for i in range(0, len(run.steps), size)]
            run.steps = [run.steps[part][-1] for part in parts]
            for name, values in run.curves.items():
                run.curves[name] = [mean_of(values[part]) for part in parts]


def mean_of(values):
    known = [value for value in values if value is not None]
    return number(fmean(known)) if known else None


def thin_problems(problems, room, notes):
    """The problems that fit in `room` bytes, those that were gained or lost first."""
    for kind in problems.values():
        rows = kind["rows"]
        first = sorted(range(len(rows)), key=lambda i: not rows[i]["change"])
        left = room // len(problems)
        kept = set()
        for i in first:
            left -= len(encode(rows[i]))
            if left < 0:
                break
            kept.add(i)
        if len(kept) < len(rows):
            notes.append(
                f"held-out problems ({kind['name']}): {len(kept)} of {len(rows)} are shown, gained "
                "and lost ones first"
            )
        kind["rows"] = [row for i, row in enumerate(rows) if i in kept]
    return problems


def thin_samples(folder, room, notes):
    """Samples of as many whole steps as fit in `room` bytes, evenly over the run."""
    by_step = {}
    size = 0
    for row in read_rows(folder / "samples.jsonl", {"step", "status"}, notes):
        names = ("problem", "reward", "advantage", "value", "text")
        shown = {"step": row["step"], "verdict": str(row["status"])}
        shown |= {name: shortened(row.get(name)) for name in names}
        by_step.setdefault(row["step"], []).append(shown)
        size += len(encode(shown))

    steps = sorted(by_step)
    kept = steps
    count = min(len(steps), len(steps) * room // max(1, size))
    while len(encode([by_step[step] for step in kept])) > room:
        kept = evenly(steps, count)
        count = count * 9 // 10
    if len(kept) < len(steps):
        notes.append(f"samples: of {len(kept)} of {len(steps)} steps")
    return [row for step in kept for row in by_step[step]]


def evenly(steps, count):
    """So many of the steps, the last among them. 1 to 9 and 3: 3, 6, 9."""
    return [steps[len(steps) * (i + 1) // count - 1] for i in range(count)]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run folders, as runs/NAME")
    parser.add_argument("--out", help="the page's file (default: report.html in the first folder)")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {write_page(options.runs, options.out)}")
    except (OSError, ValueError) as problem:
        raise SystemExit(f"bench.report: {problem}") from None


if __name__ == "__main__":
    main()
