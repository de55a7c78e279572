"""Self-play's dealings with programs: completions -> checked proposals, completions -> judged answers.

A proposal is run in two processes of its own before it may enter a buffer; every refusal has one of the REASONS below and is counted. Values go in and out as data (values.py, literals.py), so no text of
the model but its program stands in a program, and the right answer of a puzzle is in no process at all.
"""

import time
from dataclasses import dataclass

from sandbox.languages.calls import wait
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import MAX_TEXT, same, write

TASKS = ("deduction", "abduction", "induction")
PAIRS, SHOWN = (
    10,
    5,
)  # induction: inputs of a proposal; the solver sees the first five and is judged on the others

REASONS = {
    "format": "not <think>...</think> <answer>...</answer>",
    "no_program": "no code block in the language",
    "no_input": "no input block",
    "few_inputs": f"induction with fewer than {PAIRS} input blocks",
    "no_message": "induction without a message block",
    "no_composite": "does not call the functions it was asked to build on, or defines them again",
    "input_no_value": "an input is no literal",
    "too_long": f"an input or output has more than {MAX_TEXT} characters (never cut)",
    "syntax": "does not parse",
    "banned": "uses randomness, time, files, processes, evaluation or another banned construct, under whatever name",
    "no_f": "defines no f",
    "error": "fails on an input",
    "no_value": "an output has no literal (a function, an infinite number)",
    "not_deterministic": "two processes gave different outputs",
    "no_round_trip": "an output changes when it is written and read back",
    "cpu_limit": "",
    "wall_limit": "",
    "memory_limit": "",
    "output_limit": "",
    "file_limit": "",
    "crash": "",
    "compile_error": "",
    "sandbox_error": "the sandbox could not judge: masked, not refused",
}


class Refused(Exception):
    """Its text is the reason."""


@dataclass(frozen=True)
class Entry:
    """A checked program with inputs and outputs as canonical text; induction has PAIRS of them and a message."""

    program: str
    inputs: tuple
    outputs: tuple
    message: str = ""
    step: int = 0


@dataclass(frozen=True)
class Puzzle:
    """What a solver is given."""

    id: str
    task: str  # one of TASKS
    entry: Entry
    question: str = ""  # the prompt, for samples.jsonl
    answer: str | None = None


# ---- completions ----


# ---- programs ----


def value_of(kind, text, language):
    """A printed value as data; Refused with its reason."""
    if kind != "value":
        raise Refused(kind)
    if len(text) > MAX_TEXT:
        raise Refused("too_long")
    try:
        return read_one(text, language)
    except ValueError:
        raise Refused("no_value") from None


# ---- checking proposals ----


def begin(runner, proposal):
    """Start the first run of a proposal, which check() waits for; None for one that is refused already."""
    return (
        runner.start(proposal.program, _calls(proposal, runner.language))
        if isinstance(proposal, Entry)
        else None
    )


def _calls(proposal, language):
    return [read(text, language) for text in proposal.inputs]


def check(runner, proposals, deadline=None, first=None):
    """[Entry without outputs, or Refused] -> [Entry with outputs, or Refused], each run in two processes of its own. first: what begin() gave.

    The second starts when every first one has ended, and calls f twice on every input, in reverse order first: a clock, a counter kept
    between calls or an address shows as a difference. Then all outputs pass through the identity function, and must come back as they were.
    """
    language = runner.language
    first = [begin(runner, p) for p in proposals] if first is None else first
    wait(first, deadline)
    time.sleep(1 - time.time() % 1)  # so that even a clock of whole seconds shows
    values = [_values(runner, s) if s else p for p, s in zip(proposals, first)]
    again = lambda p: _calls(p, language)[::-1] + _calls(p, language)
    second = [
        runner.start(p.program, again(p), 2) if isinstance(v, list) else None
        for p, v in zip(proposals, values)
    ]
    wait(second, deadline)
    for i, started in enumerate(second):
        if started:
            found = _values(runner, started)
            if isinstance(found, Refused):
                values[i] = found if str(found) == "sandbox_error" else Refused("not_deterministic")
            elif not all(same(a, b, language) for a, b in zip(values[i][::-1] + values[i], found)):
                values[i] = Refused("not_deterministic")
    returned = round_trip(
        runner, [v for value in values if isinstance(value, list) for v in value], deadline
    )
    return [_checked(p, value, returned, language) for p, value in zip(proposals, values)]


def _values(runner, started):
    try:
        return [value_of(kind, text, runner.language) for kind, text in runner.finish(started)]
    except Refused as reason:
        return reason


def _checked(proposal, values, returned, language):
    if isinstance(values, Refused):
        return values
    texts = [write(v, language) for v in values]
    bad = {returned[text] for text in texts} - {True}
    if bad:
        return Refused("sandbox_error" if "sandbox_error" in bad else "no_round_trip")
    return Entry(proposal.program, proposal.inputs, tuple(texts), proposal.message)


def round_trip(runner, values, deadline=None, chunk=40):
    """{canonical text: True, False or "sandbox_error"}: is the value, written into a program, printed as the same value again?"""
    language = runner.language
    distinct = {write(v, language): v for v in values}
    parts = [list(distinct.items())[i : i + chunk] for i in range(0, len(distinct), chunk)]
    started = [
        runner.start(language.call["identity"], [[v] for _, v in part], run=3) for part in parts
    ]
    wait(started, deadline)
    found = {}
    for part, one in zip(parts, started):
        for (text, value), (kind, printed) in zip(part, runner.finish(one)):
            found[text] = (
                kind if kind == "sandbox_error" else _returns(kind, printed, value, language)
            )
    return found


def _returns(kind, printed, value, language):
    try:
        return same(value_of(kind, printed, language), value, language)
    except Refused:
        return False


# ---- judging answers ----
