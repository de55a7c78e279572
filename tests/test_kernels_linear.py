"""Training's matrix products on a CPU: torch's, or oneDNN's where that is faster."""

import pytest
import torch
import torch.nn.functional as F

from kernels import linear, logprob

has_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN on any processor."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


@has_onednn
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize("depth, width", [(48, 33), (32, 96)])
def test_product_and_gradients_are_torchs(onednn, rows, depth, width):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator, requires_grad=True)
    weight = torch.randn(width, depth, generator=generator, requires_grad=True)
    gradient = torch.randn(rows, width, generator=generator)

    ours = linear.fast_linear(x, weight)
    theirs = F.linear(x, weight)
    assert ours.grad_fn.name() == "_LinearBackward" and ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5)
    found = torch.autograd.grad(ours, (x, weight), gradient)
    expected = torch.autograd.grad(theirs, (x, weight), gradient)
    for one, other in zip(found, expected):
        assert one.is_contiguous() and torch.allclose(one, other, atol=1e-4)


@has_onednn
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_products_give_the_same_bits(onednn, threads):
    """Enough work for two threads, the same whatever stood in memory before."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 128, generator=generator)
    weight = torch.randn(768, 128, generator=generator, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = set()
        for number in range(5):
            moved = torch.empty(1000 * 128 + number)[number:].view(1000, 128).copy_(x)
            moved.requires_grad_()
            out = linear.fast_linear(moved, weight)
            found = torch.autograd.grad(out.square().sum(), (moved, weight))
            seen.add(tuple(y.detach().numpy().tobytes() for y in (out, *found)))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


@has_onednn
def test_a_frozen_weight_gets_no_gradient(onednn, monkeypatch):
    monkeypatch.setattr(linear, "weight_gradient", None)  # would not be callable
    x = torch.randn(8, 32, requires_grad=True)
    linear.fast_linear(x, torch.randn(16, 32)).sum().backward()
    assert x.grad is not None


@has_onednn
def test_log_probs_take_the_same_products(onednn, monkeypatch):
    """In 3 chunks of 43 tokens and 4 blocks of the vocabulary of 50."""
    monkeypatch.setattr(logprob, "CPU_CHUNK", 43 * 50)
    monkeypatch.setattr(linear, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(129, 32, generator=generator, requires_grad=True)
    weight = torch.randn(50, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (129,), generator=generator)

    for name in ("token_logprobs", "token_logprobs_reference"):
        outputs = getattr(logprob, name)(hidden, weight, targets, 0.7)
        loss = outputs[0].square().mean() + outputs[1].mean()
        found = (*outputs, *torch.autograd.grad(loss, (hidden, weight)))
        if name == "token_logprobs":
            ours = found
    for one, other in zip(ours, found):
        assert torch.allclose(one, other, atol=2e-5)


def test_other_precisions_are_torchs(onednn):
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(8, 32, dtype=dtype)
        weight = torch.randn(16, 32, dtype=dtype)
        assert linear.fast_linear(x, weight).equal(F.linear(x, weight))


@pytest.mark.parametrize(
    "described, capability, expected",
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),  # MKL's AVX2 is as fast
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        ("CPU implementer\t: 0x41\n", "DEFAULT", False),
        (None, "AVX512", False),  # not Linux
    ],
)
def test_onednn_is_for_avx512_that_mkl_leaves_idle(monkeypatch, described, capability, expected):
    def read(path):
        if described is None:
            raise FileNotFoundError(path)
        return described

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(linear.Path, "read_text", read)
    assert linear.onednn_is_faster.__wrapped__() is expected
