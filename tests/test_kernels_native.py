"""The C kernels of the CPU sampler against their torch references: values, bits that do not depend on the batch, and what happens without a compiler."""

import pytest
import torch

from kernels import native

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C compiler with OpenMP")


def attention_case(heads, lengths, seed=0):
    """Rows that share `lengths[i][0]` tokens and have `lengths[i][1]` of their own, in a pool full of random keys and values; the third is not alive."""
    query, kv, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    rows, run, tokens = len(lengths), 64, 64 * len(lengths) + 640
    shared, own = torch.full((rows,), 64 * rows), torch.arange(rows) * run
    alive = torch.arange(rows) != 2
    angle = torch.rand(rows, head_dim // 2, generator=generator)
    where = (
        shared,
        torch.tensor([a for a, _ in lengths]),
        own,
        torch.tensor([b for _, b in lengths]),
        alive,
    )
    qkv = torch.randn(rows, (query + 2 * kv) * head_dim, generator=generator)
    return (
        (angle.cos(), angle.sin(), *where),
        qkv,
        torch.randn(2 * kv, tokens, head_dim, generator=generator),
    )


def run(heads, tensors, qkv, cache):
    cache, out = cache.clone(), torch.full((len(qkv), heads[0] * heads[2]), 7.0)
    native.attention(heads, *tensors)(qkv.clone(), cache, out)
    return out, cache


LENGTHS = [(0, 1), (5, 16), (9, 3), (16, 17), (633, 64), (1, 2), (40, 33)]


@pytest.mark.parametrize(
    "heads", [(4, 4, 16), (9, 3, 64), (14, 2, 64), (12, 2, 128), (5, 1, 32), (16, 8, 48)]
)
def test_attention_is_the_reference(heads):
    tensors, qkv, cache = attention_case(heads, LENGTHS)
    out, written = run(heads, tensors, qkv, cache)
    expected, pages = torch.full_like(out, 7.0), cache.clone()
    native.attention_reference(heads, *tensors, qkv.clone(), pages, expected)
    assert torch.allclose(out, expected, atol=3e-6, rtol=1e-5) and torch.allclose(
        written, pages, atol=1e-6
    )
    assert (out[2] == 7).all() and (written != cache).sum() == (len(LENGTHS) - 1) * 2 * heads[
        1
    ] * heads[2]  # nothing but the new tokens


def test_a_row_is_the_same_alone_and_with_any_threads():
    heads = (14, 2, 64)
    tensors, qkv, cache = attention_case(heads, LENGTHS)
    torch.set_num_threads(2)
    many = [
        torch.cat([x] * 40) for x in tensors
    ]  # enough work to be shared out; each copy writes what the others write
    together = run(heads, many, torch.cat([qkv] * 40), cache)[0].view(40, len(LENGTHS), -1)
    torch.set_num_threads(1)
    for i in (0, 1, 3, 4, 5, 6):
        alone, _ = run(heads, [x[i : i + 1] for x in tensors], qkv[i : i + 1], cache)
        assert (together[:, i] == alone).all()


def test_norm_and_swiglu_are_the_references(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(37, 576, generator=generator)
    x[0, :4] = torch.tensor([200.0, -200.0, 88.0, 0.0])  # far tails of the sigmoid
    weight = torch.rand(576, generator=generator)
    ours = native.rms_norm(x, weight, 1e-6), native.swiglu(x)
    monkeypatch.setattr(native, "library", lambda: None)
    torch.testing.assert_close(
        ours, (native.rms_norm(x, weight, 1e-6), native.swiglu(x)), atol=1e-6, rtol=2e-6
    )


def test_widths_that_fill_no_vector_and_other_dtypes_take_the_reference():
    assert (
        native.usable(torch.zeros(1), 24) is None
        and native.usable(torch.zeros(1, dtype=torch.float64), 16) is None
    )
    assert native.rms_norm(torch.ones(2, 24), torch.ones(24), 0.0).equal(torch.ones(2, 24))


def test_without_a_compiler_one_sentence_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is None
    assert "apt-get install gcc" in capsys.readouterr().err and not list(tmp_path.rglob("*.so"))
