"""The contract of all judges: submit(problem, text, sample) starts a program and returns a Submission, collect(submissions) gives Verdicts."""

import concurrent.futures
import math
from collections import Counter
from dataclasses import dataclass

from tasks.problems import Problem


@dataclass(frozen=True)
class Parsed:
    reasoning: str
    code: str  # empty when there is none
    query: str
    format_ok: bool  # the three parts, in order, none empty, nothing around them


@dataclass(frozen=True)
class Submission:
    """A completion whose program, when it has one, is running."""

    problem: Problem
    sample: int
    text: str
    parsed: Parsed
    nonce: str
    future: concurrent.futures.Future | None
    syntax: concurrent.futures.Future | None = (
        None  # the language's own check of the code alone, when a component asks for it
    )


@dataclass
class Verdict:
    problem: str  # its id
    reward: float  # nan: the sandbox could not judge
    components: dict[str, float]
    correct: bool
    status: str  # the sandbox's, or "no_program"
    value: str | None  # what the query gave, as printed
    program: str  # code and query
    parsed: Parsed
    constant: bool  # the program computes nothing
    leaked: bool  # the answer stands in the query, though not in the question

    @property
    def judged(self):
        """False when the sandbox could not judge: the reward is nan."""
        return not math.isnan(self.reward)


def shares(verdicts):
    """{metric name: share} over a batch of verdicts: what shows reward hacking, and how the programs ended."""
    total = max(len(verdicts), 1)
    repeated = sum(
        count - 1
        for count in Counter((verdict.problem, verdict.program) for verdict in verdicts).values()
    )
    found = {
        "completions/format_frac": sum(verdict.parsed.format_ok for verdict in verdicts),
        "completions/code_found_frac": sum(verdict.status != "no_program" for verdict in verdicts),
        "completions/constant_frac": sum(verdict.constant for verdict in verdicts),
        "completions/leaked_frac": sum(verdict.leaked for verdict in verdicts),
        "completions/duplicate_frac": repeated,
        "sandbox/wrong_frac": sum(
            verdict.status == "ok" and not verdict.correct for verdict in verdicts
        ),
    }
    found |= {
        f"sandbox/{status}_frac": count
        for status, count in Counter(verdict.status for verdict in verdicts).items()
    }
    return {name: count / total for name, count in found.items()}
