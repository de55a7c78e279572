"""What is said before the first step: its arithmetic, and that it changes nothing."""

import subprocess
import sys

import pytest
import torch

import forecast
from batches import micro_batches
from gepo import IRGroup
from model import random_model
from runs import ENVIRONMENT, ROOT, SMALL, assert_same_bits, needs_prolog, run
from sampler import Request, Sampler
from settings import Settings
from test_update import CONFIG


def test_a_line_through_two_measurements():
    intercept, slope = forecast.line_through((4, 0.2), (8, 0.3))
    assert intercept == pytest.approx(0.1)
    assert slope == pytest.approx(0.025)
    # Noise makes neither part negative: 8 cost no less than 4, and 4 no more than half of 8.
    assert forecast.line_through((4, 0.4), (8, 0.3)) == (0.3, 0.0)
    assert forecast.line_through((4, 0.1), (8, 0.4)) == (0.0, 0.05)
    assert forecast.line_through((4, 0.2), (4, 0.2)) == (0.0, 0.05)


def test_seconds_of_sampling():
    """4 prompts of 100 tokens; 32 samples of 50 tokens, 32 together, the longest of 200."""
    sampling = forecast.Sampling(prompt_token=0.01, step=0.1, row=0.02)
    assert sampling.seconds(400, 32 * 50, 200, slots=32) == pytest.approx(4 + 20 + 32)
    # 8 slots: 1,600 tokens take 200 steps of 8 rows; with 4 slots 400 of 4.
    assert sampling.seconds(400, 32 * 50, 200, slots=8) == pytest.approx(4 + 20 + 32)
    assert sampling.seconds(400, 32 * 50, 200, slots=4) == pytest.approx(4 + 40 + 32)


def test_seconds_of_an_update_count_prompts_as_often_as_they_are_computed():
    """2 groups of 4 samples of 10 tokens, prompts of 20: 60 tokens a group.

    A budget of 40 cuts each group in two, and its prompt is computed twice.
    """
    sequences = forecast.step_sequences(list(range(20)), 8, 4, 10)
    training = forecast.Training(batch=1.0, token=0.1)
    whole = micro_batches(sequences, 1000, share_prompts=True)
    assert training.seconds(whole, share_prompts=True) == pytest.approx(1 + 12)
    cut = micro_batches(sequences, 40, share_prompts=True)
    assert training.seconds(cut, share_prompts=True) == pytest.approx(4 + 16)
    assert training.seconds(whole, share_prompts=False) == pytest.approx(1 + 24)


def test_seconds_of_gepo_count_a_prompt_once_a_group():
    """Two groups of 4 members of 10 tokens, prompts of 20: 60 tokens a group, a micro-batch each."""
    training = forecast.Training(batch=1.0, token=0.1)
    members = forecast.step_sequences(list(range(20)), 4, 4, 10)
    groups = [IRGroup("a", members, "a", (), frozenset())] * 2
    seconds = forecast.preference_seconds(groups, training, Settings(share_prompts=True))
    assert seconds == pytest.approx(2 * (1 + 6))


def test_what_is_timed_has_a_step_s_share_of_completions():
    """Prompt of 100, 4 samples of 100 / 4 tokens: 200 a group, half of them completions."""
    prompt = list(range(100))
    settings = Settings(samples=4, max_new_tokens=100, share_prompts=True)
    two_groups = forecast.some_sequences(prompt, 450, settings)
    assert [len(sequence.tokens) for sequence in two_groups] == [25] * 8
    assert len({sequence.prompt_key for sequence in two_groups}) == 2

    cut = forecast.some_sequences(prompt, 100, settings)
    assert [(len(sequence.prompt), len(sequence.tokens)) for sequence in cut] == [(50, 12)] * 4

    # Unshared: 4 x 125 tokens a group, a fifth of them for 100.
    cut = forecast.some_sequences(
        prompt, 100, Settings(samples=4, max_new_tokens=100, share_prompts=False)
    )
    assert [(len(sequence.prompt), len(sequence.tokens)) for sequence in cut] == [(20, 5)] * 4


def test_a_self_play_step_counts_the_answers_that_say_how_hard_a_proposal_is():
    """2 prompts: 6 proposals, each answered 8 times, and 6 answers that are trained on."""
    settings = Settings(task="selfplay", prompts=2, learn_samples=8)
    assert forecast.step_counts(settings) == (18, 6 + 48 + 6, 12)
    assert forecast.step_counts(Settings(prompts=2, samples=8)) == (2, 16, 16)


def test_a_span_has_one_unit():
    assert forecast.span([0.25, 0.5]) == "0.25 to 0.5 s"
    assert forecast.span([50, 144]) == "0.83 to 2.4 min"
    assert forecast.span([44, 112]) == "44 to 112 s"
    assert forecast.span([1800, 9000]) == "0.5 to 2.5 h"


def test_measuring_samples_leaves_later_samples_as_they_are():
    model = random_model(CONFIG, std=0.15).requires_grad_(False)
    requests = [Request(list(range(10)), n=3, max_new_tokens=12, seed=1, id=4)]
    expected = Sampler(model).generate(requests)

    measured = Sampler(model)
    state = torch.get_rng_state()
    rates = forecast.measure_sampling(measured, list(range(10)), 16, 30, temperature=1.0)
    assert rates.prompt_token > 0 and rates.row >= 0 and rates.step >= 0
    assert torch.equal(torch.get_rng_state(), state)
    assert measured.generate(requests) == expected


SILENT = "import sys, train; train.forecast.announce = print; train.main(sys.argv[1:])"


@needs_prolog
@pytest.mark.slow  # a run in a process of its own, beside one that others share
def test_a_run_gives_the_same_bytes_with_and_without_the_forecast(straight, tmp_path):
    subprocess.run(
        [sys.executable, "-c", SILENT, *SMALL, "--name", "silent"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    silent = tmp_path / "runs/silent"
    assert_same_bits(straight, silent, 4)
    for file in ("samples.jsonl", "eval/step_0.jsonl", "eval/step_4.jsonl"):
        assert (straight / file).read_bytes() == (silent / file).read_bytes()


@needs_prolog
def test_what_comes_is_said_before_the_first_evaluation(tmp_path):
    said = run(tmp_path, *SMALL, "--steps", "1", "--name", "said").stdout.splitlines()
    (line,) = [number for number, text in enumerate(said) if text.startswith("what comes: ")]
    (before,) = [number for number, text in enumerate(said) if text.startswith("before ")]
    assert line < before
    for part in ("GB", "a step about", "samples of 6 to 24 tokens", "Less time:", "Less memory:"):
        assert part in said[line]
