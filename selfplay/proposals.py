"""Proposals checked by running them, before they may enter a buffer.

    trials = [begin(runner, candidate) for candidate in candidates]     at once, while others sample
    check(runner, trials)  ->  the candidates with outputs, or with the reason why they are refused

Values go in and out as data (values.py, literals.py), so no text of the model but its program
stands in a program, and the right answer of a puzzle is in no process at all.
"""

import time
from dataclasses import dataclass, replace

from sandbox import SandboxError
from sandbox.languages.calls import Running, wait
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import same, write
from selfplay.parse import value_of
from selfplay.puzzles import Candidate, Refused
from tasks import faults

# Numbers of the runs, so that the pool's cache does not answer one with another's result.
FIRST, SECOND, IDENTITY, LATER = 1, 2, 3, 4  # and, of `still_true`, LATER + step
CHUNK = 40  # values that one process passes through the identity function


@dataclass
class Trial:
    """A candidate under check."""

    candidate: Candidate
    running: Running | None = None  # its first run; None for one that was refused before
    values: list | None = None  # what f gave for the inputs, as data

    def refuse(self, reason):
        self.candidate = Candidate(reason=reason)
        self.values = None


def reason_of(error, sample):
    """Why a proposal is refused for which this was raised; what the judge did not expect is logged.

    sample: what was judged, for the reader of the log. SandboxError is no sample's fault.
    """
    if isinstance(error, Refused):
        return error.reason
    if isinstance(error, SandboxError | OSError):
        raise error
    faults.note(error, sample)
    return faults.FAULT


def begin(runner, candidate):
    """Start the first run of a candidate without outputs, if there is a program -> Trial."""
    if candidate.entry is None:
        return Trial(candidate)
    running = runner.start(candidate.entry.program, _calls(candidate, runner.language), FIRST)
    return Trial(candidate, running)


def check(runner, trials, deadline=None):
    """The candidates of Trials, with outputs, or with the reason why they are refused.

    Each program runs in two processes of its own. The second calls f twice on every input, in
    reverse order first: a clock, a counter kept between calls or an address shows as a difference.
    Then all outputs pass through the identity function, and must come back as they were.

    deadline: seconds for each of the three rounds; what is not done then is a sandbox_error.
    """
    language = runner.language
    wait([trial.running for trial in trials], deadline)
    time.sleep(1 - time.time() % 1)  # so that even a clock of whole seconds shows
    for trial in trials:
        _read_first(runner, trial)

    second_runs = [_begin_second(runner, trial) for trial in trials]
    wait(second_runs, deadline)
    for trial, running in zip(trials, second_runs):
        _compare_second(runner, trial, running)

    values = []
    for trial in trials:
        values += trial.values or []
    returned = round_trip(runner, values, deadline)
    return [_conclude(trial, returned, language) for trial in trials]


def still_true(runner, entries, step, deadline=None):
    """[does its program still give its outputs?] of entries that are about to be used in a step.

    No list of what is banned is whole, and chance can show the same in both runs of check(). Here
    each program runs in a new process, at another time. What the sandbox cannot say counts as true.
    """
    runs = []
    for entry in entries:
        calls = _calls(Candidate(entry), runner.language)
        runs.append(runner.start(entry.program, calls, LATER + step))
    wait(runs, deadline)
    return [_gives(runner, running, entry) for running, entry in zip(runs, entries)]


def _gives(runner, running, entry):
    language = runner.language
    try:
        values = _values(runner, running)
    except Exception as error:
        return reason_of(error, entry) == "sandbox_error"
    outputs = [read_one(text, language) for text in entry.outputs]
    return all(same(a, b, language) for a, b in zip(values, outputs, strict=True))


def _calls(candidate, language):
    return [read(text, language) for text in candidate.entry.inputs]


def _values(runner, running):
    """What the calls of a job gave, as data; Refused with the first reason."""
    return [value_of(outcome, runner.language) for outcome in runner.finish(running)]


def _read_first(runner, trial):
    if trial.running is None:
        return
    try:
        trial.values = _values(runner, trial.running)
    except Exception as error:
        trial.refuse(reason_of(error, trial.candidate))


def _begin_second(runner, trial):
    if trial.values is None:
        return None
    calls = _calls(trial.candidate, runner.language)
    return runner.start(trial.candidate.entry.program, calls[::-1] + calls, SECOND)


def _compare_second(runner, trial, running):
    if running is None:
        return
    try:
        again = _values(runner, running)
    except Exception as error:
        is_masked = reason_of(error, trial.candidate) == "sandbox_error"
        trial.refuse("sandbox_error" if is_masked else "not_deterministic")
        return

    language = runner.language
    pairs = zip(trial.values[::-1] + trial.values, again)
    if not all(same(a, b, language) for a, b in pairs):
        trial.refuse("not_deterministic")


def round_trip(runner, values, deadline=None):
    """{canonical text: "ok", "no_round_trip" or "sandbox_error"} of values.

    ok: written into a program, the value is printed as the same value again.
    """
    language = runner.language
    distinct = {write(value, language): value for value in values}
    items = list(distinct.items())
    parts = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]

    jobs = []
    for part in parts:
        calls = [[value] for _, value in part]
        jobs.append(runner.start(language.call["identity"], calls, IDENTITY))
    wait(jobs, deadline)

    found = {}
    for part, job in zip(parts, jobs):
        for (text, value), outcome in zip(part, runner.finish(job)):
            found[text] = _returned(outcome, value, language)
    return found


def _returned(outcome, value, language):
    if outcome.kind == "sandbox_error":
        return "sandbox_error"
    try:
        is_same = same(value_of(outcome, language), value, language)
    except Exception as error:
        reason_of(error, value)
        is_same = False
    return "ok" if is_same else "no_round_trip"


def _conclude(trial, returned, language):
    """The candidate with its outputs, unless one of them did not come back."""
    if trial.values is None:
        return trial.candidate
    outputs = tuple(write(value, language) for value in trial.values)
    reasons = {returned[text] for text in outputs}
    for reason in ("sandbox_error", "no_round_trip"):
        if reason in reasons:
            return Candidate(reason=reason)
    return Candidate(replace(trial.candidate.entry, outputs=outputs))
