"""The exact mode (runtime/exact.py): sampler and trainer agree to the last bit.

Through the Triton kernels, which are interpreted where there is no GPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import kernels.attention
import kernels.head
import kernels.layers
import kernels.rows
from batches import Sequence, score
from kernels.linear import _linear
from model import Config, make_segments, random_model
from runtime import exact
from sampler import Request, Sampler

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter multiplies bf16 as raw bits (triton issue 11584).
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CONFIG = Config(
    vocab_size=150,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


def ordered_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """tl.dot in the interpreter, with every sum over the depth from first to last.

    The interpreter's own is numpy's product, and OpenBLAS sums a row in another order at another
    place in the matrix on some processors (-4.792801 against -4.792802). That a row's sums do not
    depend on the rows beside it is a property of the kernels' tiles and loops, which is tested
    here; so the product of one tile has to have it too, as tensor cores do. The tile's sum is
    made first and then added to `d`, so that another depth of a tile would show.
    """
    from triton.runtime.interpreter import TensorHandle

    total = np.zeros_like(d.data)
    for k in range(a.data.shape[-1]):
        total += a.data[..., :, k, None] * b.data[..., k, None, :]
    return TensorHandle(total + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def ordered(monkeypatch):
    torch.set_num_threads(1)
    if not ON_GPU:
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", ordered_dot)


@pytest.fixture
def model(monkeypatch):
    if not ON_GPU:
        for module in (kernels.layers, kernels.attention, kernels.rows):
            monkeypatch.setattr(module, "use_triton", lambda x: True)
        monkeypatch.setattr(kernels.head, "fits", lambda hidden: True)
        # Short sequences have several splits and pages: the interpreter is slow.
        monkeypatch.setattr(kernels.attention, "SPLIT", 16)
        monkeypatch.setattr(exact, "page_size", lambda config: 16)
    return random_model(CONFIG, seed=1, std=0.2).to(DEVICE, DTYPE)


def sample(model, asked, slots):
    sampler = Sampler(model, slots=slots, exact=True, page_size=exact.page_size(CONFIG))
    sampler.cpu = False  # CUDA's way, on whatever device this is
    return sampler.generate(asked)


def trainer_logprobs(model, asked, groups):
    """The trainer's of every sample: one packed forward, a prompt once for all its samples."""
    sequences = []
    for request, group in zip(asked, groups):
        sequences += [Sequence(request.prompt, completion.tokens) for completion in group]
    rows = score(model, sequences, 10_000, DEVICE, asked[0].temperature, share_prompts=True)
    return [logprob for row in rows for logprob in row]


def test_logprobs_equal_the_trainers_to_the_last_bit(model):
    """Ragged prompts, one of them beyond two pages and splits, two shared by two samples.

    Four rows at a time, then one alone, against one packed forward.
    """
    generator = torch.Generator().manual_seed(3)
    asked = []
    long = 300 if ON_GPU else 38
    for length, n in ((1, 2), (5, 2), (long, 1)):
        prompt = torch.randint(0, 150, (length,), generator=generator).tolist()
        identity = {"seed": 5, "id": len(asked)}
        asked.append(Request(prompt, n=n, max_new_tokens=2, temperature=0.8, **identity))
    groups = sample(model, asked, slots=4)
    drawn = []
    for group in groups:
        for completion in group:
            drawn += completion.logprobs

    assert trainer_logprobs(model, asked, groups) != drawn  # the ordinary arithmetic
    exact.make_exact(model)
    assert trainer_logprobs(model, asked, groups) == drawn

    one = dataclasses.replace(asked[1], n=1)
    alone = sample(model, [one], slots=1)
    expected = dataclasses.replace(groups[1][0], request=0)
    assert alone == [[expected]]


def test_every_kernel_of_the_exact_mode_is_compiled_once(model, monkeypatch):
    """For batches of 1 to 1,000 rows, of short and long sequences, from the middle of others.

    Triton's own rule for when a kernel is compiled anew says so, for sm_80 and sm_90. With M, the
    rows, left to it, _merge_tiles_kernel has three forms, whose 64 x 32 tiles of partial sums are
    spread over the threads in three ways ([4, 8], [32, 1] and [1, 32] threads of a warp): sums in
    three orders, 2.9e-6 apart on an H200.
    """
    launched = set()
    kernel_class = type(kernels.head._stats_kernel)
    run = kernel_class.run

    def noted(kernel, *arguments, **options):
        launched.add(kernel.fn.__name__)
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(kernel_class, "run", noted)
    asked = [Request([1, 2, 3], n=2, max_new_tokens=2)]
    groups = sample(model, asked, slots=2)
    exact.make_exact(model)
    trainer_logprobs(model, asked, groups)

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.aot", "--exact"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        assert json.loads(line)["compilations"] == dict.fromkeys(launched, 1)


def test_the_exact_mode_samples_at_one_temperature(model):
    asked = [Request([1, 2], temperature=0.8), Request([3], temperature=0.0)]
    with pytest.raises(ValueError, match="one temperature"):
        sample(model, asked, slots=2)


@pytest.mark.parametrize("wrong", [{"hidden_size": 96}, {"intermediate_size": 130}])
def test_a_model_that_the_kernels_do_not_take_is_refused(wrong):
    """cuBLAS, whose sums follow the batch, would stand in for them without a word."""
    other = random_model(dataclasses.replace(CONFIG, **wrong), seed=1)
    with pytest.raises(ValueError, match="multiples of 64.*leave out --exact"):
        exact.make_exact(other)


def test_gradient_is_the_ordinary_one(model, monkeypatch):
    """Two packed segments, of 17 and 7 tokens, through the ordinary way and the exact one."""

    def gradient():
        tokens = torch.arange(24)
        positions = torch.cat([torch.arange(17), torch.arange(7)])
        segments = make_segments([17, 7])
        batch = [x.to(DEVICE) for x in (tokens, positions, segments)]
        hidden = model.hidden(*batch)
        upstream = torch.linspace(-1, 1, hidden.numel(), device=DEVICE).view_as(hidden)
        loss = (hidden.float() * upstream).sum()
        return hidden, torch.autograd.grad(loss, list(model.parameters()))

    # Which way ran is counted: in bf16 at this shape both may give the same bits.
    calls = []

    def counted(name):
        function = getattr(exact, name)

        def call(*arguments):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(exact, name, call)

    counted("fixed_linear")
    counted("attend_to_pages")
    plain_hidden, plain = gradient()
    assert calls == []
    exact.make_exact(model)
    hidden, ours = gradient()
    # Two layers of qkv, o, gate-up and down.
    assert calls.count("fixed_linear") == 8 and calls.count("attend_to_pages") == 2

    tolerance = 3e-2 if ON_GPU else 1e-4
    torch.testing.assert_close(hidden, plain_hidden, atol=tolerance, rtol=tolerance)
    for a, b in zip(ours, plain):
        scale = b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_of_the_product_do_not_depend_on_their_number(arch):
    if ON_GPU and arch > torch.cuda.get_device_capability()[0] * 10:
        pytest.skip("TMA needs Hopper")
    x = torch.randn(150, 128).to(DEVICE, DTYPE)
    weight = torch.randn(200, 128).to(DEVICE, DTYPE)
    whole = _linear(x, weight, arch)
    tolerance = 0.3 if ON_GPU else 1e-4
    torch.testing.assert_close(whole, x @ weight.T, atol=tolerance, rtol=1e-2)
    for first, last in ((0, 1), (7, 9), (20, 149)):
        part = _linear(x[first:last], weight, arch)
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("arch", [80, 90])
def test_logprobs_do_not_depend_on_the_number_of_rows(arch):
    """One, a multiple of 16 and others, from the middle of a batch: the three forms that Triton
    would compile. On a GPU the 40,000 entries are 313 tiles, so that the merge has sums to order.
    """
    if ON_GPU and arch > torch.cuda.get_device_capability()[0] * 10:
        pytest.skip("TMA needs Hopper")
    tokens, vocabulary = (300, 40_000) if ON_GPU else (40, 300)
    hidden = torch.randn(tokens, 128).to(DEVICE, DTYPE)
    weight = torch.randn(vocabulary, 128).to(DEVICE, DTYPE) * 0.3
    targets = torch.randint(0, vocabulary, (tokens,)).to(DEVICE)
    whole = kernels.head.stats(hidden, weight, targets, 0.8, arch)
    for first, last in ((3, 4), (16, 32), (7, 30)):
        part = kernels.head.stats(hidden[first:last], weight, targets[first:last], 0.8, arch)
        for of_part, of_whole in zip(part, whole):
            assert torch.equal(of_part, of_whole[first:last])
