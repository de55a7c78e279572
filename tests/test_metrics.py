"""What a step reports: what could not be judged counts nowhere, and gain is told from sharpening."""

import math
from dataclasses import replace

import pytest

import metrics
from sampler import Completion
from tasks.statistics import interval
from tasks.verdicts import Parsed, Verdict

NAN = float("nan")


def verdict(reward, program="p"):
    """Right when the reward is 1; the sandbox could not judge when it is nan."""
    return Verdict(
        problem="problem",
        reward=reward,
        components={},
        correct=reward == 1.0,
        status="sandbox_error" if math.isnan(reward) else "ok",
        value=None,
        program=program,
        parsed=Parsed("", program, "", True),
    )


def metrics_of(rewards, group_size, programs=None, lengths=None):
    programs = programs or ["p"] * len(rewards)
    lengths = lengths or [2] * len(rewards)
    pairs = []
    for number, (reward, program, length) in enumerate(zip(rewards, programs, lengths)):
        completion = Completion(0, number, [5] * (length - 1) + [2], [-0.5] * length, "stop")
        pairs.append((completion, verdict(reward, program)))
    return metrics.rollout_metrics(pairs, group_size)


def test_groups_are_told_apart_by_their_judged_samples():
    """Right/right, right/wrong, wrong/unjudged: the last has one judged sample and no signal."""
    found = metrics_of([1, 1, 1, 0, 0, NAN], 2)
    assert found["frac_all_right"] == pytest.approx(1 / 3)
    assert found["frac_all_wrong"] == pytest.approx(1 / 3)
    assert found["pass@G"] == pytest.approx(2 / 3)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)


def test_a_steps_figures_have_intervals_over_its_groups():
    """Group means 1 and 0.5: 0.75 -+ 1.96 x 0.354 / sqrt(2); one group's reward has none."""
    found = metrics_of([1, 1, 1, 0], 2)
    assert found["reward_low"] == pytest.approx(0.75 - 0.49)
    assert found["reward_high"] == pytest.approx(0.75 + 0.49)
    assert (found["pass_rate_low"], found["pass_rate_high"]) == interval([1, 0.5])
    assert (found["pass@G_low"], found["pass@G_high"]) == interval([1, 1])
    bounds = (found["frac_reward_zero_std_low"], found["frac_reward_zero_std_high"])
    assert bounds == interval([1, 0])
    assert math.isnan(metrics_of([1, 0], 2)["reward_low"])


def test_each_target_language_has_its_own_rate():
    """Lua 1 of 2, Racket 0 of 1: what was not judged counts in none."""
    completion = Completion(0, 0, [5, 2], [-0.5, -0.5], "stop")
    pairs = []
    for target, reward in (("lua", 1), ("lua", 0), ("racket", 0), ("racket", NAN)):
        pairs.append((completion, replace(verdict(reward), target=target)))
    found = metrics.rollout_metrics(pairs, 2)
    assert found["pass_rate/lua"] == 0.5
    assert found["pass_rate/racket"] == 0.0
    assert not any(name.startswith("pass_rate/") for name in metrics_of([1, 0], 2))


def test_a_group_of_equal_rewards_and_one_that_nobody_judged_has_no_signal():
    assert metrics_of([0, 0, 0, NAN], 4)["frac_reward_zero_std"] == 1.0
    assert metrics_of([0, 1, 0, NAN], 4)["frac_reward_zero_std"] == 0.0


def test_a_group_that_could_not_be_judged_at_all_is_no_group():
    found = metrics_of([NAN, NAN, 1, 0], 2)
    assert found["frac_reward_zero_std"] == 0.0
    assert found["pass@G"] == 1.0


def test_unjudged_samples_are_not_wrong():
    """Of four samples one is right, one wrong, two were not judged: 1/2, not 1/4."""
    found = metrics_of([1, NAN, 0, NAN], 4, lengths=[2, 9, 4, 9])
    assert found["pass_rate"] == 0.5
    assert found["reward"] == 0.5
    assert found["completions/length_solved"] == 2
    assert found["completions/length_unsolved"] == 4
    assert found["sandbox/sandbox_error_frac"] == 0.5


def test_copies_in_a_group_are_one_program():
    """Groups with programs a a b and c, none, none: 2 and 1 distinct ones."""
    found = metrics_of([0, 1, 0, 0, 1, 0], 3, programs=["a", "a", "b", "c", "", ""])
    assert found["completions/distinct_programs"] == 1.5


def test_nothing_judged_gives_no_number():
    found = metrics_of([NAN, NAN], 2)
    for name in ("reward", "pass_rate", "pass@G", "frac_reward_zero_std"):
        assert math.isnan(found[name]), name


def test_a_completion_that_ended_with_a_stop_string_was_not_clipped():
    """Its last token is any token; two of four ran into --max_new_tokens."""
    pairs = []
    for number, reason in enumerate(["stop", "length", "stop", "length"]):
        pairs.append((Completion(0, number, [5, 7], [-0.5, -0.5], reason), verdict(0.0)))
    assert metrics.rollout_metrics(pairs, 4)["completions/clipped_ratio"] == 0.5
