"""The torch references: against independent formulas in float64, gradcheck, and numbers worked by
hand."""

import json

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from bench import kernels as bench
from kernels import advantage, attention, layers, logprob, sampling
from kernels.rope import apply_rope_reference, rope_tables

DOUBLE = torch.float64
NAN = float("nan")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, grad=True):
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=grad)


# ---- layers ----


def test_layers_have_the_right_gradients():
    x = randn(5, 8)
    residual = randn(5, 8)
    weight = randn(8)
    assert gradcheck(layers.rms_norm, (x, weight, 1e-6))
    assert gradcheck(layers.add_rms_norm, (x, residual, weight, 1e-6))
    assert gradcheck(layers.swiglu, (randn(5, 6),))
    cos, sin = rope_tables(torch.arange(5), 4, 1e4)
    assert gradcheck(layers.rotated_qkv, (randn(5, 20), randn(20), cos, sin, 3, 1))


def test_norm_equals_torchs():
    x = randn(5, 8, grad=False)
    weight = randn(8, grad=False)
    expected = F.rms_norm(x, (8,), weight, 1e-6)
    assert torch.allclose(layers.rms_norm(x, weight, 1e-6), expected)


def test_rope_is_a_complex_rotation():
    # Position 1, head dim 4, theta 10000: angles 1 and 10000 ** (-2 / 4) = 0.01.
    cos, _ = rope_tables(torch.tensor([1]), 4, 1e4)
    assert torch.allclose(cos, torch.tensor([[1.0, 0.01]]).cos())

    cos, sin = rope_tables(torch.tensor([0, 1, 7]), 8, 1e4)
    q = randn(3, 2, 8, grad=False)
    first, second = q.chunk(2, -1)
    angles = torch.complex(cos.double(), sin.double())[:, None]
    rotated = torch.complex(first, second) * angles
    expected = torch.cat((rotated.real, rotated.imag), -1)
    assert torch.allclose(apply_rope_reference(q, cos, sin), expected)


def test_bf16_norm_rounds_before_its_weight_like_hugging_face():
    x = torch.randn(64, 96).bfloat16()
    weight = torch.randn(96).bfloat16()
    mean_square = x.float().pow(2).mean(-1, keepdim=True)
    normed = x.float() * torch.rsqrt(mean_square + 1e-6)
    expected = weight * normed.bfloat16()
    assert torch.equal(layers.rms_norm(x, weight, 1e-6), expected)


def test_qkv_rope_write_puts_each_token_into_its_slot_and_nothing_else():
    heads, kv_heads, head_dim, page_size = 6, 2, 8, 4
    width = (heads + 2 * kv_heads) * head_dim
    qkv = randn(5, width, grad=False)
    bias = randn(width, grad=False)
    cos, sin = rope_tables(torch.arange(5), head_dim, 1e4)
    k_pages = torch.full((3, kv_heads, page_size, head_dim), 7.0, dtype=DOUBLE)
    v_pages = k_pages.clone()
    slots = torch.tensor([5, -1, 0, 11, 6])
    q = layers.qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, heads)

    by_head = (qkv + bias).view(5, -1, head_dim)
    full_q, k, v = by_head.split([heads, kv_heads, kv_heads], 1)
    assert torch.equal(q, apply_rope_reference(full_q, cos, sin))

    flat_k = k_pages.transpose(1, 2).reshape(-1, kv_heads, head_dim)
    flat_v = v_pages.transpose(1, 2).reshape(-1, kv_heads, head_dim)
    written = slots >= 0
    used = slots[written]
    assert torch.equal(flat_k[used], apply_rope_reference(k, cos, sin)[written])
    assert torch.equal(flat_v[used], v[written])

    untouched = [slot for slot in range(12) if slot not in used.tolist()]
    assert (flat_k[untouched] == 7).all()
    assert (flat_v[untouched] == 7).all()


# ---- attention ----


def paged_case(
    lengths,
    per_kv,
    kv_heads,
    head_dim,
    page_size,
    dtype=DOUBLE,
    device="cpu",
    generator=None,
):
    """(q, k_pages, v_pages, block_tables, lengths) of a random paged cache.

    NaN stands in every slot that no sequence owns, -7 in unused table entries.
    """
    pages_of = [-(-length // page_size) for length in lengths]
    count = sum(pages_of)
    order = (torch.randperm(count + 2, generator=generator) + 1).tolist()
    k_pages = torch.full((count + 3, kv_heads, page_size, head_dim), NAN, dtype=dtype)
    v_pages = k_pages.clone()
    tables = torch.full((len(lengths), max(pages_of) + 1), -7, dtype=torch.int32)

    for row, length in enumerate(lengths):
        for index in range(pages_of[row]):
            page = order.pop()
            tables[row, index] = page
            used = min(page_size, length - index * page_size)
            for pages in (k_pages, v_pages):
                values = torch.randn(kv_heads, used, head_dim, generator=generator)
                pages[page, :, :used] = values.to(dtype)

    heads = per_kv * kv_heads
    q = torch.randn(len(lengths), heads, head_dim, generator=generator).to(dtype)
    counts = torch.tensor(lengths, dtype=torch.int32)
    return tuple(x.to(device) for x in (q, k_pages, v_pages, tables, counts))


@pytest.mark.parametrize(
    "per_kv, kv_heads, page_size, lengths",
    [
        (7, 2, 4, [0, 1, 4, 11]),
        (3, 3, 16, [3, 5]),
        (6, 1, 8, [0, 0, 1]),
        (8, 2, 16, [33]),
    ],
)
def test_paged_attention_equals_attention_of_each_sequence_alone(
    per_kv, kv_heads, page_size, lengths
):
    q, k_pages, v_pages, tables, counts = paged_case(lengths, per_kv, kv_heads, 8, page_size)
    got = attention.paged_attention(q, k_pages, v_pages, tables, counts, 0.3)

    def contiguous(pages, row, length):
        count = -(-length // page_size)
        own = pages[tables[row, :count].long()]
        joined = own.transpose(0, 1).reshape(kv_heads, -1, 8)
        return joined[:, :length].repeat_interleave(per_kv, 0)

    for row, length in enumerate(lengths):
        if length == 0:
            assert (got[row] == 0).all()
            continue
        k = contiguous(k_pages, row, length)
        v = contiguous(v_pages, row, length)
        expected = F.scaled_dot_product_attention(q[row][:, None], k, v, scale=0.3)
        assert torch.allclose(got[row], expected[:, 0])


# ---- log-prob ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])  # 9 chunks of a token, 3 of three, 1 of nine
def test_chunked_logprobs_equal_the_reference_and_pass_gradcheck(monkeypatch, chunk, temperature):
    monkeypatch.setattr(logprob, "CPU_CHUNK", chunk)
    hidden = randn(9, 6)
    weight = randn(13, 6)
    targets = torch.randint(0, 13, (9,))
    arguments = (hidden, weight, targets, temperature)

    ours = logprob.token_logprobs(*arguments)
    theirs = logprob.token_logprobs_reference(*arguments)
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    assert torch.allclose(ours[1], theirs[1], atol=1e-12)
    assert gradcheck(logprob.token_logprobs, arguments)


def test_logprobs_of_large_logits():
    # Logits 80, -80, 79.2 and their negatives.
    hidden = torch.tensor([[80.0], [-80.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.99]])
    targets = torch.tensor([1, 0])
    logp, entropy = logprob.token_logprobs(hidden, weight, targets)
    exact = logprob.token_logprobs_reference(hidden.double(), weight.double(), targets)
    assert torch.allclose(logp.double(), exact[0], rtol=1e-6)
    assert torch.allclose(entropy.double(), exact[1], atol=1e-6)


def test_logprobs_of_no_tokens_at_all():
    hidden = torch.zeros(0, 1, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    logp, entropy = logprob.token_logprobs(hidden, torch.ones(3, 1), targets)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 1)


# ---- group statistics ----


def test_group_statistics_of_a_worked_example():
    # Group 7: 1, 0, 0, 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4. Group 3: one member.
    rewards = torch.tensor([1.0, 0, 5, 0, 0])
    group_ids = torch.tensor([7, 7, 3, 7, 7])
    mean, std, size, no_signal = advantage.group_statistics(rewards, group_ids)
    assert mean.tolist() == [0.25, 0.25, 5, 0.25, 0.25]
    assert std.tolist() == [0.5, 0.5, 0, 0.5, 0.5]
    assert size.tolist() == [4, 4, 1, 4, 4]
    assert no_signal.tolist() == [False, False, True, False, False]


def test_equal_rewards_are_no_signal_and_nan_counts_nowhere():
    # 0.1 + 0.1 + 0.1 divided by 3 is not 0.1 in fp32: only an exact comparison tells.
    rewards = torch.tensor([0.1, 0.1, 0.1, NAN, NAN, NAN, 1.0, 0.0, NAN])
    group_ids = torch.tensor([3, 3, 3, 3, 6, 6, 9, 9, 9])
    mean, std, size, no_signal = advantage.group_statistics(rewards, group_ids)
    assert no_signal.tolist() == [True] * 6 + [False, False, True]
    assert size.tolist() == [3] * 4 + [0, 0] + [2] * 3
    assert mean[6:8].tolist() == [0.5, 0.5]
    assert all(x.isfinite().all() for x in (mean, std))


def test_weights_make_them_statistics_over_tokens():
    rewards = torch.tensor([1.0, 0.5, 0.0, 2.0])
    lengths = torch.tensor([1, 5, 2, 3])
    group_ids = torch.tensor([0, 0, 0, 1])
    tokens = rewards[:3].repeat_interleave(lengths[:3])
    mean, std, size, _ = advantage.group_statistics(rewards, group_ids, lengths)
    assert torch.allclose(mean[:3], tokens.mean())
    assert torch.allclose(std[:3], tokens.std())
    assert size.tolist() == [8, 8, 8, 3]


# ---- sampling ----


def keys(count, seed=1):
    """Seeds, requests, samples, positions: one request, positions 0..count-1."""
    zero = torch.zeros(count, dtype=torch.int64)
    return zero + seed, zero + 7, zero, torch.arange(count)


def chi_square(tokens, probabilities):
    """(Pearson's statistic - degrees of freedom) in standard deviations.

    Over cells of at least 5 expected draws; the rest are pooled.
    """
    expected = probabilities * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    big = expected >= 5
    expected = F.pad(expected[big], (0, 1), value=expected[~big].sum())
    counts = F.pad(counts[big], (0, 1), value=counts[~big].sum())

    cells = expected > 0
    statistic = ((counts - expected) ** 2 / expected)[cells].sum()
    freedom = cells.sum() - 1
    return ((statistic - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_softmax(temperature):
    draws, vocabulary = 40_000, 400
    hidden = torch.randn(1, 5)
    weight = torch.randn(vocabulary, 5)
    tokens, logp = sampling.sample_tokens(
        hidden.expand(draws, -1),
        weight,
        torch.full((draws,), temperature),
        sampling.uniforms_reference(*keys(draws)),
    )
    logits = hidden.double() @ weight.double().T
    probabilities = (logits / temperature).softmax(-1)[0]
    assert abs(chi_square(tokens, probabilities)) < 4
    assert torch.allclose(logp.double(), probabilities.log()[tokens], atol=1e-5)


def test_chi_square_notices_a_wrong_distribution():
    probabilities = torch.randn(400, dtype=DOUBLE).softmax(-1)
    tilted = probabilities * torch.linspace(0.85, 1.15, 400)  # up to 15 % off
    tokens = torch.multinomial(tilted / tilted.sum(), 40_000, replacement=True)
    assert chi_square(tokens, probabilities) > 4


def test_a_draw_depends_on_its_key_alone():
    hidden = torch.randn(40, 8)
    weight = torch.randn(300, 8)
    ones = torch.ones(40)
    key = keys(40)

    def draw(rows, key):
        """Tokens of some rows, with the given key of each."""
        temperature = ones[: len(key[0])]
        uniforms = sampling.uniforms_reference(*key)
        return sampling.sample_tokens(hidden[rows], weight, temperature, uniforms)[0]

    everything = torch.arange(40)
    together = draw(everything, key)
    order = torch.randperm(40)
    shuffled = draw(order, [x[order] for x in key])
    assert torch.equal(shuffled, together[order])
    for row in everything.split(1):
        assert draw(row, [x[row] for x in key]) == together[row]

    for changed in range(4):
        other = list(key)
        other[changed] = key[changed] + 1
        assert not torch.equal(draw(everything, other), together)


def test_uniforms_are_uniform_and_independent():
    u0, u1 = sampling.uniforms_reference(*keys(100_000))
    assert 0 < min(u0.min(), u1.min())
    assert max(u0.max(), u1.max()) < 1
    # 16 x 16 equal cells of the unit square: chi-square of 255 degrees of freedom.
    cell = u0 * 16 + (u1 * 16).floor() * 16
    counts = torch.histc(cell, 256, 0, 256)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(statistic - 255) < 4 * (2 * 255) ** 0.5


def test_greedy_is_the_argmax_with_the_untempered_logprob():
    hidden = torch.randn(30, 8)
    weight = torch.randn(300, 8)
    uniforms = sampling.uniforms_reference(*keys(30))
    tokens, logp = sampling.sample_tokens(hidden, weight, torch.zeros(30), uniforms)
    expected = (hidden @ weight.T).log_softmax(-1)
    assert torch.equal(tokens, expected.argmax(-1))
    assert torch.allclose(logp, expected.amax(-1), atol=1e-5)


@pytest.mark.parametrize(
    "top_p, top_k, kept",
    [
        (0.6, 0, [0, 2]),  # 0.4 alone is less than 0.6, 0.4 + 0.3 is not
        (0.71, 0, [0, 2, 3]),
        (1.0, 2, [0, 2]),
        (0.5, 3, [0, 2]),  # of the first three, renormalised: 0.47, 0.35, 0.18
        (1.0, 0, [0, 1, 2, 3, 4]),
        (0.1, 0, [0]),
    ],
)
def test_truncated_sampling_draws_from_the_nucleus_and_says_its_logprob(top_p, top_k, kept):
    draws = 20_000
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
    tokens, logp = sampling.sample_logits(
        probabilities.log().expand(draws, -1),
        torch.ones(draws),
        sampling.uniforms_reference(*keys(draws)),
        torch.full((draws,), top_p),
        torch.full((draws,), top_k),
    )
    left = torch.zeros(5, dtype=DOUBLE)
    left[kept] = probabilities[kept].double()
    left /= left.sum()
    assert sorted(set(tokens.tolist())) == kept
    assert torch.allclose(logp.double(), left.log()[tokens], atol=1e-5)
    assert len(kept) == 1 or abs(chi_square(tokens, left)) < 4


def test_greedy_rows_are_not_truncated():
    logits = torch.tensor([[0.4, 0.05, 0.3, 0.15, 0.1]]).log()
    zero = torch.zeros(1)
    uniforms = sampling.uniforms_reference(*keys(1))
    tokens, logp = sampling.sample_logits(logits, zero, uniforms, zero + 0.1, zero.long())
    assert tokens.item() == 0
    assert logp.exp().item() == pytest.approx(0.4)


# ---- the bench ----


def test_the_bench_runs_every_kernel_and_ends_in_json(capsys):
    bench.main(["--smoke", "--no-compile"])
    last_line = capsys.readouterr().out.splitlines()[-1]
    rows = json.loads(last_line)["rows"]
    assert len(rows) == 16
    for row in rows:
        for times in (row["ours"], *row["peers"].values()):
            assert times["median"] > 0, row
            assert times["first_call"] > 0, row


def test_the_bench_knows_its_families():
    with pytest.raises(SystemExit, match="unknown tpu"):
        bench.main(["--smoke", "--only", "tpu"])
