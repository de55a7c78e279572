"""Self-play's three buffers: capped (the oldest go first), without duplicates, with the step of every entry; seeds from a file."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from sandbox.languages.calls import input_text
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import write
from selfplay.parse import normalised
from selfplay.proposals import PAIRS, TASKS, Entry, Puzzle, Refused, check
from tasks.data import read_jsonl


class Buffer:
    """Entries in the order they came. Two entries are the same when normalised source and inputs are."""

    def __init__(self, capacity, language):
        self.capacity, self.language, self.entries = capacity, language, {}

    def __len__(self):
        return len(self.entries)

    def add(self, entry):
        """False when it is there already. The oldest entry makes room."""
        key = (normalised(entry.program, self.language), entry.inputs)
        if key in self.entries:
            return False
        self.entries[key] = entry
        if len(self.entries) > self.capacity:
            del self.entries[next(iter(self.entries))]
        return True

    def draw(self, rng, count):
        """Up to `count` different entries, uniformly."""
        return rng.sample(list(self.entries.values()), min(count, len(self.entries)))

    def newest_first(self, rng, count, step):
        """`count` entries for the solver: those of this step in random order, then uniform draws from all (again, when there are too few)."""
        entries = list(self.entries.values())
        fresh = [e for e in entries if e.step == step]
        picked = rng.sample(fresh, min(count, len(fresh)))
        return picked + rng.choices(entries, k=count - len(picked)) if entries else []


class Buffers(dict):
    """{task: Buffer} of the three tasks, and the moving average of the solver's accuracy."""

    def __init__(self, capacity, language):
        super().__init__({task: Buffer(capacity, language) for task in TASKS})
        self.solver_accuracy = 0.0

    def to_text(self):
        """JSON of everything; from_text gives exactly the same buffers in the same order."""
        rows = {task: [asdict(e) for e in buffer.entries.values()] for task, buffer in self.items()}
        return json.dumps({"solver_accuracy": self.solver_accuracy, **rows}) + "\n"

    def from_text(self, text):
        found = json.loads(text)
        self.solver_accuracy = found["solver_accuracy"]
        for task, buffer in self.items():
            buffer.entries.clear()
            for row in found[task]:
                buffer.add(entry_of(row))


def entry_of(row):
    return Entry(
        row["program"], tuple(row["inputs"]), tuple(row["outputs"]), row["message"], row["step"]
    )


def read_seeds(path, language):
    """Rows of a file as unchecked proposals [(tasks, Entry or Refused)]: azr_seeds, cruxeval (Python), or a checkpoint's selfplay.json.

    A row has a program (program, snippet or code), and input or inputs, and a message for induction. Outputs are computed anew.
    """
    if str(path).endswith("selfplay.json"):
        found = json.loads(Path(path).read_text("utf-8"))
        return [
            ((task,), entry_of({**row, "outputs": (), "step": 0}))
            for task in TASKS
            for row in found[task]
        ]
    return read_jsonl(path, lambda _, row: _seed(row, language))


def _seed(row, language):
    program = next(row[name] for name in ("program", "snippet", "code") if name in row)
    inputs = row["inputs"] if "inputs" in row else [row["input"]]
    tasks = ("induction",) if len(inputs) > 1 else ("deduction", "abduction")
    if len(inputs) > 1 and len(inputs) < PAIRS:
        return tasks, Refused("few_inputs")
    try:
        canonical = tuple(input_text(read(text, language), language) for text in inputs[:PAIRS])
    except ValueError:
        return tasks, Refused("input_no_value")
    return tasks, Entry(program, canonical, (), row.get("message", ""))


def load_puzzles(path, task, language):
    """Input or output prediction (CRUXEval's form) from a file of programs with inputs and outputs -> (list[Puzzle], rows left out because
    a value is no literal that values.py has)."""
    rows = (
        read_jsonl(path, lambda _, row: _known(row, language))
        if not str(path).endswith("selfplay.json")
        else _stored(path)
    )
    whole = [(i, e) for i, e in enumerate(rows) if isinstance(e, Entry)]
    return [Puzzle(f"crux/{task}/{i}", task, e, e.program) for i, e in whole], len(rows) - len(
        whole
    )


def _stored(path):
    found = json.loads(Path(path).read_text("utf-8"))
    return [entry_of(row) for row in found["deduction"]]


def _known(row, language):
    _, entry = _seed(
        {**row, "inputs": [row["input"]] if "input" in row else row["inputs"][:1]}, language
    )
    if isinstance(entry, Refused):
        return entry
    try:
        return replace(
            entry,
            outputs=(
                write(
                    read_one(row["output"] if "output" in row else row["outputs"][0], language),
                    language,
                ),
            ),
        )
    except ValueError:
        return Refused("no_value")


def add_seeds(buffers, path, runner, count, deadline):
    """Fill the buffers from a file, at most `count` each, every row checked like a proposal -> {reason: rows refused}."""
    rows = [row for row in read_seeds(path, runner.language)][: 4 * count]
    refused = {}
    for (tasks, _), entry in zip(rows, check(runner, [entry for _, entry in rows], deadline)):
        if isinstance(entry, Refused):
            refused[str(entry)] = refused.get(str(entry), 0) + 1
            continue
        for task in tasks:
            if len(buffers[task]) < count:
                buffers[task].add(replace(entry, step=0))
    return refused
