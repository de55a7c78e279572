"""Every Triton kernel against its torch reference: in the interpreter in fp32 without a GPU, on the GPU in bf16.

All memory that torch.empty hands out is filled with NaN first, so a kernel that leaves a hole, or reads one, fails.
"""

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim"
)  # the interpreter's own

from kernels import advantage, attention, head, layers, logprob, sampling  # noqa: E402
from model import Config, random_model  # noqa: E402
from tests.test_kernels import chi_square, keys, paged_case  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter multiplies bf16 as raw bits (triton issue 11584), so there it is fp32; the kernels do not care.
DTYPES = [
    pytest.param(torch.float32, marks=pytest.mark.skipif(ON_GPU, reason="bf16 runs here")),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
ROWS = [1, 17, 129]


@pytest.fixture(autouse=True)
def poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # with this, torch.empty fills floats with NaN, integers with their maximum
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(ours, theirs, dtype, scale=1.0):
    """Largest error relative to the largest value: fp32 rounding in the interpreter, bf16 rounding of the result on a GPU."""
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape and ours.isfinite().all()
    bound = scale * (1e-5 if dtype == torch.float32 else 1e-2) * max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= bound


def both(function, reference, inputs, dtype, upstream):
    """Values and gradients of a differentiable function against its reference in float64 on the same inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = function(*inputs), reference(*exact)
    ours, theirs = (ours, theirs) if isinstance(ours, tuple) else ((ours,), (theirs,))
    for a, b in zip(ours, theirs):
        close(a, b, dtype)
    gradients = (
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, exact, [g.double() for g in upstream]),
    )
    for a, b in zip(*gradients):
        close(a, b, dtype, scale=2)


# layers


@dtypes
@pytest.mark.parametrize("tokens", ROWS)
def test_layers(tokens, dtype):
    width = 200  # neither a power of two nor a multiple of a block
    x, residual, grad = (randn(tokens, width, dtype=dtype) for _ in range(3))
    weight = randn(width, dtype=dtype)
    eps = 1e-6
    both(
        lambda *a: layers._RmsNorm.apply(*a, eps),
        lambda *a: layers.rms_norm_reference(*a, eps),
        (x, weight),
        dtype,
        (grad,),
    )
    inputs = (x, residual, weight)
    both(
        lambda *a: layers._AddRmsNorm.apply(*a, eps),
        lambda *a: layers.add_rms_norm_reference(*a, eps),
        inputs,
        dtype,
        (grad, residual),
    )
    wide = randn(tokens, 2 * 1100, dtype=dtype)
    both(
        layers._Swiglu.apply,
        layers.swiglu_reference,
        (wide,),
        dtype,
        (randn(tokens, 1100, dtype=dtype),),
    )
    cos, sin = layers.rope_tables(torch.arange(tokens, device=DEVICE) * 5, 16, 1e4)
    qkv = randn(tokens, 9 * 16, dtype=dtype)
    q_of = lambda x: x.view(tokens, 9, 16)[:, :7]  # noqa: E731   a strided view, as split_qkv gives
    rope, reference = (
        lambda x: layers._Rope.apply(q_of(x), cos, sin),
        lambda x: layers.apply_rope_reference(q_of(x), cos, sin),
    )
    both(rope, reference, (qkv,), dtype, (randn(tokens, 7, 16, dtype=dtype),))


@dtypes
def test_the_last_sum_of_add_rms_norm_may_have_no_user(dtype):
    x, residual, weight = (
        randn(5, 64, dtype=dtype),
        randn(5, 64, dtype=dtype),
        randn(64, dtype=dtype),
    )
    first = lambda run: lambda *a: run(*a, 1e-6)[0]  # noqa: E731
    both(
        first(layers._AddRmsNorm.apply),
        first(layers.add_rms_norm_reference),
        (x, residual, weight),
        dtype,
        (randn(5, 64, dtype=dtype),),
    )


@dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_qkv_rope_write(bias, dtype):
    tokens, heads, kv_heads, head_dim = 17, 7, 2, 16
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    offset = randn(qkv.shape[1], dtype=dtype) if bias else None
    cos, sin = layers.rope_tables(torch.arange(tokens, device=DEVICE), head_dim, 1e4)
    slots = torch.randperm(40, device=DEVICE)[:tokens]
    slots[::4] = -1
    caches = [
        [torch.full((5, kv_heads, 8, head_dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
        for _ in range(2)
    ]
    q = layers._qkv_rope_write(qkv, offset, cos, sin, *caches[0], slots, heads)
    close(
        q, layers.qkv_rope_write_reference(qkv, offset, cos, sin, *caches[1], slots, heads), dtype
    )
    for ours, theirs in zip(*caches):
        close(ours, theirs, dtype)


# attention


PAGED = [
    (7, 2, 64, 16, [0, 1, 300, 16]),
    (6, 1, 128, 64, [513, 64]),
    (8, 1, 64, 128, [129, 17]),
    (3, 3, 64, 32, [33]),
]


@dtypes
@pytest.mark.parametrize("per_kv, kv_heads, head_dim, page_size, lengths", PAGED)
def test_paged_attention(per_kv, kv_heads, head_dim, page_size, lengths, dtype):
    case = paged_case(lengths, per_kv, kv_heads, head_dim, page_size, dtype, DEVICE)
    exact = attention.paged_attention_reference(
        *(x.double() if x.is_floating_point() else x for x in case), head_dim**-0.5
    )
    close(attention._paged_attention(*case, head_dim**-0.5), exact, dtype)


def shared_case(groups, prefix_pages, page_size, dead):
    """Lengths and tables of adjacent groups whose samples share their first pages; `dead` rows have length 0."""
    ids = torch.repeat_interleave(torch.arange(len(groups)) * 3 + 5, torch.tensor(groups))
    shared = torch.repeat_interleave(torch.tensor(prefix_pages) * page_size, torch.tensor(groups))
    lengths = [0 if row in dead else int(shared[row]) + 1 + row * 7 % 40 for row in range(len(ids))]
    case = paged_case(lengths, 7, 1, 64, page_size, device=DEVICE)
    tables, start = case[3], 0
    for size, pages in zip(groups, prefix_pages):
        live = [row for row in range(start, start + size) if row not in dead]
        tables[live, :pages] = tables[live[0], :pages]
        start += size
    prefix = torch.where(torch.tensor(lengths) > 0, shared, 0).int()
    return case, prefix.to(DEVICE), ids.to(DEVICE)


@dtypes
@pytest.mark.parametrize(
    "groups, prefix_pages, dead", [([4, 1, 9], [3, 2, 1], [2, 5]), ([18, 3], [17, 1], [0, 17])]
)
@pytest.mark.parametrize("arch", [90, 80])
def test_shared_prefix_attention(groups, prefix_pages, dead, arch, dtype):
    (q, k_pages, v_pages, tables, lengths), prefix, ids = shared_case(
        groups, prefix_pages, 16, dead
    )
    exact = attention.paged_attention_reference(q, k_pages, v_pages, tables, lengths, 0.125)
    got = attention._paged_attention(
        q.to(dtype), k_pages.to(dtype), v_pages.to(dtype), tables, lengths, 0.125, prefix, ids, arch
    )
    close(got, exact, dtype)


# lm_head


def head_case(tokens, vocabulary, width, dtype, size=1.0):
    hidden, weight = (
        randn(tokens, width, dtype=dtype) * size / width**0.5,
        randn(vocabulary, width, dtype=dtype),
    )
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), device=DEVICE)


def exact_gradient(hidden, weight, targets, grads, temperature):
    """(logp, entropy, lse, dL/dlogits) in float64."""
    logits = (hidden.double() @ weight.double().T).requires_grad_()
    tempered = logits / temperature
    logp = tempered.log_softmax(-1)
    picked, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    return (
        picked,
        entropy,
        tempered.logsumexp(-1),
        torch.autograd.grad((picked, entropy), logits, [g.double() for g in grads])[0],
    )


@dtypes
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("vocabulary, arch", [(300, 90), (256, 80)])
@pytest.mark.parametrize("size", [1.0, 20.0])  # 20: logits of up to +-80
def test_head_stats_and_gradients(tokens, vocabulary, arch, size, dtype):
    hidden, weight, targets = head_case(tokens, vocabulary, 64, dtype, size)
    grads = randn(tokens), randn(tokens)
    *stats, gradient = exact_gradient(hidden, weight, targets, grads, 0.8)
    for ours, theirs in zip(head.stats(hidden, weight, targets, 0.8, arch), stats):
        close(ours, theirs, torch.float32)
    lse, entropy = stats[2].float(), stats[1].float()
    close(
        head.gradient(hidden, weight, targets, lse, entropy, *grads, 0.8, arch),
        gradient,
        dtype,
        scale=10,
    )
    logits = hidden.float() @ weight.float().T
    for ours, theirs in zip(head.logit_stats(logits, targets, 0.8), stats):
        close(ours, theirs, torch.float32)
    close(
        head.logit_gradient(logits, targets, lse, entropy, *grads, 0.8, dtype),
        gradient,
        dtype,
        scale=10,
    )


@dtypes
def test_logprobs_and_fused_loss_through_the_kernels(monkeypatch, dtype):
    """The whole differentiable functions, in three chunks of tokens, with rows that no loss looks at."""
    monkeypatch.setattr(head, "fits", lambda hidden: True)
    monkeypatch.setattr(logprob, "CPU_CHUNK" if DEVICE == "cpu" else "CUDA_CHUNK", 20 * 150)
    hidden, weight, targets = head_case(45, 150, 64, dtype)
    weights, entropies = torch.rand(45, device=DEVICE), torch.rand(45, device=DEVICE)
    weights[::3], entropies[::3] = 0, 0
    loss_fn = lambda logp, entropy, rows: (
        -weights[rows].to(logp) * logp.exp() - entropies[rows].to(logp) * entropy
    )  # noqa: E731
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logp, entropy = logprob.token_logprobs_reference(*exact, targets, 0.8)
    loss = loss_fn(logp, entropy, slice(0, 45)).sum()
    theirs = torch.autograd.grad(loss, exact)
    for per_token in (True, False):
        ours = [x.detach().requires_grad_() for x in (hidden, weight)]
        fused, fused_logp, fused_entropy = logprob.fused_policy_loss(
            *ours, targets, loss_fn, 0.8, per_token
        )
        close(fused, loss, torch.float32)
        close(fused_logp, logp, torch.float32)
        close(fused_entropy, entropy, torch.float32)
        for a, b in zip(torch.autograd.grad(fused, ours), theirs):
            close(a, b, dtype, scale=2)
    no_user = [x.detach().requires_grad_() for x in (hidden, weight)]
    (logprob.token_logprobs(*no_user, targets)[0] * 0).sum().backward()
    assert (no_user[0].grad == 0).all() and (
        no_user[1].grad == 0
    ).all()  # every row ignored: exact zeros, no NaN


# sampling


@dtypes
@pytest.mark.parametrize(
    "rows, vocabulary, arch", [(1, 300, 90), (17, 256, 80), (129, 300, 90), (70, 77, 80)]
)
def test_sample_tokens(rows, vocabulary, arch, dtype):
    hidden, weight, _ = head_case(rows, vocabulary, 64, dtype, size=3.0)
    temperature = torch.rand(rows, device=DEVICE) + 0.5
    temperature[::4] = 0
    key = [torch.randint(-(2**62), 2**62, (rows,), device=DEVICE) for _ in range(4)]
    assert torch.equal(sampling._uniforms(*key), sampling.uniforms_reference(*key))
    token, logp, entropy = sampling._sample_tokens(hidden, weight, temperature, *key, arch)
    expected = sampling.sample_tokens_reference(hidden, weight, temperature, *key)
    assert torch.equal(token, expected[0])
    close(logp, expected[1], torch.float32)
    close(entropy, expected[2], torch.float32)


@dtypes
def test_sampled_tokens_follow_the_softmax(dtype):
    draws, vocabulary = 1000, 150
    hidden, weight, _ = head_case(1, vocabulary, 64, dtype, size=2.0)
    key = [x.to(DEVICE) for x in keys(draws)]
    token, _, _ = sampling._sample_tokens(
        hidden.expand(draws, -1), weight, torch.ones(draws, device=DEVICE), *key
    )
    probabilities = (hidden.double() @ weight.double().T).softmax(-1)[0]
    assert abs(chi_square(token.cpu(), probabilities.cpu())) < 4


@dtypes
def test_greedy_takes_the_first_of_equal_maxima_and_large_logits_stay_finite(dtype):
    weight = torch.zeros(300, 64, dtype=dtype, device=DEVICE)
    weight[[130, 140, 290], 0], weight[:, 1] = 80.0, -1.0
    hidden = torch.zeros(2, 64, dtype=dtype, device=DEVICE)
    hidden[:, 0] = torch.tensor([1.0, -1.0])
    hidden[1, 1] = 80.0
    token, logp, entropy = sampling._sample_tokens(
        hidden, weight, torch.zeros(2, device=DEVICE), *(x.to(DEVICE) for x in keys(2))
    )
    assert token.tolist() == [130, 0] and torch.allclose(
        logp.exp().cpu(), torch.tensor([1 / 3, 1 / 297])
    ), "ties"
    assert torch.allclose(entropy.cpu(), -logp.cpu(), atol=1e-4)


# advantages and the policy loss


@dtypes
@pytest.mark.parametrize("rollouts, groups", [(1, 1), (17, 4), (129, 9)])
def test_group_advantages(monkeypatch, rollouts, groups, dtype):
    monkeypatch.setattr(advantage, "BLOCK", 64)  # so that 129 rollouts take three rounds
    rewards = torch.randint(0, 4, (rollouts,), device=DEVICE) / 3
    ids, lengths = (
        torch.randint(0, groups, (rollouts,), device=DEVICE),
        torch.randint(1, 50, (rollouts,), device=DEVICE),
    )
    rewards[ids == 1] = 0.1  # a group without variance
    rewards[ids == 2] = float("nan")  # one that could not be judged at all
    rewards[5::11] = float("nan")
    for kind in advantage.KINDS:
        for ddof, tokens in {"grpo": [(1, None), (0, None)], "whiten": [(1, lengths)]}.get(
            kind, [(1, None)]
        ):
            got = advantage._group_advantages(rewards, ids, kind, 1e-4, ddof, tokens)
            close(
                got,
                advantage.group_advantages_reference(
                    rewards.double(), ids, kind, 1e-4, ddof, tokens
                ),
                torch.float32,
            )
            assert (got[ids == 1] == 0).all() and (got[rewards.isnan()] == 0).all()


@dtypes
@pytest.mark.parametrize("tokens", [1, 17, 2100])
def test_policy_loss(tokens, dtype):
    logp = randn(tokens) - 3
    old, ref = logp + 0.3 * randn(tokens), logp + 0.3 * randn(tokens)
    advantages, weights, entropy = (
        randn(tokens),
        torch.rand(tokens, device=DEVICE) / tokens,
        torch.rand(tokens, device=DEVICE),
    )
    ignored = torch.arange(tokens, device=DEVICE) % 5 == 3
    weights[ignored] = 0
    for x in (old, advantages, entropy):
        x[ignored] = float("nan")
    for extras in ((entropy, ref, 0.05), (None, None, 0.0)):
        ours, exact = logp.clone().requires_grad_(), logp.double().requires_grad_()
        loss, moments = advantage._PolicyLoss.apply(
            ours, old, advantages, weights, 0.2, 0.28, *extras
        )
        theirs = [
            x.double() if isinstance(x, torch.Tensor) else x
            for x in (old, advantages, weights, 0.2, 0.28, *extras)
        ]
        expected, expected_moments = advantage.policy_loss_reference(exact, *theirs)
        close(loss, expected, torch.float32)
        close(moments / tokens, expected_moments / tokens, torch.float32)
        close(
            torch.autograd.grad(loss, ours)[0],
            torch.autograd.grad(expected, exact)[0],
            torch.float32,
        )


# together


@dtypes
def test_a_model_trains_the_same_through_the_kernels(monkeypatch, dtype):
    """Hidden states, log-probs and every parameter's gradient, with Triton and without it."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    model = random_model(Config(vocab_size=150, **shape), std=0.2).to(DEVICE, dtype)
    tokens, targets, upstream = (
        torch.randint(0, 150, (24,), device=DEVICE),
        torch.randint(0, 150, (24,), device=DEVICE),
        torch.rand(24, device=DEVICE),
    )
    positions, ends = (
        torch.cat((torch.arange(17), torch.arange(7))).to(DEVICE),
        torch.tensor([0, 17, 24], dtype=torch.int32, device=DEVICE),
    )

    def step():
        hidden = model.hidden(tokens, positions, ends)
        logp, entropy = logprob.token_logprobs(hidden, model.head_weight, targets)
        return (
            logp,
            entropy,
            *torch.autograd.grad((logp * upstream - 0.1 * entropy).sum(), list(model.parameters())),
        )

    monkeypatch.setenv("RARECODE_TRITON", "0")
    expected = step()
    if ON_GPU:
        monkeypatch.delenv("RARECODE_TRITON")
    else:
        monkeypatch.setattr(layers, "use_triton", lambda x: True)
        monkeypatch.setattr(head, "fits", lambda hidden: True)
    for ours, theirs in zip(step(), expected):
        close(ours, theirs, dtype, scale=3)


# what only a GPU can show


@pytest.mark.gpu
def test_public_functions_pick_triton_and_the_switch_turns_it_off(monkeypatch):
    hidden, weight, targets = head_case(33, 1000, 64, torch.bfloat16)
    on = logprob.token_logprobs(hidden, weight, targets)[0]
    monkeypatch.setenv("RARECODE_TRITON", "0")
    assert not head.fits(hidden)
    close(on, logprob.token_logprobs(hidden, weight, targets)[0], torch.float32, scale=10)


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit_and_rows_do_not_see_each_other():
    hidden, weight, targets = head_case(300, 5000, 896, torch.bfloat16)
    runs = [head.stats(hidden, weight, targets, 1.0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    part = head.stats(hidden[77:101], weight, targets[77:101], 1.0)
    assert all(torch.equal(a, b[77:101]) for a, b in zip(part, runs[0]))
    key = [x.cuda() for x in keys(300)]
    together = sampling.sample_tokens(hidden, weight, torch.ones(300, device="cuda"), *key)
    few = sampling.sample_tokens(
        hidden[5:9], weight, torch.ones(4, device="cuda"), *(x[5:9] for x in key)
    )
    assert all(torch.equal(a, b[5:9]) for a, b in zip(few, together))


@pytest.mark.gpu
def test_sampling_and_attention_replay_in_a_cuda_graph():
    hidden, weight, _ = head_case(40, 5000, 64, torch.bfloat16)
    case = paged_case([5, 300, 0, 64], 7, 2, 64, 64, torch.bfloat16, "cuda")
    key, ones = [x.cuda() for x in keys(40)], torch.ones(40, device="cuda")
    run = lambda: (
        *sampling.sample_tokens(hidden, weight, ones, *key),
        attention.paged_attention(*case, 0.125),
    )  # noqa: E731
    eager = [x.clone() for x in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured))


@pytest.mark.gpu
def test_training_never_holds_the_logits():
    hidden, weight, targets = head_case(16_384, 151_936, 896, torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = logprob.token_logprobs(hidden, weight, targets)
    (logp.sum() + entropy.sum()).backward()
    whole = 16_384 * 151_936 * 2
    assert (
        torch.cuda.max_memory_allocated() - before < 0.6 * whole
    )  # [T, V] in bf16 alone is 4.98 GB
