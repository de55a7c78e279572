"""Self-play's three buffers, and programs from files: seeds for them, or puzzles to evaluate."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from sandbox.languages.calls import input_text
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import write
from selfplay.parse import normalised
from selfplay.proposals import begin, check
from selfplay.puzzles import PAIRS, TASKS, Candidate, Entry, Puzzle
from tasks.data import read_jsonl


class Buffer:
    """Entries in the order they came. Two are the same when normalised source and inputs are."""

    def __init__(self, capacity, language):
        self.capacity = capacity
        self.language = language
        self.entries = {}  # {normalised program and inputs: Entry}

    def __len__(self):
        return len(self.entries)

    def __iter__(self):
        return iter(self.entries.values())

    def add(self, entry):
        """False when it is there already. The oldest entry makes room."""
        if entry in self:
            return False
        self.entries[self.key(entry)] = entry
        if len(self.entries) > self.capacity:
            del self.entries[next(iter(self.entries))]
        return True

    def __contains__(self, entry):
        return self.key(entry) in self.entries

    def remove(self, entry):
        """Forget an entry, if it is still there."""
        self.entries.pop(self.key(entry), None)

    def key(self, entry):
        """What makes two entries the same."""
        return normalised(entry.program, self.language), entry.inputs

    def draw(self, rng, count):
        """Up to `count` different entries, uniformly."""
        return rng.sample(list(self), min(count, len(self)))

    def newest_first(self, rng, count, step):
        """`count` entries for the solver: those of this step in random order, then uniform draws.

        The draws are from all entries, and repeat some where there are too few. Empty: [].
        """
        if not self.entries:
            return []
        fresh = [entry for entry in self if entry.step == step]
        picked = rng.sample(fresh, min(count, len(fresh)))
        return picked + rng.choices(list(self), k=count - len(picked))


class Buffers(dict):
    """{task: Buffer} of the three tasks, and the moving average of the solver's accuracy."""

    def __init__(self, capacity, language):
        super().__init__({task: Buffer(capacity, language) for task in TASKS})
        self.solver_accuracy = 0.0

    def to_text(self):
        """JSON of everything; from_text gives exactly the same buffers in the same order."""
        stored = {"solver_accuracy": self.solver_accuracy}
        for task, buffer in self.items():
            stored[task] = [asdict(entry) for entry in buffer]
        return json.dumps(stored) + "\n"

    def from_text(self, text):
        stored = json.loads(text)
        self.solver_accuracy = stored["solver_accuracy"]
        for task, buffer in self.items():
            buffer.entries.clear()
            for row in stored[task]:
                buffer.add(_stored_entry(row))


def _stored_entry(row):
    return Entry(
        program=row["program"],
        inputs=tuple(row["inputs"]),
        outputs=tuple(row["outputs"]),
        message=row["message"],
        step=row["step"],
    )


# ---- programs from files ----


def add_seeds(buffers, path, runner, count, deadline):
    """Fill the buffers from a file, at most `count` each -> {reason: rows refused}.

    Every row is checked like a proposal.
    """
    seeds = read_seeds(path, runner.language)[: 4 * count]
    trials = [begin(runner, candidate) for _, candidate in seeds]
    candidates = check(runner, trials, deadline)

    refused = {}
    for (tasks, _), candidate in zip(seeds, candidates):
        if candidate.entry is None:
            refused[candidate.reason] = refused.get(candidate.reason, 0) + 1
            continue
        for task in tasks:
            if len(buffers[task]) < count:
                buffers[task].add(candidate.entry)
    return refused


def read_seeds(path, language):
    """Rows of a file as unchecked proposals: [(tasks that it is for, Candidate)].

    path: azr_seeds, cruxeval (Python), or a checkpoint's selfplay.json. A row has a program
    (program, snippet or code), input or inputs, and a message for induction. Outputs are computed
    anew.
    """
    if not _is_checkpoint(path):
        return read_jsonl(path, lambda _, row: _seed(row, language))

    stored = json.loads(Path(path).read_text("utf-8"))
    seeds = []
    for task in TASKS:
        for row in stored[task]:
            entry = _stored_entry({**row, "outputs": (), "step": 0})
            seeds.append(((task,), Candidate(entry)))
    return seeds


def load_puzzles(path, task, language):
    """Input or output prediction (CRUXEval's form) from programs with inputs and outputs.

    path: as for read_seeds. Returns (list[Puzzle], number of rows left out because a value is not a
    literal).
    """
    if _is_checkpoint(path):
        stored = json.loads(Path(path).read_text("utf-8"))
        entries = [_stored_entry(row) for row in stored["deduction"]]
    else:
        entries = read_jsonl(path, lambda _, row: _known_entry(row, language))

    puzzles = []
    for i, entry in enumerate(entries):
        if entry is not None:
            puzzles.append(Puzzle(f"crux/{task}/{i}", task, entry, question=entry.program))
    return puzzles, len(entries) - len(puzzles)


def _is_checkpoint(path):
    return str(path).endswith("selfplay.json")


def _seed(row, language):
    """(tasks, Candidate) of a row: one input makes deduction and abduction, several induction."""
    names = [name for name in ("program", "snippet", "code") if name in row]
    program = row[names[0]]
    inputs = row["inputs"] if "inputs" in row else [row["input"]]
    tasks = ("induction",) if len(inputs) > 1 else ("deduction", "abduction")
    if 1 < len(inputs) < PAIRS:
        return tasks, Candidate(reason="few_inputs")

    try:
        calls = [read(text, language) for text in inputs[:PAIRS]]
    except ValueError:
        return tasks, Candidate(reason="input_no_value")
    canonical = tuple(input_text(arguments, language) for arguments in calls)
    return tasks, Candidate(Entry(program, canonical, (), row.get("message", "")))


def _known_entry(row, language):
    """The Entry of a row's first input and output, or None when one of them is not a literal."""
    given = row["input"] if "input" in row else row["inputs"][0]
    _, candidate = _seed({**row, "inputs": [given]}, language)
    if candidate.entry is None:
        return None

    printed = row["output"] if "output" in row else row["outputs"][0]
    try:
        output = write(read_one(printed, language), language)
    except ValueError:
        return None
    return replace(candidate.entry, outputs=(output,))
