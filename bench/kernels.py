"""Every kernel beside its floor, torch eager, torch.compile and (when installed) Liger-Kernel.

    python -m bench kernels             Qwen2.5-Coder 0.5B, 1.5B and 3B shapes on one GPU, under
                                        ten minutes
    python -m bench kernels --models 1.5B --only head,attention
    python -m bench kernels --sweep     times the alternative tiles of the lm_head kernels instead
    python -m bench kernels --smoke     tiny shapes on any machine: shows that the bench runs, its
                                        times mean nothing

Without a GPU and without --smoke it measures the CPU's kernels (bench/processor.py).

A floor is max(bytes / copy bandwidth, operations / matrix rate), both measured at the start of the
same run. "target" is the ratio to the floor aimed at (for launch-bound kernels: microseconds).

Warm and cold are apart. "warm" is the median of calls after warm-up, with the 20th and 80th
percentile, and so are the peers' ratios. "first call" is the row's first call of our function, by
the clock of the host, with what it has to compile: nothing is taken from Triton's cache on disk,
but kernels that an earlier row of the same run compiled are there. The JSON has both of every peer.

L2 is emptied before each warm call. Where the launch or the host would be what is measured (calls
of decoding, the norm's backward) the calls are replays of a CUDA graph, which is how the sampler
runs them. L2 then stays warm; keys, values, the head and the norm's gradients are several times its
size.
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import argparse
import inspect
import json
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from bench import processor
from kernels import advantage, attention, head, layers, logprob, sampling, triton
from kernels.rope import apply_rope_reference, rope_tables
from runtime import exact

try:
    from liger_kernel.ops import fused_add_rms_norm as liger_norm
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger_head
    from liger_kernel.ops import swiglu as liger_swiglu

    HAS_LIGER = True
except ImportError:  # the table then has no such column
    HAS_LIGER = False

if torch.cuda.is_available():
    DEVICE, DTYPE = "cuda", torch.bfloat16
else:
    DEVICE, DTYPE = "cpu", torch.float32
ITEM = DTYPE.itemsize  # bytes


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 151_936
    tokens: int = 8192  # of a training micro-batch
    batches: tuple = (64, 256, 512)  # rows of decode steps
    context: int = 1024
    rollouts: int = 512


SHAPES = {
    "0.5B": Shape(896, 4864, 14, 2, 64),
    "1.5B": Shape(1536, 8960, 12, 2, 128),
    "3B": Shape(2048, 11008, 16, 2, 128),
    "smoke": Shape(64, 96, 6, 2, 16, 500, 48, (4,), 64, 16),
}

# Tiles to try on a GPU, each without spills on sm_90 (python -m bench.aot).
SWEEP = [
    head.Tile(rows=128, depth=64, warps=8, stages=3, registers=128),
    head.Tile(rows=128, depth=64, warps=8, stages=4),
    head.Tile(rows=128, depth=128, warps=8, stages=3),
    head.Tile(rows=64, depth=64, warps=4, stages=3),
    head.Tile(rows=64, depth=64, warps=4, stages=4),
    head.Tile(rows=64, depth=128, warps=4, stages=3),
    head.Tile(rows=128, depth=32, warps=8, stages=4, registers=128),
]


@dataclass
class Case:
    """One row of the table."""

    kernel: str
    size: str
    target: str
    ours: Callable  # takes no arguments, as each peer
    peers: dict = field(default_factory=dict)
    bytes: float = 0  # read and written, for the floor
    flops: float = 0
    compiled: Callable | None = None  # a peer to run under torch.compile, called with `inputs`
    inputs: tuple = ()
    gradients: bool = False  # the compiled peer's too
    graph: bool = False  # time replays of a CUDA graph


class Times(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float


class Ceilings(NamedTuple):
    """bandwidth: bytes per second of a copy, read plus written. rate: operations per second."""

    bandwidth: float
    rate: float


# ---- cases ----


def head_cases(shape):
    hidden = tensor(shape.tokens, shape.hidden, grad=True)
    weight = tensor(shape.vocabulary, shape.hidden, grad=True)
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,), device=DEVICE)
    inputs = (hidden, weight, targets)
    product = 2 * shape.tokens * shape.vocabulary * shape.hidden

    peers = {"eager": without_gradients(eager_logprobs, *inputs)}
    if HAS_LIGER:
        peers["liger"] = without_gradients(liger_logprobs, *inputs)
    yield Case(
        "log-prob + entropy, forward",
        f"{shape.tokens} tokens",
        target="1.5",
        ours=without_gradients(logprob.token_logprobs, *inputs),
        peers=peers,
        flops=product,
        compiled=eager_logprobs,
        inputs=inputs,
    )

    peers = {"eager": with_gradients(eager_logprobs, inputs)}
    if HAS_LIGER:
        peers["liger"] = with_gradients(liger_logprobs, inputs)
    yield Case(
        "log-prob + entropy, forward + backward",
        f"{shape.tokens} tokens",
        target="1.6",
        ours=with_gradients(logprob.token_logprobs, inputs),
        peers=peers,
        flops=4 * product,
        compiled=eager_logprobs,
        inputs=inputs,
        gradients=True,
    )


def eager_logprobs(hidden, weight, targets):
    """Plain torch, the way one would write it: it holds the whole [T, V]."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def liger_logprobs(hidden, weight, targets):
    function = liger_head._FusedLinearPPOFallbackFunction
    return function.apply(hidden, weight, targets, 1.0, -100, True)


def sampling_cases(shape):
    weight = tensor(shape.vocabulary, shape.hidden)
    for batch in shape.batches:
        hidden = tensor(batch, shape.hidden) * 8
        ones = torch.ones(batch, device=DEVICE)
        uniforms = torch.rand(2, batch, device=DEVICE)
        yield Case(
            "sample + log-prob",
            f"{batch} rows",
            target="1.3" if batch <= 128 else "1.5",
            ours=without_gradients(sampling.sample_tokens, hidden, weight, ones, uniforms),
            peers={"eager": without_gradients(eager_sample, hidden, weight)},
            bytes=weight.numel() * ITEM,
            flops=2 * batch * weight.numel(),
            compiled=eager_sample,
            inputs=(hidden, weight),
            graph=True,
        )


def eager_sample(hidden, weight):
    probabilities = (hidden @ weight.T).float().softmax(-1)
    noise = torch.empty_like(probabilities).exponential_()
    token = (probabilities / noise).argmax(-1)
    return token, probabilities.gather(1, token[:, None]).log()


def attention_cases(shape):
    batch = shape.batches[len(shape.batches) // 2]
    context = shape.context

    even = [context] * batch
    yield paged_case(shape, f"{batch} x {context}", "1.35", even)

    ragged = torch.linspace(context // 10, context, batch).int().tolist()
    yield paged_case(shape, f"{batch} x {context // 10}..{context}", "1.6", ragged)

    size = f"{batch} x {context}, {context // 2} shared by 16"
    yield shared_prefix_case(shape, size, "1.7", even, members=16)


def paged_case(shape, size, target, lengths):
    cache = random_cache(shape, lengths)
    scale = shape.head_dim**-0.5
    return Case(
        "decode attention",
        size,
        target,
        ours=without_gradients(attention.paged_attention, *cache, scale),
        peers=packed_peers(shape, cache[0], lengths),
        bytes=key_value_bytes(shape, sum(lengths)),
        graph=True,
    )


def shared_prefix_case(shape, size, target, lengths, members):
    """Half of the context is shared by neighbours, `members` at a time; its floor is to read it
    once for all of them."""
    groups = -(-len(lengths) // members)
    prefix_pages = max(lengths) // 2 // page_size_of(shape)
    prefix = prefix_pages * page_size_of(shape)
    shared = random_cache(shape, lengths, members, prefix_pages)
    apart = random_cache(shape, lengths)
    scale = shape.head_dim**-0.5
    return Case(
        "decode attention, shared prefix",
        size,
        target,
        ours=without_gradients(attention.paged_attention, *shared, scale),
        peers={"not shared": without_gradients(attention.paged_attention, *apart, scale)},
        bytes=key_value_bytes(shape, sum(lengths) - prefix * (len(lengths) - groups)),
        graph=True,
    )


def page_size_of(shape):
    """The sampler's."""
    return exact.page_size(shape) if DEVICE == "cuda" else 16


def key_value_bytes(shape, tokens):
    return 2 * tokens * shape.kv_heads * shape.head_dim * ITEM


def random_cache(shape, lengths, members=1, prefix_pages=0):
    """(q, k_pages, v_pages, block_tables, lengths), pages in random order.

    Every `members` neighbours have the same first `prefix_pages` pages.
    """
    pages = [-(-length // page_size_of(shape)) for length in lengths]
    order = iter(torch.randperm(sum(pages)).tolist())
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, count in enumerate(pages):
        first = row // members * members
        for index in range(count):
            if index < prefix_pages and first < row:
                tables[row, index] = tables[first, index]
            else:
                tables[row, index] = next(order)

    unit = shape.head_dim**0.5  # `tensor` divides by it: keys and queries have entries of size 1
    page_shape = (sum(pages), shape.kv_heads, page_size_of(shape), shape.head_dim)
    k_pages = tensor(*page_shape) * unit
    v_pages = tensor(*page_shape) * unit
    q = tensor(len(lengths), shape.heads, shape.head_dim) * unit
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return q, k_pages, v_pages, tables.to(DEVICE), counts


def packed_peers(shape, q, lengths):
    """Attention over contiguous keys and values, without the indirection of pages."""
    batch, longest = len(lengths), max(lengths)
    k = tensor(batch, shape.kv_heads, longest, shape.head_dim)
    v = tensor(batch, shape.kv_heads, longest, shape.head_dim)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = inside[:, None, None].to(DEVICE)

    def padded():
        queries = q[:, :, None]
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)

    if DEVICE != "cuda":
        return {"sdpa": without_gradients(padded)}

    from torch.nn.attention.varlen import varlen_attn

    packed_k = tensor(sum(lengths), shape.kv_heads, shape.head_dim)
    packed_v = tensor(sum(lengths), shape.kv_heads, shape.head_dim)
    key_ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()
    query_ends = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    options = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True

    def flash():
        return varlen_attn(q, packed_k, packed_v, query_ends, key_ends, 1, longest, **options)

    return {"sdpa": without_gradients(padded), "varlen": without_gradients(flash)}


def layer_cases(shape):
    yield norm_case(shape, shape.batches[-1], graph=True)
    yield norm_case(shape, shape.tokens, graph=False)
    yield norm_backward_case(shape)
    yield from swiglu_cases(shape)
    yield qkv_case(shape, shape.batches[-1], "<= 4 us")
    yield qkv_case(shape, shape.tokens, "1.4")
    yield from rotation_cases(shape)


def norm_case(shape, rows, graph):
    width = shape.hidden
    inputs = (tensor(rows, width), tensor(rows, width), tensor(width))
    peers = {"eager": without_gradients(layers.add_rms_norm_reference, *inputs, 1e-6)}
    if HAS_LIGER:
        apply = liger_norm.LigerFusedAddRMSNormFunction.apply
        peers["liger"] = without_gradients(apply, *inputs, 1e-6)
    return Case(
        "add + RMSNorm",
        f"{rows} tokens",
        target="1.25",
        ours=without_gradients(layers.add_rms_norm, *inputs, 1e-6),
        peers=peers,
        bytes=4 * rows * width * ITEM,
        compiled=layers.add_rms_norm_reference,
        inputs=(*inputs, 1e-6),
        graph=graph,
    )


def norm_backward_case(shape):
    """The launcher in a CUDA graph: autograd's own Python takes 0.13 ms, twice the kernel.

    Four times the tokens of a micro-batch, so that L2 does not hold them from call to call.
    """
    rows, width = 4 * shape.tokens, shape.hidden
    grad_y, grad_total, total = (tensor(rows, width) for _ in range(3))
    weight = tensor(width)
    rstd = torch.rsqrt(total.float().pow(2).mean(-1) + 1e-6)
    inputs = (grad_y, grad_total, total, weight, rstd)
    ours = layers._rms_norm_backward if DEVICE == "cuda" else eager_norm_backward
    return Case(
        "add + RMSNorm, backward",
        f"{rows} tokens",
        target="1.25",
        ours=without_gradients(ours, *inputs),
        peers={"eager": without_gradients(eager_norm_backward, *inputs)},
        bytes=4 * rows * width * ITEM,
        compiled=eager_norm_backward,
        inputs=inputs,
        graph=True,
    )


def eager_norm_backward(grad_y, grad_total, total, weight, rstd):
    """What autograd would do: gradients of the sum and of the weight."""
    normed = total.float() * rstd[:, None]
    grad = grad_y.float() * weight.float()
    projection = (grad * normed).mean(-1, keepdim=True)
    grad_x = rstd[:, None] * (grad - normed * projection) + grad_total
    grad_weight = (grad_y.float() * normed).sum(0)
    return grad_x.to(total.dtype), grad_weight.to(weight.dtype)


def swiglu_cases(shape):
    rows, width = shape.tokens, shape.intermediate
    gate_up = tensor(rows, 2 * width, grad=True)
    halves = tuple(x.detach().contiguous().requires_grad_() for x in gate_up.chunk(2, -1))
    upstream = (tensor(rows, width),)

    peers = {"eager": without_gradients(eager_swiglu, gate_up)}
    if HAS_LIGER:
        peers["liger"] = without_gradients(liger_swiglu.LigerSiLUMulFunction.apply, *halves)
    yield Case(
        "SwiGLU",
        f"{rows} tokens",
        target="1.2",
        ours=without_gradients(layers.swiglu, gate_up),
        peers=peers,
        bytes=3 * rows * width * ITEM,
        compiled=eager_swiglu,
        inputs=(gate_up,),
    )

    peers = {"eager": backward_only(eager_swiglu, (gate_up,), upstream)}
    if HAS_LIGER:
        apply = liger_swiglu.LigerSiLUMulFunction.apply
        peers["liger"] = backward_only(apply, halves, upstream)
    yield Case(
        "SwiGLU, backward",
        f"{rows} tokens",
        target="1.25",
        ours=backward_only(layers.swiglu, (gate_up,), upstream),
        peers=peers,
        bytes=5 * rows * width * ITEM,
    )


def eager_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def qkv_case(shape, rows, target):
    page_size = 64
    heads, kv_heads = shape.heads, shape.kv_heads
    width = (heads + 2 * kv_heads) * shape.head_dim
    slots = torch.randperm(2 * rows * page_size, device=DEVICE)[:rows]
    k_pages = tensor(2 * rows, kv_heads, page_size, shape.head_dim)
    v_pages = tensor(2 * rows, kv_heads, page_size, shape.head_dim)
    cos, sin = rope_tables(torch.arange(rows, device=DEVICE), shape.head_dim, 1e6)

    start = (tensor(rows, width), tensor(width), cos, sin, k_pages, v_pages)
    inputs = (*start, slots // page_size, slots % page_size, heads)
    return Case(
        "qkv bias + RoPE + page write",
        f"{rows} tokens",
        target,
        ours=without_gradients(layers.qkv_rope_write, *start, slots, heads),
        peers={"eager": without_gradients(eager_qkv_write, *inputs)},
        bytes=2 * rows * width * ITEM,
        compiled=eager_qkv_write,
        inputs=inputs,
        graph=True,
    )


def rotation_cases(shape):
    """The update's bias and rotation, and their gradients, in a CUDA graph as the norm's.

    Four times the tokens of a micro-batch, so that L2 does not hold them from call to call.
    """
    rows, heads, kv_heads = 4 * shape.tokens, shape.heads, shape.kv_heads
    width = (heads + 2 * kv_heads) * shape.head_dim
    cos, sin = rope_tables(torch.arange(rows, device=DEVICE), shape.head_dim, 1e6)

    inputs = (tensor(rows, width), tensor(width), cos, sin, heads, kv_heads)
    yield Case(
        "qkv bias + RoPE",
        f"{rows} tokens",
        target="1.3",
        ours=without_gradients(layers.rotated_qkv, *inputs),
        peers={"eager": without_gradients(layers.rotated_qkv_reference, *inputs)},
        bytes=2 * rows * width * ITEM,
        compiled=layers.rotated_qkv_reference,
        inputs=inputs,
        graph=True,
    )

    counts = (heads, kv_heads, kv_heads)
    inputs = (*[tensor(rows, count, shape.head_dim) for count in counts], cos, sin, True)
    ours = layers._rotated_qkv_backward if DEVICE == "cuda" else eager_rotation_backward
    yield Case(
        "qkv bias + RoPE, backward",
        f"{rows} tokens",
        target="1.3",
        ours=without_gradients(ours, *inputs),
        peers={"eager": without_gradients(eager_rotation_backward, *inputs)},
        bytes=2 * rows * width * ITEM,
        compiled=eager_rotation_backward,
        inputs=inputs,
        graph=True,
    )


def eager_rotation_backward(grad_q, grad_k, grad_v, cos, sin, trains_bias):
    """What autograd would do: gradients of qkv and of the bias."""
    q = apply_rope_reference(grad_q, cos, -sin)
    k = apply_rope_reference(grad_k, cos, -sin)
    grad = torch.cat([q, k, grad_v], 1).flatten(1)
    return grad, grad.sum(0) if trains_bias else None


def eager_qkv_write(qkv, bias, cos, sin, k_pages, v_pages, page, offset, heads):
    kv_heads, _, head_dim = k_pages.shape[1:]
    by_head = (qkv + bias).view(len(qkv), -1, head_dim)
    q, k, v = by_head.split((heads, kv_heads, kv_heads), 1)
    k_pages[page, :, offset] = apply_rope_reference(k, cos, sin)
    v_pages[page, :, offset] = v
    return apply_rope_reference(q, cos, sin)


def advantage_cases(shape):
    rewards = positive(shape.rollouts)
    groups = torch.arange(shape.rollouts, device=DEVICE) // 16
    yield Case(
        "group statistics",
        f"{shape.rollouts} rollouts",
        target="<= 6 us",
        ours=without_gradients(advantage.group_statistics, rewards, groups),
        peers={"eager": without_gradients(eager_statistics, rewards)},
        compiled=eager_statistics,
        inputs=(rewards,),
        graph=True,
    )


def eager_statistics(rewards):
    """Equal groups of 16 without masks: all that plain torch does without waiting for the host.

    Ours takes ragged groups and NaN in the same launch.
    """
    by_group = rewards.view(-1, 16)
    mean = by_group.mean(1).repeat_interleave(16)
    std = by_group.std(1).repeat_interleave(16)
    return mean, std, by_group.amin(1) >= by_group.amax(1)


FAMILIES = {
    "head": head_cases,
    "sampling": sampling_cases,
    "attention": attention_cases,
    "layers": layer_cases,
    "advantage": advantage_cases,
}


# ---- inputs and calls ----


def tensor(*shape, grad=False):
    """Random numbers, never zeros (zeros run 13 % faster on an H200), in the device's dtype."""
    x = torch.randn(*shape, device=DEVICE, dtype=DTYPE)
    if len(shape) > 1:
        x /= shape[-1] ** 0.5
    return x.requires_grad_(grad)


def positive(count):
    return torch.rand(count, device=DEVICE) + 0.5


def with_gradients(function, inputs):
    """function(*inputs) and the gradient of the sum of its outputs."""

    def run():
        outputs = function(*inputs)
        total = sum(x.float().sum() for x in outputs)
        return torch.autograd.grad(total, [x for x in inputs if x.requires_grad])

    return run


def backward_only(function, inputs, upstream):
    outputs = function(*inputs)

    def run():
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    return run


def without_gradients(function, *inputs):
    def run():
        with torch.no_grad():
            return function(*inputs)

    return run


# ---- measuring ----


def measured_ceilings(size):
    """Copy and matrix product of random numbers, [size, size] in the device's dtype."""
    source = torch.randn(size * size * 8, device=DEVICE)
    target = torch.empty_like(source)
    copy = warm_ms(lambda: target.copy_(source)).median
    a, b = tensor(size, size), tensor(size, size)
    product = warm_ms(lambda: a @ b).median
    return Ceilings(2 * source.numel() * 4 / copy * 1e3, 2 * size**3 / product * 1e3)


def measure(case, model, ceilings, compile_peers):
    """One row, for the table and for JSON; times in milliseconds."""
    peers = dict(case.peers)
    if case.compiled and compile_peers:
        compiled = torch.compile(case.compiled, dynamic=False)
        if case.gradients:
            peers["compile"] = with_gradients(compiled, case.inputs)
        else:
            peers["compile"] = without_gradients(compiled, *case.inputs)

    seconds = max(case.bytes / ceilings.bandwidth, case.flops / ceilings.rate)
    return {
        "kernel": case.kernel,
        "model": model,
        "size": case.size,
        "floor": 1e3 * seconds,
        "target": case.target,
        "ours": attempt(case.ours, case.graph),
        "peers": {name: attempt(run, case.graph) for name, run in peers.items()},
    }


def attempt(run, graph):
    """Times, or why there are none: a peer that runs out of memory must not end the table."""
    try:
        return {"first_call": first_call_ms(run)} | warm_ms(run, graph)._asdict()
    except Exception as problem:
        reason = str(problem).partition("\n")[0][:80]
        return {"failed": f"{type(problem).__name__}: {reason}"}
    finally:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def first_call_ms(run):
    """The host's time of one call, kernels compiled and not taken from Triton's cache on disk."""
    knobs = triton.knobs.compilation.scope() if triton else nullcontext()
    with knobs:
        if triton:
            triton.knobs.compilation.always_compile = True
        start = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)


def warm_ms(run, graph=False):
    """Times of calls after warm-up, which both functions of triton.testing begin with."""
    if DEVICE == "cuda" and graph:
        return Times(*triton.testing.do_bench_cudagraph(run, quantiles=[0.5, 0.2, 0.8]))
    if DEVICE == "cuda":
        return Times(*triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8]))

    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return Times(median=times[2], p20=times[1], p80=times[3])


HEADER = (
    f"{'kernel':40} {'model':6} {'size':34} {'floor us':>9} {'warm us':>9} (20th-80th pct.)  "
    f"{'warm/floor':>10} {'target':>8} {'first call ms':>13}  warm peers, times ours"
)


def line(row):
    """One line of the table."""
    name = f"{row['kernel']:40} {row['model']:6} {row['size']:34}"
    ours = row["ours"]
    if "failed" in ours:
        return f"{name} FAILED {ours['failed']}"

    spread = f"({1e3 * ours['p20']:.1f}-{1e3 * ours['p80']:.1f})"
    ratio = f"{ours['median'] / row['floor']:.2f}" if row["floor"] else "-"
    peers = []
    for peer, times in row["peers"].items():
        if "failed" in times:
            peers.append(f"{peer} failed")
        else:
            peers.append(f"{peer} {times['median'] / ours['median']:.2f}x")

    columns = f"{1e3 * row['floor']:9.1f} {1e3 * ours['median']:9.1f} {spread:16}  {ratio:>10}"
    return f"{name} {columns} {row['target']:>8} {ours['first_call']:13.1f}  {', '.join(peers)}"


# ---- other tiles ----


def sweep(shape, ceilings):
    """Each tile of SWEEP for log-prob statistics, the logit gradient and sampling."""
    hidden = tensor(shape.tokens, shape.hidden)
    weight = tensor(shape.vocabulary, shape.hidden)
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,), device=DEVICE)

    run = without_gradients(head.stats, hidden, weight, targets, 1.0)
    yield from sweep_tiles(head.TILES, "stats", run, shape.tokens, weight, ceilings)

    half = shape.tokens // 2
    columns = [positive(half)] * 4
    arguments = (hidden[:half], weight, targets[:half], *columns, 1.0)
    run = without_gradients(head.gradient, *arguments)
    yield from sweep_tiles(head.TILES, "gradient", run, half, weight, ceilings)

    for batch in shape.batches:
        kernel = "few" if batch <= sampling.FEW_ROWS else "many"
        uniforms = torch.rand(2, batch, device=DEVICE)
        run = without_gradients(sampling.draw, hidden[:batch], weight, positive(batch), uniforms)
        yield from sweep_tiles(sampling.TILES, kernel, run, batch, weight, ceilings)


def sweep_tiles(table, kernel, run, rows, weight, ceilings):
    """Put each tile into `table` in turn; the chosen one is there again afterwards."""
    chosen = table[kernel, 90]
    read = weight.numel() * ITEM / ceilings.bandwidth
    multiply = 2 * rows * weight.numel() / ceilings.rate
    for tile in SWEEP:
        table[kernel, 90] = tile
        result = {
            "kernel": kernel,
            "rows": rows,
            "tile": list(tile),
            "chosen": tile == chosen,
            "floor": 1e3 * max(read, multiply),
        }
        yield result | attempt(run, graph=False)
    table[kernel, 90] = chosen


def main(arguments=None):
    options = parse(arguments)
    models = ["smoke"] if options.smoke else options.models.split(",")
    families = options.only.split(",")
    unknown = [name for name in models if name not in SHAPES]
    unknown += [name for name in families if name not in FAMILIES]
    if unknown:
        raise SystemExit(
            f"unknown {', '.join(unknown)}: models are 0.5B, 1.5B, 3B, "
            f"families {', '.join(FAMILIES)}"
        )
    if DEVICE == "cpu" and options.sweep and not options.smoke:
        raise SystemExit("--sweep needs a CUDA GPU; with --smoke it runs on this machine")
    if DEVICE == "cpu" and not options.smoke:
        processor.main()
        return

    torch.manual_seed(0)
    ceilings = measured_ceilings(256 if options.smoke else 8192)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()})"
    print(
        f"{device}, torch {torch.__version__}: copy {ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"matrix product {ceilings.rate / 1e12:.0f} TFLOP/s"
    )

    rows = []
    if options.sweep:
        for model in models:
            for row in sweep(SHAPES[model], ceilings):
                rows.append(row | {"model": model})
                print(json.dumps(rows[-1]), flush=True)
    else:
        print(HEADER)
        compile_peers = DEVICE == "cuda" and not options.no_compile
        for model in models:
            for family in families:
                if family == "advantage" and model != models[0]:
                    continue  # the same for every model
                for case in FAMILIES[family](SHAPES[model]):
                    rows.append(measure(case, model, ceilings, compile_peers))
                    print(line(rows[-1]), flush=True)

    summary = {
        "device": device,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "rows": rows,
    }
    print(json.dumps(summary | ceilings._asdict()))


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        default="0.5B,1.5B,3B",
        help="comma-separated, of 0.5B, 1.5B, 3B",
    )
    parser.add_argument(
        "--only",
        default=",".join(FAMILIES),
        help=f"comma-separated, of {', '.join(FAMILIES)}",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="alternative tiles of the lm_head kernels",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out (it takes most of the run)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
