"""The torch references: against independent formulas in float64, gradcheck, and numbers worked by hand."""

import json

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from bench import kernels as bench
from kernels import advantage, attention, layers, logprob, sampling

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, grad=True):
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=grad)


# layers


def test_layers_have_the_right_gradients():
    x, residual, weight, gate_up = randn(5, 8), randn(5, 8), randn(8), randn(5, 6)
    assert gradcheck(lambda *a: layers.rms_norm(*a, 1e-6), (x, weight))
    assert gradcheck(lambda *a: layers.add_rms_norm(*a, 1e-6), (x, residual, weight))
    assert gradcheck(layers.swiglu, (gate_up,))
    cos, sin = layers.rope_tables(torch.arange(5), 4, 1e4)
    assert gradcheck(lambda q: layers.apply_rope(q, cos, sin), (randn(5, 3, 4),))


def test_layers_equal_independent_formulas():
    x, weight = randn(5, 8, grad=False), randn(8, grad=False)
    assert torch.allclose(layers.rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))
    cos, sin = layers.rope_tables(torch.tensor([0, 1, 7]), 8, 1e4)
    assert torch.allclose(
        layers.rope_tables(torch.tensor([1]), 4, 1e4)[0], torch.tensor([[1.0, 0.01]]).cos()
    )
    q = randn(3, 2, 8, grad=False)
    rotated = torch.complex(*q.chunk(2, -1)) * torch.complex(cos.double(), sin.double())[:, None]
    assert torch.allclose(
        layers.apply_rope(q, cos, sin), torch.cat((rotated.real, rotated.imag), -1)
    )


def test_bf16_norm_rounds_before_its_weight_like_hugging_face():
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(layers.rms_norm(x, weight, 1e-6), weight * normed.bfloat16())


def test_qkv_rope_write_puts_each_token_into_its_slot_and_nothing_else():
    heads, kv_heads, head_dim, page_size = 6, 2, 8, 4
    qkv, bias = (
        randn(5, (heads + 2 * kv_heads) * head_dim, grad=False),
        randn((heads + 2 * kv_heads) * head_dim, grad=False),
    )
    cos, sin = layers.rope_tables(torch.arange(5), head_dim, 1e4)
    k_pages = torch.full((3, kv_heads, page_size, head_dim), 7.0, dtype=DOUBLE)
    v_pages = k_pages.clone()
    slots = torch.tensor([5, -1, 0, 11, 6])
    q = layers.qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, heads)
    full_q, k, v = (qkv + bias).view(5, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    assert torch.equal(q, layers.apply_rope(full_q, cos, sin))
    flat_k, flat_v = (
        pages.transpose(1, 2).reshape(-1, kv_heads, head_dim) for pages in (k_pages, v_pages)
    )
    used = slots[slots >= 0]
    assert torch.equal(flat_k[used], layers.apply_rope(k, cos, sin)[slots >= 0]) and torch.equal(
        flat_v[used], v[slots >= 0]
    )
    untouched = [slot for slot in range(12) if slot not in used.tolist()]
    assert (flat_k[untouched] == 7).all() and (flat_v[untouched] == 7).all()


# attention


def paged_case(
    lengths, per_kv, kv_heads, head_dim, page_size, dtype=DOUBLE, device="cpu", generator=None
):
    """Random paged cache with NaN in every slot that no sequence owns and -7 in unused table entries."""
    pages_of = [-(-n // page_size) for n in lengths]
    order = (torch.randperm(sum(pages_of) + 2, generator=generator) + 1).tolist()
    k_pages = torch.full(
        (sum(pages_of) + 3, kv_heads, page_size, head_dim), float("nan"), dtype=dtype
    )
    v_pages, tables = (
        k_pages.clone(),
        torch.full((len(lengths), max(pages_of) + 1), -7, dtype=torch.int32),
    )
    for row, length in enumerate(lengths):
        for index in range(pages_of[row]):
            page, used = order.pop(), min(page_size, length - index * page_size)
            tables[row, index] = page
            k_pages[page, :, :used] = torch.randn(kv_heads, used, head_dim, generator=generator).to(
                dtype
            )
            v_pages[page, :, :used] = torch.randn(kv_heads, used, head_dim, generator=generator).to(
                dtype
            )
    q = torch.randn(len(lengths), per_kv * kv_heads, head_dim, generator=generator).to(dtype)
    return tuple(
        x.to(device)
        for x in (q, k_pages, v_pages, tables, torch.tensor(lengths, dtype=torch.int32))
    )


@pytest.mark.parametrize(
    "per_kv, kv_heads, page_size, lengths",
    [(7, 2, 4, [0, 1, 4, 11]), (3, 3, 16, [3, 5]), (6, 1, 8, [0, 0, 1]), (8, 2, 16, [33])],
)
def test_paged_attention_equals_attention_of_each_sequence_alone(
    per_kv, kv_heads, page_size, lengths
):
    q, k_pages, v_pages, tables, length = paged_case(lengths, per_kv, kv_heads, 8, page_size)
    got = attention.paged_attention(q, k_pages, v_pages, tables, length, 0.3)
    for row, n in enumerate(lengths):
        if n == 0:
            assert (got[row] == 0).all()
            continue
        pages = tables[row, : -(-n // page_size)].long()
        k, v = (
            x[pages].transpose(0, 1).reshape(kv_heads, -1, 8)[:, :n].repeat_interleave(per_kv, 0)
            for x in (k_pages, v_pages)
        )
        assert torch.allclose(
            got[row], F.scaled_dot_product_attention(q[row][:, None], k, v, scale=0.3)[:, 0]
        )


# log-prob


def head_case(tokens=9, vocabulary=13, width=6):
    return randn(tokens, width), randn(vocabulary, width), torch.randint(0, vocabulary, (tokens,))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_chunked_logprobs_equal_the_reference_and_pass_gradcheck(monkeypatch, chunk, temperature):
    monkeypatch.setattr(logprob, "CPU_CHUNK", chunk)
    hidden, weight, targets = head_case()
    got = logprob.token_logprobs(hidden, weight, targets, temperature)
    for ours, theirs in zip(
        got, logprob.token_logprobs_reference(hidden, weight, targets, temperature)
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert gradcheck(
        lambda h, w: logprob.token_logprobs(h, w, targets, temperature), (hidden, weight)
    )


def test_logprobs_of_large_logits_and_of_no_tokens_at_all():
    hidden, weight = torch.tensor([[80.0], [-80.0]]), torch.tensor([[1.0], [-1.0], [0.99]])
    logp, entropy = logprob.token_logprobs(hidden, weight, torch.tensor([1, 0]))
    exact, exact_entropy = logprob.token_logprobs_reference(
        hidden.double(), weight.double(), torch.tensor([1, 0])
    )
    assert torch.allclose(logp.double(), exact, rtol=1e-6) and torch.allclose(
        entropy.double(), exact_entropy, atol=1e-6
    )
    empty = torch.zeros(0, 1, requires_grad=True)
    logp, entropy = logprob.token_logprobs(empty, weight, torch.zeros(0, dtype=torch.int64))
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,) and empty.grad.shape == (0, 1)


def clipped(old, advantages):
    def loss(logp, entropy, rows):
        ratio = (logp - old[rows]).exp()
        return (
            -torch.minimum(ratio * advantages[rows], ratio.clamp(0.8, 1.28) * advantages[rows]) / 9
            - 0.01 * entropy
        )

    return loss


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_fused_loss_and_gradient_equal_the_two_pass_form(monkeypatch, chunk):
    monkeypatch.setattr(logprob, "CPU_CHUNK", chunk)
    hidden, weight, targets = head_case()
    old, advantages = randn(9, grad=False) - 2, randn(9, grad=False)
    results = []
    for per_token in (True, False):
        loss, logp, entropy = logprob.fused_policy_loss(
            hidden, weight, targets, clipped(old, advantages), 0.7, per_token
        )
        results.append((loss, logp, entropy, *torch.autograd.grad(3 * loss, (hidden, weight))))
    for fused, two_pass in zip(*results):
        assert torch.allclose(fused, two_pass, atol=1e-12)
    assert gradcheck(
        lambda h, w: logprob.fused_policy_loss(h, w, targets, clipped(old, advantages), 0.7)[0],
        (hidden, weight),
    )


def test_two_pass_form_lets_a_loss_couple_tokens(monkeypatch):
    monkeypatch.setattr(logprob, "CPU_CHUNK", 1)
    hidden, weight, targets = head_case()
    sequence_loss = lambda logp, entropy, rows: (
        (logp.view(3, 3).mean(1) ** 2)[:, None].expand(3, 3).flatten()
    )  # noqa: E731
    assert gradcheck(
        lambda h, w: logprob.fused_policy_loss(h, w, targets, sequence_loss, per_token=False)[0],
        (hidden, weight),
    )


# advantages and the policy loss


def test_advantages_of_a_worked_example():
    rewards, ids = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)
    expected = {"grpo": 1.5, "mean": 0.75, "rloo": 1.0, "batch": 1.5, "whiten": 1.5}
    for kind, first in expected.items():
        got = advantage.group_advantages(rewards, ids, kind)
        assert torch.allclose(
            got, torch.tensor([first, -first / 3, -first / 3, -first / 3]), atol=1e-5
        ), kind
    population = advantage.group_advantages(rewards, ids, "grpo", eps=0.0, ddof=0)
    assert torch.allclose(population, torch.tensor([3.0, -1, -1, -1]) / 3**0.5)


def test_equal_rewards_and_lone_rollouts_give_exactly_zero_and_nan_is_left_out():
    nan = float("nan")
    # 0.1 + 0.1 + 0.1 divided by 3 is not 0.1 in fp32: only an exact comparison gives an exact zero.
    rewards = torch.tensor([0.1, 0.1, 0.1, nan, 5.0, nan, nan, 1.0, 0.0, nan])
    ids = torch.tensor([3, 3, 3, 3, 4, 6, 6, 9, 9, 9])
    for kind in advantage.KINDS:
        got = advantage.group_advantages(rewards, ids, kind)
        assert (got[:7] == 0).all() and got[9] == 0, kind
        assert got[7] == -got[8] > 0, kind
    same = advantage.group_advantages(rewards[7:9], ids[7:9], "grpo")
    assert torch.equal(advantage.group_advantages(rewards, ids, "grpo")[7:9], same)


def test_whitening_with_lengths_is_whitening_over_tokens():
    rewards, lengths, ids = (
        torch.tensor([1.0, 0.5, 0.0, 2.0]),
        torch.tensor([1, 5, 2, 3]),
        torch.tensor([0, 0, 0, 1]),
    )
    tokens = rewards[:3].repeat_interleave(lengths[:3])
    expected = (rewards[:3] - tokens.mean()) * torch.rsqrt(tokens.var() + 1e-8)
    got = advantage.group_advantages(rewards, ids, "whiten", eps=1e-8, lengths=lengths)
    assert torch.allclose(got, torch.cat((expected, torch.zeros(1))), atol=1e-6)


def test_unknown_advantage_kind_is_one_sentence():
    with pytest.raises(ValueError, match="unknown advantage kind 'gae': use one of grpo"):
        advantage.group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "gae")


def test_policy_loss_of_worked_examples():
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.9]).log().requires_grad_()
    advantages, weights = (
        torch.tensor([1.0, -1, -1, 1, float("nan")]),
        torch.tensor([1.0, 1, 1, 1, 0]),
    )
    loss, moments = advantage.policy_loss(logp, torch.zeros(5), advantages, weights, 0.2, 0.28)
    named = dict(zip(advantage.MOMENTS, moments.tolist()))
    assert loss.item() == pytest.approx(-1.28 + 1.5 + 0.8 - 0.5)
    assert (named["tokens"], named["clip_low"], named["clip_high"], named["ratio"]) == (
        4,
        1,
        1,
        pytest.approx(4.0),
    )
    assert named["max_difference"] == pytest.approx(0.6931, abs=1e-4)
    # Clipped tokens and the token of weight 0 get no gradient, the others -A rho.
    assert torch.allclose(torch.autograd.grad(loss, logp)[0], torch.tensor([0, 1.5, 0, -0.5, 0]))


def test_policy_loss_gradient_with_a_reference():
    logp, old, ref = randn(12), randn(12, grad=False), randn(12, grad=False)
    advantages, weights = randn(12, grad=False), torch.rand(12, dtype=DOUBLE)
    assert gradcheck(
        lambda x: advantage.policy_loss(x, old, advantages, weights, 0.2, 0.28, None, ref, 0.1)[0],
        (logp,),
    )


# sampling


def keys(count, seed=1):
    """One request, positions 0..count-1."""
    zero = torch.zeros(count, dtype=torch.int64)
    return zero + seed, zero + 7, zero, torch.arange(count)


def chi_square(tokens, probabilities):
    """(Pearson's statistic - degrees of freedom) in standard deviations, over cells of at least 5 expected draws, the rest pooled."""
    expected, counts = (
        probabilities * len(tokens),
        torch.bincount(tokens, minlength=len(probabilities)).double(),
    )
    big = expected >= 5
    expected = torch.cat((expected[big], expected[~big].sum()[None]))
    counts = torch.cat((counts[big], counts[~big].sum()[None]))
    cells = expected > 0
    statistic = ((counts - expected) ** 2 / expected)[cells].sum()
    freedom = cells.sum() - 1
    return ((statistic - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_softmax(temperature):
    draws, vocabulary = 40_000, 400
    hidden, weight = torch.randn(1, 5), torch.randn(vocabulary, 5)
    probabilities = (hidden.double() @ weight.double().T / temperature).softmax(-1)[0]
    tokens, logp, entropy = sampling.sample_tokens(
        hidden.expand(draws, -1), weight, torch.full((draws,), temperature), *keys(draws)
    )
    assert abs(chi_square(tokens, probabilities)) < 4
    assert torch.allclose(logp.double(), probabilities.log()[tokens], atol=1e-5)
    assert torch.allclose(
        entropy.double(), -(probabilities * probabilities.log()).sum().expand(draws), atol=1e-5
    )


def test_chi_square_notices_a_wrong_distribution():
    probabilities = torch.randn(400, dtype=DOUBLE).softmax(-1)
    tilted = probabilities * torch.linspace(0.85, 1.15, 400)  # up to 15 % off
    tokens = torch.multinomial(tilted / tilted.sum(), 40_000, replacement=True)
    assert chi_square(tokens, probabilities) > 4


def test_a_draw_depends_on_its_key_alone():
    hidden, weight, order = torch.randn(40, 8), torch.randn(300, 8), torch.randperm(40)
    key, ones = keys(40), torch.ones(40)
    together = sampling.sample_tokens(hidden, weight, ones, *key)[0]
    shuffled = sampling.sample_tokens(hidden[order], weight, ones, *(x[order] for x in key))[0]
    alone = torch.cat(
        [
            sampling.sample_tokens(
                hidden[i : i + 1], weight, ones[:1], *(x[i : i + 1] for x in key)
            )[0]
            for i in range(40)
        ]
    )
    assert torch.equal(shuffled, together[order]) and torch.equal(alone, together)
    for changed in range(4):
        other = [x + (i == changed) for i, x in enumerate(key)]
        assert not torch.equal(sampling.sample_tokens(hidden, weight, ones, *other)[0], together)


def test_uniforms_are_uniform_and_independent():
    u = sampling.uniforms_reference(*keys(100_000))
    assert 0 < u.min() and u.max() < 1
    counts = torch.histc(u[0] * 16 + (u[1] * 16).floor() * 16, 256, 0, 256)
    assert abs(((counts - counts.mean()) ** 2 / counts.mean()).sum() - 255) < 4 * (2 * 255) ** 0.5


def test_greedy_is_the_argmax_with_the_untempered_logprob():
    hidden, weight = torch.randn(30, 8), torch.randn(300, 8)
    tokens, logp, _ = sampling.sample_tokens(hidden, weight, torch.zeros(30), *keys(30))
    expected = (hidden @ weight.T).log_softmax(-1)
    assert torch.equal(tokens, expected.argmax(-1)) and torch.allclose(
        logp, expected.amax(-1), atol=1e-5
    )


def test_truncated_sampling_draws_from_the_nucleus_and_says_its_logprob():
    draws = 20_000
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
    logits, ones, zeros = (
        probabilities.log().expand(draws, -1),
        torch.ones(draws),
        torch.zeros(draws, dtype=torch.int64),
    )
    cases = [
        (0.6, 0, [0, 2]),
        (0.71, 0, [0, 2, 3]),
        (1.0, 2, [0, 2]),
        (0.5, 3, [0, 2]),
        (1.0, 0, [0, 1, 2, 3, 4]),
        (0.1, 0, [0]),
    ]
    for top_p, top_k, kept in cases:
        tokens, logp, _ = sampling.sample_logits(
            logits, ones, *keys(draws), ones * top_p, zeros + top_k
        )
        left = torch.zeros(5, dtype=DOUBLE)
        left[kept] = probabilities[kept].double() / probabilities[kept].double().sum()
        assert sorted(set(tokens.tolist())) == kept, (top_p, top_k)
        assert torch.allclose(logp.double(), left.log()[tokens], atol=1e-5)
        assert len(kept) == 1 or abs(chi_square(tokens, left)) < 4
    greedy = sampling.sample_logits(logits, zeros.float(), *keys(draws), ones * 0.1, zeros)
    assert (greedy[0] == 0).all() and torch.allclose(
        greedy[1], probabilities[0].log().expand(draws)
    )


# the bench


def test_the_bench_runs_every_kernel_and_ends_in_json(capsys):
    bench.main(["--smoke", "--no-compile"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == 16 and all(
        time.get("median", 0) > 0 for row in rows for time in (row["ours"], *row["peers"].values())
    )
    with pytest.raises(SystemExit, match="unknown tpu"):
        bench.main(["--smoke", "--only", "tpu"])
