"""The contract of all judges.

A judge scores completions by running programs. It has three methods:

    stop_strings(problem) -> tuple of texts
        A completion may end with the first of them: nothing behind it changes the verdict.

    submit(problem, text, sample=0) -> submission
        Takes the completion apart and starts what has to run, at once, so that rewards are computed
        while the rest is still sampling. The submission has the fields of Submission that a caller
        reads: problem, sample, text, parsed and future, which is done when everything that was
        started is (None when nothing was).

    collect(submissions, deadline=None) -> list[Verdict], in order
        Waits until all are done, or for `deadline` seconds. What is not done then was not judged:
        its reward is nan and its status "sandbox_error". It is masked, never scored 0.

The five judges: rewards.Judge (a number, by value), translate.TranslateJudge (hidden cases),
multipl_e.TestJudge (a benchmark's own tests), evalplus.PlusJudge (results compared with another
program's), selfplay.judge (puzzles).
"""

import concurrent.futures
import math
import random
from collections import Counter
from dataclasses import dataclass, replace

from tasks.problems import Problem

# The end of an answer in think mode and in self-play, whose prompts end in "<think>".
ANSWER_END = "</answer>"


@dataclass(frozen=True)
class Parsed:
    """The parts of a completion; those that a task does not have are empty."""

    reasoning: str
    code: str  # empty when there is none
    query: str
    format_ok: bool  # the form is the one that the prompt asks for, with nothing around it


@dataclass(frozen=True)
class Submission:
    """A completion whose program, when it has one, is running."""

    problem: Problem
    sample: int
    text: str
    parsed: Parsed
    nonce: str  # what the program's value is printed after
    future: concurrent.futures.Future | None
    # The language's own check of the code alone, when a component asks for it.
    syntax: concurrent.futures.Future | None = None


@dataclass
class Verdict:
    """What a completion is worth, and what the log shows of it."""

    problem: str  # its id
    reward: float  # nan: the sandbox could not judge
    components: dict[str, float]
    correct: bool
    status: str  # the sandbox's, or "no_program", "no_value", "forged", a reason of self-play
    value: str | None  # what the query gave, as printed
    program: str  # code and query
    parsed: Parsed
    constant: bool = False  # the program computes nothing
    leaked: bool = False  # the answer stands in the query, though not in the question
    coin: bool | None = None  # what the random control pays for instead of `correct`
    target: str = ""  # the language of the program, in a task with several

    @property
    def judged(self):
        """False exactly when the reward is nan: the sample counts nowhere."""
        return not math.isnan(self.reward)


def tossed(verdict, seed, sample):
    """The verdict with a fair coin of (seed, problem, sample) for its reward: the random control.

    What could not be judged stays so.
    """
    if not verdict.judged:
        return verdict
    coin = random.Random(f"{seed}/{verdict.problem}/{sample}").random() < 0.5
    return replace(verdict, reward=float(coin), coin=coin)


def first_answer(text):
    """A completion in think mode up to and with the end of its first answer.

    A model that goes on asks itself another question, and its answer to that is not to be judged.
    Sampling stops at the same place, so the end counts wherever it stands, in the reasoning too.
    """
    answer, end, _ = text.partition(ANSWER_END)
    return answer + end


def shares(verdicts):
    """{metric name: share} over a batch of verdicts.

    What shows reward hacking (constant and leaked programs, duplicates), and how programs ended.
    """
    seen = Counter((verdict.problem, verdict.program) for verdict in verdicts)
    statuses = Counter(verdict.status for verdict in verdicts)
    wrong = sum(verdict.status == "ok" and not verdict.correct for verdict in verdicts)
    counts = {
        "completions/format_frac": sum(verdict.parsed.format_ok for verdict in verdicts),
        "completions/code_found_frac": len(verdicts) - statuses["no_program"],
        "completions/constant_frac": sum(verdict.constant for verdict in verdicts),
        "completions/leaked_frac": sum(verdict.leaked for verdict in verdicts),
        "completions/duplicate_frac": len(verdicts) - len(seen),
        "sandbox/wrong_frac": wrong,
    }
    for status, count in statuses.items():
        counts[f"sandbox/{status}_frac"] = count
    return {name: count / max(len(verdicts), 1) for name, count in counts.items()}
