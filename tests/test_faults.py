"""The net below the judges: a judge's fault is one sample's wrong answer, logged and counted."""

import concurrent.futures
import math
import random
import re
from fractions import Fraction
from types import SimpleNamespace

import pytest

from eval import evaluate
from rewards import Judge
from rollout import sample_and_judge
from sampler import Completion
from sandbox import Result, SandboxError
from sandbox.languages import load_language
from sandbox.languages.calls import Runner
from selfplay import loop
from selfplay.judge import SolveJudge
from selfplay.proposals import begin, check
from selfplay.puzzles import Candidate, Entry, Puzzle, Refused
from tasks import faults
from tasks.curriculum import Curriculum
from tasks.problems import Problem
from tasks.render import completion
from tasks.verdicts import shares

PROBLEM = Problem("p", "sums", "?", Fraction(42))
TEXT = completion("r", "f(42).", "f(X)", "prolog")
BAD = completion("r", "g(42).", "g(X)", "prolog")


class Answering:
    """A pool in which every program prints 42 after its nonce, or whose future fails."""

    def __init__(self, error=None):
        self.error = error

    def submit(self, job):
        future = concurrent.futures.Future()
        if self.error:
            future.set_exception(self.error)
            return future
        nonce = re.search("[0-9a-f]{24}", "".join(job.files.values()))[0]
        printed = f"\n{nonce} 42\n".encode()
        future.set_result(Result("ok", printed, b"", 0, None, 0.1, 0.1, 1, "kernel", False))
        return future


class Failing(Judge):
    """Fails on the completion with g in it: where it is taken, or where it is judged."""

    def __init__(self, where, **options):
        super().__init__(SimpleNamespace(submit=lambda job: None), "prolog", **options)
        self.where = where

    def submit(self, problem, text, sample=0):
        if self.where == "submit" and "g(" in text:
            raise ValueError("4300 digits")
        return super().submit(problem, text, sample)

    def _verdict(self, submission):
        if self.where == "collect" and "g(" in submission.text:
            raise RecursionError("too deep")
        return super()._verdict(submission)


@pytest.fixture(autouse=True)
def caught(monkeypatch):
    """As in a run: in the other tests a fault is raised."""
    monkeypatch.setenv("RARECODE_FAULTS", "")
    monkeypatch.setattr(faults, "_seen", set())


def judged(judge, texts=(TEXT, BAD, BAD), deadline=5):
    submissions = [faults.submit(judge, PROBLEM, text, n) for n, text in enumerate(texts)]
    return faults.collect(judge, submissions, deadline)


@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_fault_is_a_wrong_answer_of_its_sample_alone(where, capsys):
    verdicts = judged(Failing(where))
    assert [verdict.status for verdict in verdicts] == ["no_program", "judge_fault", "judge_fault"]
    assert [verdict.reward for verdict in verdicts] == [0.0, 0.0, 0.0]
    assert all(verdict.judged and not verdict.correct for verdict in verdicts)
    assert shares(verdicts)["sandbox/judge_fault_frac"] == 2 / 3

    # Both have the same traceback, which is said once, with the sample that it was of.
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1
    assert "p/1 could not be judged and counts as wrong" in said
    assert "4300 digits" in said or "too deep" in said


def test_a_fault_costs_what_the_judge_asks_for_a_completion_without_anything():
    """In self-play that is -1; so no fault pays more than an answer out of form."""

    class FailingSolver(SolveJudge):
        def _verdict(self, answer):
            if answer.text:
                raise OverflowError
            return super()._verdict(answer)

    judge = FailingSolver(Answering(), load_language("python"))
    puzzle = Puzzle("p", "deduction", Entry("def f(a): return a", ("1",), ("1",)))
    text = "</think><answer>```output\n1\n```</answer>"
    (verdict,) = faults.collect(judge, [faults.submit(judge, puzzle, text)])
    assert (verdict.reward, verdict.status, verdict.correct) == (-1.0, "judge_fault", False)

    # The control rewards a coin for each (seed, problem, sample), for a fault as for the others.
    verdicts = judged(Failing("collect", random_reward=True, seed=3), [BAD] * 8)
    coins = [float(random.Random(f"3/p/{n}").random() < 0.5) for n in range(8)]
    assert [verdict.reward for verdict in verdicts] == coins


@pytest.mark.parametrize("error", [SandboxError("closed"), OSError(24, "too many open files")])
def test_a_fault_of_the_machine_is_masked(error):
    (verdict,) = judged(Judge(Answering(error), "prolog"), [TEXT])
    assert verdict.status == "sandbox_error"
    assert math.isnan(verdict.reward) and math.isnan(verdict.components["correct"])


def test_a_wrong_call_is_said_at_once():
    """A closed pool or a missing interpreter is no sample's fault: the run ends."""

    class Closed:
        def submit(self, job):
            raise SandboxError("this sandbox pool is closed")

    with pytest.raises(SandboxError, match="closed"):
        faults.submit(Judge(Closed(), "prolog"), PROBLEM, TEXT)


def test_in_tests_a_fault_is_raised(monkeypatch):
    monkeypatch.setenv("RARECODE_FAULTS", "raise")
    with pytest.raises(RecursionError, match="too deep"):
        judged(Failing("collect"))
    with pytest.raises(ValueError, match="4300 digits"):
        judged(Failing("submit"))


def test_what_is_not_done_in_time_is_masked_and_the_others_are_judged():
    class Waiting(Answering):
        def submit(self, job):
            if "late(" in "".join(job.files.values()):
                return concurrent.futures.Future()
            return super().submit(job)

    late = completion("r", "late(42).", "late(X)", "prolog")
    verdicts = judged(Judge(Waiting(), "prolog"), [late, TEXT, late], deadline=0.05)
    assert [verdict.status for verdict in verdicts] == ["sandbox_error", "ok", "sandbox_error"]
    assert verdicts[1].reward == 1.0


# ---- everything that judges stands on it ----


class Sampling:
    """A sampler that gives BAD and TEXT for every prompt; its tokens are places in texts."""

    def generate(self, requests, on_done, decode=None):
        groups = []
        for i, _ in enumerate(requests):
            group = [Completion(i, n, [n], [0.0], "stop") for n in range(2)]
            on_done(i, group)
            groups.append(group)
        return groups


TOKENIZER = SimpleNamespace(
    decode=lambda tokens: (BAD, TEXT)[tokens[0]],
    encode=lambda text: [1],
    encode_chat=lambda messages: [1],
    stop_ids=(),
)


def test_evaluation_goes_on_after_a_fault():
    judge = Failing("collect")
    metrics, rows = evaluate(Sampling(), TOKENIZER, judge, [PROBLEM], prompt=lambda _: "", n=2)
    assert [row["status"] for row in rows] == ["judge_fault", "no_program"]
    assert metrics["sandbox/judge_fault_frac"] == 0.5


def test_training_goes_on_after_a_fault():
    settings = SimpleNamespace(
        **{"task": "sums", "short_prompt": True, "examples": 0, "samples": 2, "seed": 0},
        **{"max_new_tokens": 9, "temperature": 1.0, "reward_deadline": 5},
        **{"syntax_mix": False, "overlong_buffer": 0},
    )
    run = SimpleNamespace(
        settings=settings,
        language=load_language("prolog"),
        tokenizer=TOKENIZER,
        sampler=Sampling(),
        judge=Failing("submit"),
        curriculum=Curriculum([PROBLEM], seed=0),
        lengths={},
    )
    samples, _ = sample_and_judge(run, 1)
    assert [sample.verdict.status for sample in samples] == ["judge_fault", "no_program"]


def fails(*_):
    raise OverflowError


def out_of_form():
    raise Refused("format")


def test_self_play_goes_on_after_a_fault(monkeypatch):
    """Of a solver's answer, and of a proposal, where it is read and where it has run."""
    settings = SimpleNamespace(
        max_new_tokens=9,
        temperature=1.0,
        seed=0,
        reward_deadline=5,
        buffer_size=8,
        solve_penalties="",
        propose_penalties="",
        refuse_copies=False,
    )
    language = load_language("python")
    play = loop.Play(settings, language, Answering(), Sampling(), TOKENIZER)
    puzzle = Puzzle("p", "deduction", Entry("def f(a): return a", ("1",), ("1",)))
    monkeypatch.setattr("selfplay.judge.answer_of", lambda text: fails() if text else out_of_form())
    samples = loop.answer(play, [puzzle], 0, 2)
    assert [sample.verdict.status for sample in samples] == ["judge_fault", "judge_fault"]
    assert [sample.verdict.reward for sample in samples] == [-1.0, -1.0]

    monkeypatch.setattr("selfplay.loop.parse_proposal", fails)
    proposed = loop.propose(play, 1, [loop.Proposal("propose/1", "deduction", "?")])[0]
    assert proposed.reason == "judge_fault"

    runner = Runner(Answering(), language)
    trial = begin(runner, Candidate(puzzle.entry))
    monkeypatch.setattr(runner, "finish", fails)
    (candidate,) = check(runner, [trial])
    assert candidate == Candidate(reason="judge_fault")
