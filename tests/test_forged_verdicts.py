"""The verdict of a benchmark's tests, and programs that guess which of their runs is the right one."""

import concurrent.futures
import itertools
import random
import re
import time
from math import sqrt

import pytest

from forgers import FIND_AND_LEAVE, REMEMBERING
from sandbox import Pool, Result
from tasks.multipl_e import BenchmarkProblem, TestJudge, program

ROW = BenchmarkProblem(
    id="humaneval/py/HumanEval_53_add",
    task="humaneval",
    question="",
    prompt='def add(x: int, y: int) -> int:\n    """Add two numbers."""\n',
    tests="""\
def check(candidate):
    assert candidate(0, 1) == 1
    assert candidate(2, 3) == 5
    assert candidate(7, 5) == 12

check(add)
""",
    stop_tokens=("\ndef",),
    entry="add",
)
SAMPLES = 4000


class Guessing:
    """A pool of programs that end as passes(number of the run, are these the right tests?) says."""

    def __init__(self, passes):
        self.passes = passes
        self.runs = []  # of each program, how often it ran

    def submit(self, job):
        is_right = ROW.tests in job.files["main.py"]
        self.runs[-1] += 1
        future = concurrent.futures.Future()
        passed = self.passes(self.runs[-1], is_right)
        summands = re.findall(r"(\d+) \+ (\d+)", job.files["main.py"])[-1]
        printed = f"{sum(map(int, summands))}\n".encode() if passed else b""
        result = Result(
            "ok" if passed else "error", printed, b"", 0, None, 0, 0, 0, "kernel", False
        )
        future.set_result(result)
        return future


def tried(passes):
    """(share that passes, mean number of runs, statuses) of SAMPLES such programs."""
    pool = Guessing(passes)
    judge = TestJudge(None, "python", "chat")
    judge.pool = pool
    verdicts = []
    for number in range(SAMPLES):
        pool.runs.append(0)
        text = f"```python\ndef add(x, y): return {number}\n```"
        verdicts += judge.collect([judge.submit(ROW, text)])
    share = sum(verdict.correct for verdict in verdicts) / SAMPLES
    return share, sum(pool.runs) / SAMPLES, {verdict.status for verdict in verdicts}


# Of 4,000 fair coins the share of heads is within 4 standard deviations, 0.032, of a half.
NEAR = 4 * sqrt(0.25 / SAMPLES)


def test_a_right_program_is_right_after_two_runs():
    assert tried(lambda run, is_right: is_right) == (1.0, 2.0, {"ok"})


def test_a_wrong_program_is_wrong_after_one_and_a_half():
    share, runs, statuses = tried(lambda run, is_right: False)
    assert (share, statuses) == (0.0, {"error"})
    assert abs(runs - 1.5) < NEAR


def test_a_program_that_is_right_now_and_then_passes_as_often():
    rng = random.Random(0)
    share, _, statuses = tried(lambda run, is_right: is_right and rng.random() < 0.7)
    assert abs(share - 0.7) < NEAR
    assert statuses == {"ok", "error"}  # not "forged"


def test_a_program_that_passes_whatever_the_tests_is_a_forger():
    assert tried(lambda run, is_right: True)[::2] == (0.0, {"forged"})


@pytest.mark.parametrize("plan", [*itertools.product([True, False], repeat=2)])
def test_a_forger_that_counts_its_runs_passes_half_of_the_time_at_most(plan):
    """Whatever it plans to do in its first and second run; a plan of two equal ones never passes."""
    share, _, _ = tried(lambda run, is_right: plan[run - 1])
    assert share < 0.5 + NEAR
    assert share > 0 or plan[0] == plan[1]


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7])
def test_a_forger_that_remembers_nothing_passes_a_quarter_of_the_time_at_most(chance):
    rng = random.Random(0)
    share, _, _ = tried(lambda run, is_right: rng.random() < chance)
    assert abs(share - chance * (1 - chance)) < NEAR


def test_equal_samples_have_equal_runs():
    """So that the pool's cache runs them once, and asking again gives no other coin."""
    judge = TestJudge(None, "python", "chat")
    text = "```python\ndef add(x, y): return 0\n```"
    for prose in ("", "Here it is:\n", "So:\n"):
        source = program(ROW, prose + text, judge.language, "chat")
        runs = judge._runs(ROW, prose + text, source)
        assert runs == judge._runs(ROW, text, program(ROW, text, judge.language, "chat"))


@pytest.mark.slow
@pytest.mark.parametrize("how", REMEMBERING)
def test_what_forgers_remember_helps_them_no_more_than_said(how):
    """Of 40 at 1/2 more than 32 pass once in 10,000 times (binomial, 40, 1/2)."""
    count = 40
    with Pool(workers=2) as pool:
        judge = TestJudge(pool, "python", "chat")
        verdicts = []
        for _ in range(
            count
        ):  # one after the other: the second run begins when the first has ended
            if "the clock" in how:
                time.sleep(1 - time.time() % 1)
            code = FIND_AND_LEAVE.replace("{mark}", f"{random.random()}") + REMEMBERING[how]
            verdicts += judge.collect([judge.submit(ROW, f"```python\n{code}\n```")])
    passed = sum(verdict.correct for verdict in verdicts)
    print(f"{how}: {passed} of {count} pass")
    assert all(verdict.judged for verdict in verdicts)
    assert passed <= 32
