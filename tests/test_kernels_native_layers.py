"""Training's C kernels against their torch references: values and gradients, for the registers of
several processors, and bits that depend neither on threads nor on other rows."""

import pytest
import torch

from kernels import layers, native
from kernels.rope import rope_tables
from model import NativeSegments, PaddedSegments, make_segments
from test_kernels_native import each_target

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(native.library() is None, reason="no C compiler"),
]

ROWS = 150  # three parts of a weight's gradient: 64, 64 and 22 rows


def cases(rows, width):
    """(function, its reference, tensors that get a gradient, the other arguments) by name."""
    x, residual = torch.randn(2, rows, width)
    x[0, 0] = 200.0
    weight = torch.rand(width)
    gate_up = 3 * torch.randn(rows, 2 * width)
    gate_up[0, :4] = torch.tensor([200.0, -200.0, 88.0, 0.0])  # far tails of the sigmoid
    qkv, bias = torch.randn(rows, 5 * width), torch.randn(5 * width)
    turned = (*rope_tables(torch.arange(rows) * 5, width, 1e4), 3, 1)
    norm = (layers.rms_norm, layers.rms_norm_reference)
    add_norm = (layers.add_rms_norm, layers.add_rms_norm_reference)
    rotate = (layers.rotated_qkv, layers.rotated_qkv_reference)
    return {
        "norm": (*norm, (x, weight), (1e-6,)),
        "norm of a sum": (*add_norm, (x, residual, weight), (1e-6,)),
        "swiglu": (layers.swiglu, layers.swiglu_reference, (gate_up,), ()),
        "rotation": (*rotate, (qkv, bias), turned),
        "rotation without bias": (*rotate, (qkv,), (None, *turned)),
    }


each_case = pytest.mark.parametrize("name", cases(1, 16))


def results(function, trained, others, dtype=torch.float32):
    """Outputs of a function, and gradients for upstream gradients that are cosines."""
    inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in trained]
    outputs = function(*inputs, *others)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    upstream = [torch.arange(x.numel()).cos().view(x.shape).to(dtype) for x in outputs]
    torch.autograd.backward(outputs, upstream)
    return [*(x.detach() for x in outputs), *(x.grad for x in inputs)]


@each_target
@each_case
@pytest.mark.parametrize("width", [16, 48, 128])
def test_values_and_gradients_are_the_references(name, width, target, monkeypatch):
    """Against the references in float64: a few roundings of fp32, in sums of 150 rows."""
    monkeypatch.setattr(native, "TARGET", target)
    function, reference, *arguments = cases(ROWS, width)[name]
    ours = results(function, *arguments)
    theirs = results(reference, *arguments, torch.float64)
    for mine, right in zip(ours, theirs, strict=True):
        largest = max(1.0, right.abs().max().item())
        assert (mine - right).abs().max() <= 3e-6 * largest


@each_target
@each_case
def test_bits_do_not_depend_on_threads(name, target, monkeypatch):
    """1,500 rows of 128: enough work to be shared out."""
    monkeypatch.setattr(native, "TARGET", target)
    function, _, *arguments = cases(1500, 128)[name]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = results(function, *arguments)
        torch.set_num_threads(1)
        alone = results(function, *arguments)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert one.equal(other)


@each_case
def test_a_row_depends_on_no_other(name):
    """Outputs and gradients of 7 rows, alone and among 150; a weight's gradient has none."""
    function, _, trained, others = cases(ROWS, 48)[name]
    few = [x[:7] if x.dim() == 2 else x for x in trained]
    tables = [x[:7] if torch.is_tensor(x) else x for x in others]
    whole = results(function, trained, others)
    part = results(function, few, tables)
    compared = 0
    for among, alone in zip(whole, part, strict=True):
        if len(among) == ROWS:
            assert among[:7].equal(alone)
            compared += 1
    assert compared >= 2


def test_the_last_sum_without_a_user_costs_no_gradient_of_zeros():
    """The model's last norm: its sum is dropped."""
    x, residual = torch.randn(2, 5, 16)
    x.requires_grad_()
    weight = torch.rand(16)
    layers.add_rms_norm(x, residual, weight, 1e-6)[0].sum().backward()
    expected = x.detach().requires_grad_()
    layers.add_rms_norm_reference(expected, residual, weight, 1e-6)[0].sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_what_c_cannot_take_goes_to_the_reference():
    """Float64, and rows that fill no vector."""
    for x in (torch.randn(3, 24), torch.randn(3, 16, dtype=torch.float64)):
        weight = torch.ones(x.shape[1], dtype=x.dtype)
        expected = layers.rms_norm_reference(x, weight, 1e-6)
        assert layers.rms_norm(x, weight, 1e-6).equal(expected)


# ---- attention ----

# Rows of each segment; the last of them continue those whose numbers follow.
SEGMENTS = {
    "alone": ([1, 33, 64, 70, 16], None),
    "shared": ([40, 1, 33, 5, 64, 1, 31], [0, 0, 1, 2]),
}
each_cut = pytest.mark.parametrize("cut", SEGMENTS)
each_shape = pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(4, 2, 32), (7, 1, 48), (2, 2, 64)]
)


def qkv_of(rows, heads, kv_heads, head_dim):
    return [torch.randn(rows, count, head_dim) for count in (heads, kv_heads, kv_heads)]


@each_target
@each_cut
@each_shape
def test_attention_is_torchs(heads, kv_heads, head_dim, cut, target, monkeypatch):
    """Values and gradients, against scaled_dot_product_attention in float64."""
    monkeypatch.setattr(native, "TARGET", target)
    segments = make_segments(*SEGMENTS[cut])
    qkv = qkv_of(sum(segments.lengths), heads, kv_heads, head_dim)
    ours = results(NativeSegments(segments), qkv, ())
    theirs = results(PaddedSegments(segments), qkv, (), torch.float64)
    for mine, right in zip(ours, theirs, strict=True):
        largest = max(1.0, right.abs().max().item())
        assert (mine - right).abs().max() <= 3e-6 * largest


@each_cut
def test_attentions_bits_do_not_depend_on_threads(cut):
    segments = make_segments(*SEGMENTS[cut])
    qkv = qkv_of(sum(segments.lengths), 4, 2, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = results(NativeSegments(segments), qkv, ())
        torch.set_num_threads(1)
        alone = results(NativeSegments(segments), qkv, ())
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert one.equal(other)


def test_a_segment_sees_no_other_segment_and_no_later_row():
    """Rows 0-39, 40-42: other values in 42 change row 42 alone, NaN in 0-39 none of 40-42."""
    segments = make_segments([40, 3])
    qkv = qkv_of(43, 4, 2, 32)
    attend = NativeSegments(segments)
    out = attend(*qkv)
    changed = [x.clone() for x in qkv]
    for x in changed:
        x[42] += 1
    assert attend(*changed)[:42].equal(out[:42])
    for x in changed:
        x[:40] = float("nan")
        x[42] -= 1
    assert torch.allclose(attend(*changed)[40:], out[40:], atol=1e-6)


def test_far_apart_scores_neither_overflow_nor_vanish():
    """Scores of 0 and 2,000: the second key has all the weight, and no gradient is NaN."""
    q = torch.full((2, 1, 16), 50.0)
    k = torch.stack([torch.zeros(1, 16), torch.full((1, 16), 10.0)])
    v = torch.stack([torch.zeros(1, 16), torch.ones(1, 16)])
    out, *gradients = results(NativeSegments(make_segments([2])), [q, k, v], ())
    assert out[1].equal(torch.ones(1, 16)) and out[0].equal(torch.zeros(1, 16))
    assert all(gradient.isfinite().all() for gradient in gradients)
