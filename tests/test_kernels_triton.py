"""Every Triton kernel against its torch reference: in the interpreter in fp32 without a GPU, on the
GPU in bf16.

All memory that torch.empty hands out is filled with NaN first, so a kernel that leaves a hole, or
reads one, fails.
"""

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter's own.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
]

from kernels import advantage, attention, head, layers, logprob, rows, sampling  # noqa: E402
from kernels.rope import rope_tables  # noqa: E402
from model import Config, make_segments, random_model  # noqa: E402
from tests.test_kernels import chi_square, keys, paged_case  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter multiplies bf16 as raw bits (triton issue 11584), so there it is fp32; the kernels
# do not care.
ON_THE_CPU = pytest.mark.skipif(ON_GPU, reason="bf16 runs here")
DTYPES = [
    pytest.param(torch.float32, marks=ON_THE_CPU),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
ROWS = [1, 17, 129]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(ours, theirs, dtype, scale=1.0):
    """Largest error relative to the largest value.

    fp32 rounding in the interpreter, bf16 rounding of the result on a GPU.
    """
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    unit = 1e-5 if dtype == torch.float32 else 1e-2
    largest = max(1.0, theirs.abs().max().item())
    error = (ours - theirs).abs().max().item()
    assert error <= scale * unit * largest


def check(function, reference, inputs, upstream, dtype):
    """Values and gradients of a function against its reference in float64 on the same inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = function(*inputs), reference(*exact)
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs):
        close(a, b, dtype)

    our_gradients = torch.autograd.grad(ours, inputs, upstream)
    exact_upstream = [x.double() for x in upstream]
    their_gradients = torch.autograd.grad(theirs, exact, exact_upstream)
    for a, b in zip(our_gradients, their_gradients):
        close(a, b, dtype, scale=2)


# ---- layers ----


@dtypes
@pytest.mark.parametrize("tokens", ROWS)
def test_norms(tokens, dtype):
    width = 200  # neither a power of two nor a multiple of a block
    x, residual, grad_y, grad_total = (randn(tokens, width, dtype=dtype) for _ in range(4))
    weight = randn(width, dtype=dtype)

    def norm(x, weight):
        return layers._RmsNorm.apply(x, weight, 1e-6)

    def norm_reference(x, weight):
        return layers.rms_norm_reference(x, weight, 1e-6)

    check(norm, norm_reference, (x, weight), (grad_y,), dtype)

    def add_norm(x, residual, weight):
        return layers._AddRmsNorm.apply(x, residual, weight, 1e-6)

    def add_norm_reference(x, residual, weight):
        return layers.add_rms_norm_reference(x, residual, weight, 1e-6)

    inputs = (x, residual, weight)
    check(add_norm, add_norm_reference, inputs, (grad_y, grad_total), dtype)


@dtypes
def test_the_last_sum_of_add_rms_norm_may_have_no_user(dtype):
    def norm_of_sum(x, residual, weight):
        return layers._AddRmsNorm.apply(x, residual, weight, 1e-6)[0]

    def reference(x, residual, weight):
        return layers.add_rms_norm_reference(x, residual, weight, 1e-6)[0]

    x, residual, grad_y = (randn(5, 64, dtype=dtype) for _ in range(3))
    weight = randn(64, dtype=dtype)
    check(norm_of_sum, reference, (x, residual, weight), (grad_y,), dtype)


@dtypes
@pytest.mark.parametrize("tokens", ROWS)
def test_swiglu(tokens, dtype):
    width = 1100  # one block of 1024 and a part of another
    gate_up = randn(tokens, 2 * width, dtype=dtype)
    grad = randn(tokens, width, dtype=dtype)
    check(layers._Swiglu.apply, layers.swiglu_reference, (gate_up,), (grad,), dtype)


@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tokens", ROWS)
def test_rotated_qkv(tokens, has_bias, dtype):
    """7 query heads and 1 of keys and values: 9 of a block of 16."""
    heads, kv_heads, head_dim = 7, 1, 16
    cos, sin = rope_tables(torch.arange(tokens, device=DEVICE) * 5, head_dim, 1e4)
    inputs = [randn(tokens, 9 * head_dim, dtype=dtype)]
    if has_bias:
        inputs.append(randn(9 * head_dim, dtype=dtype))

    def ours(qkv, bias=None):
        return layers._RotatedQkv.apply(qkv, bias, cos, sin, heads, kv_heads)

    def reference(qkv, bias=None):
        return layers.rotated_qkv_reference(qkv, bias, cos, sin, heads, kv_heads)

    grad = [randn(tokens, count, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]
    check(ours, reference, inputs, grad, dtype)


@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
def test_qkv_rope_write(has_bias, dtype):
    tokens, heads, kv_heads, head_dim = 17, 7, 2, 16
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    bias = randn(qkv.shape[1], dtype=dtype) if has_bias else None
    cos, sin = rope_tables(torch.arange(tokens, device=DEVICE), head_dim, 1e4)
    slots = torch.randperm(40, device=DEVICE)[:tokens]
    slots[::4] = -1

    def run(function):
        k_pages = torch.full((5, kv_heads, 8, head_dim), 7.0, dtype=dtype, device=DEVICE)
        v_pages = k_pages.clone()
        q = function(qkv, bias, cos, sin, k_pages, v_pages, slots, heads)
        return q, k_pages, v_pages

    expected = run(layers.qkv_rope_write_reference)
    for ours, theirs in zip(run(layers._qkv_rope_write), expected):
        close(ours, theirs, dtype)


# ---- attention ----


PAGED = [
    (7, 2, 64, 16, [0, 1, 300, 16]),
    (6, 1, 128, 64, [513, 64]),
    (8, 1, 64, 128, [129, 17]),
    (3, 3, 64, 32, [33]),
    # Around one split of 256 tokens, which is written as it is, and beyond four, which the merge
    # holds at a time; a page of two splits.
    (2, 2, 16, 64, [255, 256, 257, 0]),
    (7, 1, 16, 512, [1023, 1025, 1300]),
]


@dtypes
@pytest.mark.parametrize("per_kv, kv_heads, head_dim, page_size, lengths", PAGED)
def test_paged_attention(per_kv, kv_heads, head_dim, page_size, lengths, dtype):
    case = paged_case(lengths, per_kv, kv_heads, head_dim, page_size, dtype, DEVICE)
    q, k_pages, v_pages, tables, counts = case
    scale = head_dim**-0.5
    in_double = (q.double(), k_pages.double(), v_pages.double(), tables, counts)
    exact = attention.paged_attention_reference(*in_double, scale)
    close(attention._paged_attention(*case, scale), exact, dtype)


# ---- lm_head ----


def head_case(tokens, vocabulary, width, dtype, size=1.0):
    """(hidden, weight, targets) with logits of about `size` standard deviation."""
    hidden = randn(tokens, width, dtype=dtype) * size / width**0.5
    weight = randn(vocabulary, width, dtype=dtype)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), device=DEVICE)


@dtypes
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("vocabulary, arch", [(300, 90), (256, 80)])
@pytest.mark.parametrize("size", [1.0, 20.0])  # 20: logits of up to +-80
def test_head_stats_and_gradient(tokens, vocabulary, arch, size, dtype):
    hidden, weight, targets = head_case(tokens, vocabulary, 64, dtype, size)
    grad_logp = randn(tokens)
    grad_entropy = randn(tokens)

    logits = (hidden.double() @ weight.double().T).requires_grad_()
    tempered = logits / 0.8
    log_probabilities = tempered.log_softmax(-1)
    logp = log_probabilities.gather(1, targets[:, None])[:, 0]
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    lse = tempered.logsumexp(-1)
    upstream = (grad_logp.double(), grad_entropy.double())
    (exact_gradient,) = torch.autograd.grad((logp, entropy), logits, upstream)

    stats = head.stats(hidden, weight, targets, 0.8, arch)
    close(stats.logprobs, logp, torch.float32)
    close(stats.entropy, entropy, torch.float32)
    close(stats.lse, lse, torch.float32)

    known = (lse.float(), entropy.float(), grad_logp, grad_entropy)
    gradient = head.gradient(hidden, weight, targets, *known, 0.8, arch)
    close(gradient, exact_gradient, dtype, scale=10)


@dtypes
def test_token_logprobs_through_the_kernels(monkeypatch, dtype):
    """The whole differentiable function, in three chunks; a third of the tokens has no weight."""
    monkeypatch.setattr(head, "fits", lambda hidden: True)
    monkeypatch.setattr(logprob, "CPU_CHUNK" if DEVICE == "cpu" else "CUDA_CHUNK", 20 * 150)
    hidden, weight, targets = head_case(45, 150, 64, dtype)
    grad_logp = torch.rand(45, device=DEVICE)
    grad_entropy = torch.rand(45, device=DEVICE)
    grad_logp[::3] = 0
    grad_entropy[::3] = 0

    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = logprob.token_logprobs_reference(*exact, targets, 0.8)
    upstream = (grad_logp.double(), grad_entropy.double())
    expected_gradients = torch.autograd.grad(expected, exact, upstream)

    inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
    got = logprob.token_logprobs(*inputs, targets, 0.8)
    for ours, theirs in zip(got, expected):
        close(ours, theirs, torch.float32)
    gradients = torch.autograd.grad(got, inputs, (grad_logp, grad_entropy))
    for ours, theirs in zip(gradients, expected_gradients):
        close(ours, theirs, dtype, scale=2)


@dtypes
def test_tokens_of_no_weight_have_gradients_of_exactly_zero(monkeypatch, dtype):
    monkeypatch.setattr(head, "fits", lambda hidden: True)
    hidden, weight, targets = head_case(45, 150, 64, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, _ = logprob.token_logprobs(hidden, weight, targets)
    (logp * 0).sum().backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


# ---- sampling ----


@dtypes
@pytest.mark.parametrize(
    "rows, vocabulary, arch",
    [
        (1, 300, 90),
        (17, 256, 80),
        (129, 300, 90),
        (70, 77, 80),
    ],
)
def test_sample_tokens(rows, vocabulary, arch, dtype):
    hidden, weight, _ = head_case(rows, vocabulary, 64, dtype, size=3.0)
    temperature = torch.rand(rows, device=DEVICE) + 0.5
    temperature[::4] = 0
    uniforms = torch.rand(2, rows, device=DEVICE)
    token, logp = sampling.draw(hidden, weight, temperature, uniforms, arch)
    expected = sampling.sample_tokens_reference(hidden, weight, temperature, uniforms)
    assert torch.equal(token, expected[0])
    close(logp, expected[1], torch.float32)


@pytest.mark.slow  # 1000 programs of the interpreter; test_sample_tokens compares token by token
@dtypes
def test_sampled_tokens_follow_the_softmax(dtype):
    draws, vocabulary = 1000, 150
    hidden, weight, _ = head_case(1, vocabulary, 64, dtype, size=2.0)
    uniforms = sampling.uniforms_reference(*keys(draws)).to(DEVICE)
    ones = torch.ones(draws, device=DEVICE)
    token, _ = sampling.draw(hidden.expand(draws, -1), weight, ones, uniforms)
    logits = hidden.double() @ weight.double().T
    probabilities = logits.softmax(-1)[0]
    assert abs(chi_square(token.cpu(), probabilities.cpu())) < 4


@dtypes
def test_greedy_takes_the_first_of_equal_maxima_and_large_logits_stay_finite(dtype):
    # Row 0: three tokens of logit 80, the others 0. Row 1: those three -160, the other 297 -80.
    weight = torch.zeros(300, 64, dtype=dtype, device=DEVICE)
    weight[[130, 140, 290], 0] = 80.0
    weight[:, 1] = -1.0
    hidden = torch.zeros(2, 64, dtype=dtype, device=DEVICE)
    hidden[:, 0] = torch.tensor([1.0, -1.0])
    hidden[1, 1] = 80.0

    uniforms = sampling.uniforms_reference(*keys(2)).to(DEVICE)
    greedy = torch.zeros(2, device=DEVICE)
    token, logp = sampling.draw(hidden, weight, greedy, uniforms)
    assert token.tolist() == [130, 0]
    expected = torch.tensor([1 / 3, 1 / 297])
    assert torch.allclose(logp.exp().cpu(), expected)


# ---- the sampler's rows ----


def some_rows():
    """(Rows, slots to run): seven samples of which two have ended, and two places filled up."""
    state = rows.Rows(slots=7, stops=3, pages=5, longest=40, device=DEVICE)
    values = state.values[:7]
    position = torch.tensor([0, 15, 16, 17, 63, 30, 44])
    values[:, rows.TOKEN] = torch.arange(7) + 100
    values[:, rows.POSITION] = position
    values[:, rows.ALIVE] = torch.tensor([1, 1, 0, 1, 1, 1, 0])
    values[:, rows.START] = (position - 12).clamp(min=0) + 1
    values[:, rows.LAST] = position + torch.tensor([1, 9, 9, 9, 9, 2, 9])
    values[:, rows.SEED : rows.TEMPERATURE] = torch.randint(-(2**62), 2**62, (7, 3))
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.3, 1.0, 0.0, 0.5], dtype=torch.float64)
    values[:, rows.TEMPERATURE] = temperature.view(torch.int64)
    values[:, rows.STOPS : rows.STOPS + 3] = torch.tensor([7, -1, -1])
    values[:, rows.STOPS + 3 :] = torch.randperm(35).view(7, 5)
    active = torch.tensor([4, 0, 6, 1, 5, 3, 2, state.nobody, state.nobody], device=DEVICE)
    return state, active


@dtypes
def test_a_step_begins_with_what_its_rows_say(dtype):
    state, active = some_rows()
    cos, sin = rope_tables(torch.arange(80, device=DEVICE), 16, 1e4)
    expected = rows.begin_reference(state, active, cos, sin, 16)
    for name, ours in rows._begin(state, active, cos, sin, 16)._asdict().items():
        theirs = getattr(expected, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert expected.lengths.tolist() == [64, 1, 0, 16, 31, 18, 0, 0, 0]
    assert expected.column.tolist() == [12, 0, 40, 12, 12, 12, 40, 40, 40]


@dtypes
@pytest.mark.parametrize("arch", [90, 80])
def test_a_step_ends_with_its_rows_moved_on(arch, dtype):
    """Slot 0 draws its last token, slot 1 a stop id."""
    hidden, weight, _ = head_case(9, 300, 64, dtype, size=3.0)
    hidden[7:] = hidden[6]  # who fills up is one row, whatever the place
    ours, active = some_rows()
    theirs, _ = some_rows()
    theirs.values.copy_(ours.values)
    cos, sin = rope_tables(torch.arange(80, device=DEVICE), 16, 1e4)
    step = rows.begin_reference(ours, active, cos, sin, 16)

    drawing = (hidden, weight, step.temperature, step.uniforms)
    expected, logprobs = sampling.sample_reference(hidden @ weight.T, *drawing[2:])
    for state in (ours, theirs):  # slot 1 stops
        state.values[active[3], rows.STOPS + 1] = expected[3]
    values = theirs.values.index_select(0, active)
    rows.advance(theirs, active, values, expected, logprobs)
    token, logp = sampling.draw(*drawing, arch, moved=(ours, active, step.column))

    assert torch.equal(token, expected)
    alive = step.lengths > 0
    slots = active[alive]
    assert torch.equal(ours.values[slots], theirs.values[slots])
    assert torch.equal(ours.values[:, rows.ALIVE], theirs.values[:, rows.ALIVE])
    assert ours.values[slots, rows.ALIVE].tolist() == [1, 0, 0, 1, 1]  # the last token; a stop id
    assert torch.equal(ours.out[:, 0, :40], theirs.out[:, 0, :40])
    written = ours.out[slots, 1, step.column[alive]].view(torch.float32)
    close(written, logprobs[alive], dtype)
    assert torch.equal(written, logp[alive])


# ---- group statistics ----


@dtypes
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rollouts, groups", [(1, 1), (17, 4), (129, 9)])
def test_group_statistics(monkeypatch, rollouts, groups, weighted, dtype):
    monkeypatch.setattr(advantage, "BLOCK", 64)  # so that 129 rollouts take three rounds
    rewards = torch.randint(0, 4, (rollouts,), device=DEVICE) / 3
    group_ids = torch.randint(0, groups, (rollouts,), device=DEVICE)
    weights = torch.randint(1, 50, (rollouts,), device=DEVICE) if weighted else None
    rewards[group_ids == 1] = 0.1  # a group without variance
    rewards[group_ids == 2] = float("nan")  # one that could not be judged at all
    rewards[5::11] = float("nan")

    ours = advantage._group_statistics(rewards, group_ids, weights)
    theirs = advantage.group_statistics_reference(rewards.double(), group_ids, weights)
    for a, b in zip(ours[:3], theirs[:3]):
        close(a, b, torch.float32)
    no_signal = ours[3]
    assert torch.equal(no_signal, theirs[3])
    assert no_signal[(group_ids == 1) | rewards.isnan()].all()


# ---- together ----


@dtypes
def test_a_model_trains_the_same_through_the_kernels(monkeypatch, dtype):
    """Hidden states, log-probs and every parameter's gradient, with Triton and without it."""
    config = Config(
        vocab_size=150,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = random_model(config, std=0.2).to(DEVICE, dtype)
    tokens = torch.randint(0, 150, (24,), device=DEVICE)
    targets = torch.randint(0, 150, (24,), device=DEVICE)
    upstream = torch.rand(24, device=DEVICE)
    # Two sequences, of 17 and 7 tokens.
    positions = torch.cat((torch.arange(17), torch.arange(7))).to(DEVICE)
    segments = make_segments([17, 7]).to(DEVICE)

    def step():
        hidden = model.hidden(tokens, positions, segments)
        logp, entropy = logprob.token_logprobs(hidden, model.head_weight, targets)
        loss = (logp * upstream - 0.1 * entropy).sum()
        return logp, entropy, *torch.autograd.grad(loss, list(model.parameters()))

    monkeypatch.setenv("RARECODE_TRITON", "0")
    expected = step()
    if ON_GPU:
        monkeypatch.delenv("RARECODE_TRITON")
    else:
        monkeypatch.setattr(layers, "use_triton", lambda x: True)
        monkeypatch.setattr(head, "fits", lambda hidden: True)
    for ours, theirs in zip(step(), expected):
        close(ours, theirs, dtype, scale=3)


# ---- what only a GPU can show ----


@pytest.mark.gpu
def test_public_functions_pick_triton_and_the_switch_turns_it_off(monkeypatch):
    hidden, weight, targets = head_case(33, 1000, 64, torch.bfloat16)
    on, _ = logprob.token_logprobs(hidden, weight, targets)
    monkeypatch.setenv("RARECODE_TRITON", "0")
    assert not head.fits(hidden)
    off, _ = logprob.token_logprobs(hidden, weight, targets)
    close(on, off, torch.float32, scale=10)


@pytest.mark.gpu
def test_two_runs_of_the_head_agree_bit_for_bit_and_rows_do_not_see_each_other():
    hidden, weight, targets = head_case(300, 5000, 896, torch.bfloat16)
    once = head.stats(hidden, weight, targets, 1.0)
    again = head.stats(hidden, weight, targets, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    part = head.stats(hidden[77:101], weight, targets[77:101], 1.0)
    assert all(torch.equal(a, b[77:101]) for a, b in zip(part, once))


@pytest.mark.gpu
def test_rows_of_a_draw_do_not_see_each_other():
    hidden, weight, _ = head_case(300, 5000, 896, torch.bfloat16)
    ones = torch.ones(300, device="cuda")
    uniforms = sampling.uniforms_reference(*keys(300)).cuda()
    together = sampling.sample_tokens(hidden, weight, ones, uniforms)
    few = sampling.sample_tokens(hidden[5:9], weight, ones[:4], uniforms[:, 5:9].contiguous())
    assert all(torch.equal(a, b[5:9]) for a, b in zip(few, together))


@pytest.mark.gpu
def test_sampling_and_attention_replay_in_a_cuda_graph():
    hidden, weight, _ = head_case(40, 5000, 64, torch.bfloat16)
    case = paged_case([5, 300, 0, 64], 7, 2, 64, 64, torch.bfloat16, "cuda")
    uniforms = sampling.uniforms_reference(*keys(40)).cuda()
    ones = torch.ones(40, device="cuda")

    def run():
        drawn = sampling.sample_tokens(hidden, weight, ones, uniforms)
        return *drawn, attention.paged_attention(*case, 0.125)

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
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = logprob.token_logprobs(hidden, weight, targets)
    (logp.sum() + entropy.sum()).backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 0.6 * 16_384 * 151_936 * 2  # [T, V] in bf16 alone is 4.98 GB
