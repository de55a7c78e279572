"""The cost model stays near what an H200 was measured to do."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import sampler
from bench import predict
from kernels import attention
from runtime.memory import MOST_ROWS, qwen


def test_predictions_are_near_what_was_measured():
    """Within 10 %, and the model that was fitted to another width within 15 %."""
    rows = predict.rollout_rows() + predict.update_rows()
    for name, predicted, measured in rows:
        bound = 0.15 if name.startswith("135M") else 0.10
        if measured is not None:
            assert abs(predict.error(predicted, measured)) < bound, name


@pytest.mark.parametrize(
    "rows, prefix_kernel, measured",
    [(1, True, 1.116), (64, True, 1.386), (256, True, 2.359), (512, True, 3.619)]
    + [(1, False, 1.080), (64, False, 1.290), (256, False, 2.105), (512, False, 3.120)],
)
def test_a_decode_step_takes_what_was_measured(rows, prefix_kernel, measured):
    """Milliseconds of a step at 732 tokens of context, every row with a prompt of its own."""
    code = predict.Code(prefix_kernel=prefix_kernel)
    contexts = np.full(rows, 732)
    seconds = predict.step_seconds(qwen("0.5B"), contexts, 0, rows, code, even=True)
    assert 1e3 * seconds == pytest.approx(measured, rel=0.08)


def test_its_workload_is_the_one_that_was_measured():
    """nano-vllm's lengths come from a seed: 138,539 tokens, as bench.sampler sampled."""
    assert sum(sample.tokens for sample in predict.nano_vllm()) == 138_539


def test_what_the_host_no_longer_waits_for_is_gone():
    """0.5B, 65,536 tokens, no checkpointing: the kernels of the trace took 0.535 s of 0.673."""
    update = predict.Update(budget=65_536, checkpointing=False)
    waiting = predict.update_seconds(qwen("0.5B"), update)
    ahead = predict.update_seconds(qwen("0.5B"), predict.replace(update, waits=False))
    assert waiting == pytest.approx(0.673, rel=0.05)
    assert ahead == pytest.approx(0.535 + 0.013, rel=0.05)  # and clipping and the optimizer


def test_the_present_sampler_is_the_one_that_is_predicted():
    """Its chunk, lag, slots and refill on a GPU, and no kernel for shared prefixes."""
    source = inspect.getsource(sampler.Sampler.__init__)
    present = predict.PRESENT
    assert f"else ({present.look}, {present.late})" in source
    assert present.slots == MOST_ROWS
    assert present.least_started == MOST_ROWS // 16
    assert not present.prefix_kernel and "_prefix" not in Path(attention.__file__).read_text()


def test_a_row_that_has_ended_runs_until_the_host_knows():
    """64 rows of 8 tokens and one of 80: with a late look the 64 take part in 16 steps, not 8."""
    config = qwen("0.5B")
    rows = [predict.Sample(i, 100, 8) for i in range(64)] + [predict.Sample(64, 100, 80)]
    at_once = predict.replace(predict.PRESENT, late=0)
    more = predict.rollout_seconds(config, rows, predict.PRESENT)
    more -= predict.rollout_seconds(config, rows, at_once)
    many, one = np.append(np.zeros(64), 112), np.array([112])
    late = 8 * predict.step_seconds(config, many, 0, 65, predict.PRESENT)
    late -= 8 * predict.step_seconds(config, one, 0, 1, predict.PRESENT)
    last = 8 * predict.step_seconds(config, np.zeros(1), 0, 1, predict.PRESENT)
    assert more == pytest.approx(late + last, rel=1e-6)
