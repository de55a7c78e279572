"""Which problems a run asks next."""

from types import SimpleNamespace

import pytest

from tasks.curriculum import Curriculum
from tasks.data import in_passes
from tasks.problems import load_problems, with_few_steps, with_known_steps

PROBLEMS = [SimpleNamespace(id=f"p{number}") for number in range(6)]


def ids(pairs):
    return [problem.id for _, problem in pairs]


def test_without_bounds_all_problems_come_in_passes():
    curriculum = Curriculum(PROBLEMS, seed=3)
    curriculum.learn([(problem.id, False) for problem in PROBLEMS])
    drawn = [pair for _ in range(4) for pair in curriculum.next(4)]
    assert [number for number, _ in drawn] == list(range(16))
    assert [problem for _, problem in drawn] == in_passes(PROBLEMS, range(16), 3)


def test_what_was_too_hard_or_solved_is_passed_over_until_a_pass_has_nothing_else():
    """Rates 0, 1/2 and 1 of p0, p1 and p2; the other three were never asked."""
    curriculum = Curriculum(PROBLEMS, seed=0, low=0.1, high=0.9)
    curriculum.learn([("p0", False), ("p1", True), ("p1", False), ("p2", True), ("p2", True)])
    pairs = curriculum.next(4)
    assert sorted(ids(pairs)) == ["p1", "p3", "p4", "p5"]
    assert len({number for number, _ in pairs}) == 4

    curriculum.learn([(f"p{number}", False) for number in range(1, 6)])
    assert len(curriculum.next(4)) == 4  # nothing teaches: they are asked again


def test_a_rate_is_that_of_the_last_samples():
    curriculum = Curriculum(PROBLEMS[:2], seed=0, low=0.1)
    curriculum.learn([("p0", False), ("p1", True)])
    assert set(ids(curriculum.next(1)) + ids(curriculum.next(1))) == {"p1"}
    curriculum.learn([("p0", True), ("p1", False)])
    assert set(ids(curriculum.next(1)) + ids(curriculum.next(1))) == {"p0"}


def test_what_is_drawn_and_known_is_all_that_a_resumed_run_needs():
    bounds = dict(seed=1, low=0.2, high=0.8)
    outcomes = [("p0", False), ("p3", True), ("p4", True), ("p4", False)]
    straight = Curriculum(PROBLEMS, **bounds)
    straight.next(3)
    straight.learn(outcomes)
    resumed = Curriculum(PROBLEMS, **bounds, drawn=straight.drawn, rates=dict(straight.rates))
    assert [straight.next(2) for _ in range(5)] == [resumed.next(2) for _ in range(5)]


def test_problems_with_few_known_steps():
    problems = load_problems("sums", "train", count=40)
    few = with_few_steps(problems, 2)
    assert few == [problem for problem in problems if len(problem.steps) <= 2]
    assert 0 < len(few) < 40
    with pytest.raises(ValueError, match="raise --max_known_steps"):
        with_few_steps(problems, 0)


def test_the_steps_of_gsm8k_are_those_of_gsm8k_steps(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k_steps").mkdir()
    row = '{"question": "?", "answer": "#### 4"}\n'
    (tmp_path / "gsm8k/train.jsonl").write_text(3 * row)
    (tmp_path / "gsm8k_steps/train.jsonl").write_text(
        '{"id": "train-1", "question": "?", "steps": [{"var": "v1", "expr": "8/2"}], "answer": 4}'
    )
    problems = load_problems("gsm8k", "train", tmp_path)
    assert [len(problem.steps) for problem in with_known_steps(problems, tmp_path)] == [0, 1, 0]
