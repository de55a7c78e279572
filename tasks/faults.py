"""What happens when a judge itself fails on one sample: the net below all judges.

Completions and printed output are a model's to choose. What a judge cannot read although it should
must not end a run of days, and must not pay: such a sample is wrong, with the status "judge_fault".
The first fault of a kind is logged with its traceback, all are counted (sandbox/judge_fault_frac).

Where RARECODE_FAULTS is "raise", as in the tests, a fault ends the run: there it is a bug to see.
"""

import os
import sys
import time
import traceback
from dataclasses import dataclass, replace
from math import nan

from sandbox import SandboxError
from tasks.verdicts import Parsed, Submission

FAULT = "judge_fault"

_seen = set()  # faults that were logged: (type, file, line)


@dataclass(frozen=True)
class Unread(Submission):
    """A completion that the judge failed to take."""


def submit(judge, problem, text, sample=0):
    """judge.submit, with an Unread submission where it fails.

    SandboxError stays one: the call is wrong (no interpreter, a closed pool), not the sample.
    """
    try:
        return judge.submit(problem, text, sample)
    except SandboxError:
        raise
    except Exception as error:
        note(error, f"{problem.id}/{sample}")
        nothing = Parsed(reasoning="", code="", query="", format_ok=False)
        return Unread(problem, sample, text, nothing, nonce="", future=None)


def collect(judge, submissions, deadline=None):
    """judge.collect, one by one; a fault is one sample's verdict, a sandbox's is masked."""
    end = None if deadline is None else time.monotonic() + deadline
    verdicts = []
    for submission in submissions:
        seconds = None if end is None else max(0.0, end - time.monotonic())
        verdicts.append(_verdict(judge, submission, seconds))
    return verdicts


def note(error, sample):
    """Log a fault, with its traceback when it is the first of its kind.

    sample: what was judged, for the reader. Called where `error` is being handled.
    """
    if os.environ.get("RARECODE_FAULTS") == "raise":
        raise error
    place = traceback.extract_tb(error.__traceback__)[-1]
    kind = (type(error), place.filename, place.lineno)
    if kind not in _seen:
        _seen.add(kind)
        print(
            f"{sample!s:.200} could not be judged and counts as wrong; later faults of this kind are "
            f"only counted (sandbox/{FAULT}_frac):\n{traceback.format_exc()}",
            file=sys.stderr,
            flush=True,
        )


def _verdict(judge, submission, seconds):
    if isinstance(submission, Unread):
        return _wrong(judge, submission)
    try:
        (verdict,) = judge.collect([submission], seconds)
        return verdict
    except (SandboxError, OSError):  # the machine's: no file or socket is the sample's choice
        verdict = _wrong(judge, submission)
        unknown = dict.fromkeys(verdict.components, nan)
        return replace(verdict, status="sandbox_error", reward=nan, components=unknown)
    except Exception as error:
        note(error, f"{submission.problem.id}/{submission.sample}")
        return _wrong(judge, submission)


def _wrong(judge, submission):
    """The judge's own verdict of an empty completion: wrong everywhere, at its own price."""
    empty = judge.submit(submission.problem, "", submission.sample)
    (verdict,) = judge.collect([empty])
    return replace(verdict, correct=False, status=FAULT)
