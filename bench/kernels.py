"""Every kernel beside its floor, torch eager, torch.compile and (when installed) Liger-Kernel.

    python -m bench kernels                      Qwen2.5-Coder 0.5B, 1.5B and 3B shapes on one GPU, under ten minutes
    python -m bench kernels --models 1.5B --only head,attention
    python -m bench kernels --sweep              times the alternative tiles of the lm_head kernels instead
    python -m bench kernels --smoke              tiny shapes on any machine: shows that the bench runs, its times mean nothing

A floor is max(bytes / copy bandwidth, operations / matrix rate), both measured at the start of the same run. Times are medians with the 20th and 80th
percentile; L2 is emptied before each call. Calls of decoding are timed as replays of a CUDA graph, which is how the sampler runs them (L2 stays warm;
keys, values and the head are several times its size). "target" is the ratio to the floor aimed at (for launch-bound kernels: microseconds).
"""

import argparse
import inspect
import json
import platform
import time
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from kernels import advantage, attention, head, layers, logprob, sampling, triton

# hidden, intermediate, query heads, KV heads, head dim, vocabulary, training tokens, decode batches, context
SHAPES = {
    "0.5B": (896, 4864, 14, 2, 64, 151_936, 8192, (64, 256, 512), 1024),
    "1.5B": (1536, 8960, 12, 2, 128, 151_936, 8192, (64, 256, 512), 1024),
    "3B": (2048, 11008, 16, 2, 128, 151_936, 8192, (64, 256, 512), 1024),
    "smoke": (64, 96, 6, 2, 16, 500, 48, (4,), 64),
}
FAMILIES = ("head", "sampling", "attention", "layers", "advantage")


class Case(NamedTuple):
    """One row of the table. `ours` and each peer take no arguments; compiled: a peer to run under torch.compile, called with `inputs`, with
    gradients or without; graph: time replays of a CUDA graph."""

    kernel: str
    size: str
    bytes: float
    flops: float
    target: str
    ours: Callable
    peers: dict
    compiled: Callable | None = None
    inputs: tuple = ()
    gradients: bool = False
    graph: bool = False


def tensor(*shape, grad=False):
    """Random numbers, never zeros (zeros run 13 % faster on an H200), in the dtype of the device."""
    x = torch.randn(*shape, device=DEVICE, dtype=DTYPE) / (
        shape[-1] ** 0.5 if len(shape) > 1 else 1
    )
    return x.requires_grad_(grad)


def floats(count):
    return torch.rand(count, device=DEVICE) + 0.5


DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

# Peers: plain torch, the way one would write it. They hold the whole [T, V].


def eager_logprobs(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def eager_loss(hidden, weight, targets, old, advantages):
    logp = F.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).sum()


def eager_sample(hidden, weight):
    probabilities = (hidden @ weight.T).float().softmax(-1)
    token = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return token, probabilities.gather(1, token[:, None]).log()


def eager_qkv_write(qkv, bias, cos, sin, k_pages, v_pages, page, offset, heads):
    kv_heads, _, head_dim = k_pages.shape[1:]
    q, k, v = (qkv + bias).view(len(qkv), -1, head_dim).split((heads, kv_heads, kv_heads), 1)
    k_pages[page, :, offset] = layers.apply_rope_reference(k, cos, sin)
    v_pages[page, :, offset] = v
    return layers.apply_rope_reference(q, cos, sin)


def with_gradients(function, inputs):
    """function(*inputs) and the gradient of the sum of its outputs."""

    def run():
        outputs = function(*inputs)
        total = sum(x.float().sum() for x in outputs) if isinstance(outputs, tuple) else outputs
        return torch.autograd.grad(total, [x for x in inputs if x.requires_grad])

    return run


def backward_only(function, inputs, upstream):
    outputs = function(*inputs)
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def without_gradients(function, *inputs):
    def run():
        with torch.no_grad():
            return function(*inputs)

    return run


def liger(name):
    """A function of Liger-Kernel's operators, or None: the table then has no such column for the row."""
    try:
        from liger_kernel.chunked_loss import grpo_loss
        from liger_kernel.ops import fused_add_rms_norm, fused_linear_scaled_cross_entropy, swiglu
    except ImportError:
        return None
    scaled = fused_linear_scaled_cross_entropy._FusedLinearPPOFallbackFunction.apply
    return {
        "logprobs": lambda hidden, weight, targets: scaled(
            hidden, weight, targets, 1.0, -100, True
        ),
        "grpo": grpo_loss.LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_high=0.28
        ),
        "norm": lambda x, residual, weight: fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply(
            x, residual, weight, 1e-6
        ),
        "swiglu": swiglu.LigerSiLUMulFunction.apply,
    }[name]


# Cases. `shape` is a row of SHAPES.


def head_cases(shape):
    width, *_, vocabulary, tokens, _, _ = shape
    hidden, weight = tensor(tokens, width, grad=True), tensor(vocabulary, width, grad=True)
    targets, old, advantages = (
        torch.randint(0, vocabulary, (tokens,), device=DEVICE),
        -12 * floats(tokens),
        floats(tokens) - 1,
    )
    product, inputs, size = (
        2 * tokens * vocabulary * width,
        (hidden, weight, targets),
        f"{tokens} tokens",
    )
    peer = liger("logprobs")
    also = {"liger": without_gradients(peer, *inputs)} if peer else {}
    ours, eager = (
        without_gradients(logprob.token_logprobs, *inputs),
        without_gradients(eager_logprobs, *inputs),
    )
    yield Case(
        "log-prob + entropy, forward",
        size,
        0,
        product,
        "1.5",
        ours,
        {"eager": eager} | also,
        eager_logprobs,
        inputs,
    )
    also = {"liger": with_gradients(peer, inputs)} if peer else {}
    ours, eager = (
        with_gradients(logprob.token_logprobs, inputs),
        with_gradients(eager_logprobs, inputs),
    )
    yield Case(
        "log-prob + entropy, forward + backward",
        size,
        0,
        4 * product,
        "1.6",
        ours,
        {"eager": eager} | also,
        eager_logprobs,
        inputs,
        True,
    )

    def token_loss(logp, _entropy, rows):
        ratio = (logp - old[rows]).exp()
        return -torch.minimum(ratio * advantages[rows], ratio.clamp(0.8, 1.28) * advantages[rows])

    fused = with_gradients(
        lambda h, w, t: logprob.fused_policy_loss(h, w, t, token_loss)[0], inputs
    )
    inputs = (*inputs, old, advantages)
    peer, rows = liger("grpo"), max(1, tokens // 256)
    by_row = lambda x: x.view(rows, tokens // rows, *x.shape[1:])  # noqa: E731
    mask = torch.ones(rows, tokens // rows, device=DEVICE)
    call = lambda h, w, *_: peer(
        by_row(h), w, by_row(targets), mask, advantages[:rows], old_per_token_logps=by_row(old)
    )[0]  # noqa: E731
    also = {"liger": with_gradients(call, inputs)} if peer else {}
    yield Case(
        "fused policy loss",
        size,
        0,
        3 * product,
        "1.5",
        fused,
        {"eager": with_gradients(eager_loss, inputs)} | also,
        eager_loss,
        inputs,
        True,
    )


def sampling_cases(shape):
    width, *_, vocabulary, _, batches, _ = shape
    weight = tensor(vocabulary, width)
    for batch in batches:
        hidden, ones = tensor(batch, width) * 8, torch.ones(batch, device=DEVICE)
        key = [torch.randint(0, 1 << 40, (batch,), device=DEVICE) for _ in range(4)]
        ours, eager = (
            without_gradients(sampling.sample_tokens, hidden, weight, ones, *key),
            without_gradients(eager_sample, hidden, weight),
        )
        moved, work = weight.numel() * weight.element_size(), 2 * batch * weight.numel()
        target = "1.3" if batch <= 128 else "1.5"
        yield Case(
            "sample + log-prob + entropy",
            f"{batch} rows",
            moved,
            work,
            target,
            ours,
            {"eager": eager},
            eager_sample,
            (hidden, weight),
            graph=True,
        )


def attention_cases(shape):
    _, _, heads, kv_heads, head_dim, _, _, batches, context = shape
    batch = batches[len(batches) // 2]
    ragged = torch.linspace(context // 10, context, batch).int().tolist()
    yield decode_case(f"{batch} x {context}", "1.35", [context] * batch, heads, kv_heads, head_dim)
    yield decode_case(
        f"{batch} x {context // 10}..{context}", "1.6", ragged, heads, kv_heads, head_dim
    )
    yield decode_case(
        f"{batch} x {context}, {context // 2} shared by 16",
        "1.7",
        [context] * batch,
        heads,
        kv_heads,
        head_dim,
        shared=16,
    )


def decode_case(size, target, lengths, heads, kv_heads, head_dim, shared=0):
    page_size = 8192 // head_dim if DEVICE == "cuda" else 16
    pages, batch, longest = [-(-n // page_size) for n in lengths], len(lengths), max(lengths)
    prefix = longest // 2 // page_size
    order, tables = (
        iter(torch.randperm(sum(pages)).tolist()),
        torch.zeros(batch, max(pages), dtype=torch.int32),
    )
    for row, count in enumerate(pages):
        for index in range(count):
            first = row // shared * shared if shared and index < prefix else row
            tables[row, index] = tables[first, index] if first < row else next(order)
    k_pages, v_pages = (
        tensor(sum(pages), kv_heads, page_size, head_dim) * head_dim**0.5 for _ in range(2)
    )
    q, length, scale = (
        tensor(batch, heads, head_dim) * head_dim**0.5,
        torch.tensor(lengths, dtype=torch.int32),
        head_dim**-0.5,
    )
    q, tables, length = q.to(DEVICE), tables.to(DEVICE), length.to(DEVICE)
    inputs = (q, k_pages, v_pages, tables, length)
    if shared:
        groups, prefix_lengths = (
            torch.arange(batch, device=DEVICE) // shared,
            torch.full_like(length, prefix * page_size),
        )
        ours = without_gradients(
            attention.shared_prefix_attention, *inputs, prefix_lengths, groups, scale
        )
        peers = {"not shared": without_gradients(attention.paged_attention, *inputs, scale)}
        tokens = sum(lengths) - prefix * page_size * (batch - -(-batch // shared))
    else:
        ours, peers, tokens = (
            without_gradients(attention.paged_attention, *inputs, scale),
            packed_peers(q, lengths, kv_heads, head_dim),
            sum(lengths),
        )
    moved = 2 * tokens * kv_heads * head_dim * q.element_size()
    return Case(
        "decode attention" + ", shared prefix" * bool(shared),
        size,
        moved,
        0,
        target,
        ours,
        peers,
        graph=True,
    )


def packed_peers(q, lengths, kv_heads, head_dim):
    """Attention over contiguous keys and values, without the indirection of pages: padded SDPA with a mask, and flash varlen."""
    batch, longest = len(lengths), max(lengths)
    k, v = (tensor(batch, kv_heads, longest, head_dim) for _ in range(2))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None].to(DEVICE)
    peers = {
        "sdpa": without_gradients(
            lambda: F.scaled_dot_product_attention(
                q[:, :, None], k, v, attn_mask=mask, enable_gqa=True
            )
        )
    }
    if DEVICE == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        packed_k, packed_v = (tensor(sum(lengths), kv_heads, head_dim) for _ in range(2))
        ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()
        ones = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        gqa = (
            {"enable_gqa": True}
            if "enable_gqa" in inspect.signature(varlen_attn).parameters
            else {}
        )
        peers["varlen"] = without_gradients(
            lambda: varlen_attn(q, packed_k, packed_v, ones, ends, 1, longest, **gqa)
        )
    return peers


def layer_cases(shape):
    width, intermediate, heads, kv_heads, head_dim, _, tokens, batches, _ = shape
    peer, item = liger("norm"), torch.finfo(DTYPE).bits // 8
    for rows, graph in ((batches[-1], True), (tokens, False)):
        inputs = (tensor(rows, width), tensor(rows, width), tensor(width))
        call, plain = (
            lambda *a: layers.add_rms_norm(*a, 1e-6),
            lambda *a: layers.add_rms_norm_reference(*a, 1e-6),
        )
        also = {"liger": without_gradients(peer, *inputs)} if peer else {}
        ours, eager = without_gradients(call, *inputs), without_gradients(plain, *inputs)
        yield Case(
            "add + RMSNorm",
            f"{rows} tokens",
            4 * rows * width * item,
            0,
            "1.25",
            ours,
            {"eager": eager} | also,
            plain,
            inputs,
            graph=graph,
        )
    inputs = tuple(x.requires_grad_() for x in inputs)
    upstream = (tensor(tokens, width), tensor(tokens, width))
    peers = {"eager": backward_only(plain, inputs, upstream)}
    if peer:
        peers["liger"] = backward_only(peer, inputs, upstream)
    yield Case(
        "add + RMSNorm, backward",
        f"{tokens} tokens",
        4 * tokens * width * item,
        0,
        "1.25",
        backward_only(call, inputs, upstream),
        peers,
    )
    gate_up, peer = tensor(tokens, 2 * intermediate, grad=True), liger("swiglu")
    halves = tuple(x.detach().contiguous().requires_grad_() for x in gate_up.chunk(2, -1))
    plain, moved = (
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        3 * tokens * intermediate * item,
    )
    peers = {"eager": without_gradients(plain, gate_up)} | (
        {"liger": without_gradients(peer, *halves)} if peer else {}
    )
    yield Case(
        "SwiGLU",
        f"{tokens} tokens",
        moved,
        0,
        "1.2",
        without_gradients(layers.swiglu, gate_up),
        peers,
        plain,
        (gate_up,),
    )
    upstream = (tensor(tokens, intermediate),)
    peers = {"eager": backward_only(plain, (gate_up,), upstream)} | (
        {"liger": backward_only(peer, halves, upstream)} if peer else {}
    )
    yield Case(
        "SwiGLU, backward",
        f"{tokens} tokens",
        5 / 3 * moved,
        0,
        "1.25",
        backward_only(layers.swiglu, (gate_up,), upstream),
        peers,
    )
    for rows, target in ((batches[-1], "<= 4 us"), (tokens, "1.4")):
        yield qkv_case(rows, target, heads, kv_heads, head_dim, item)


def qkv_case(rows, target, heads, kv_heads, head_dim, item):
    page_size, total = 64, (heads + 2 * kv_heads) * head_dim
    slots = torch.randperm(2 * rows * page_size, device=DEVICE)[:rows]
    k_pages, v_pages = (tensor(2 * rows, kv_heads, page_size, head_dim) for _ in range(2))
    cos, sin = layers.rope_tables(torch.arange(rows, device=DEVICE), head_dim, 1e6)
    start = (tensor(rows, total), tensor(total), cos, sin, k_pages, v_pages)
    ours = without_gradients(layers.qkv_rope_write, *start, slots, heads)
    inputs = (*start, slots // page_size, slots % page_size, heads)
    eager = without_gradients(eager_qkv_write, *inputs)
    return Case(
        "qkv bias + RoPE + page write",
        f"{rows} tokens",
        2 * rows * total * item,
        0,
        target,
        ours,
        {"eager": eager},
        eager_qkv_write,
        inputs,
        graph=True,
    )


def advantage_cases(shape):
    rollouts, tokens = (512, 65_536) if shape[5] > 1000 else (16, 128)
    rewards, groups = floats(rollouts), torch.arange(rollouts, device=DEVICE) // 16
    # Equal groups of 16 without masks, all that plain torch does without a host sync; ours takes ragged groups and NaN in the same launch.
    by_group = lambda r: (
        (r.view(-1, 16) - r.view(-1, 16).mean(1, True))
        / (r.view(-1, 16).std(1, keepdim=True) + 1e-6)
    ).flatten()  # noqa: E731
    ours, eager = (
        without_gradients(advantage.group_advantages, rewards, groups),
        without_gradients(by_group, rewards),
    )
    yield Case(
        "group advantage",
        f"{rollouts} rollouts",
        0,
        0,
        "<= 6 us",
        ours,
        {"eager": eager},
        by_group,
        (rewards,),
        graph=True,
    )
    inputs = tuple(floats(tokens) for _ in range(4))
    call = lambda *a: advantage.policy_loss(*a, 0.2, 0.28)  # noqa: E731
    plain = lambda *a: advantage.policy_loss_reference(*a, 0.2, 0.28, None, None, 0.0)  # noqa: E731
    ours, eager = without_gradients(call, *inputs), without_gradients(plain, *inputs)
    yield Case(
        "policy loss + moments",
        f"{tokens} tokens",
        5 * 4 * tokens,
        0,
        "<= 6 us",
        ours,
        {"eager": eager},
        plain,
        inputs,
        graph=True,
    )


# Measuring


def time_ms(run, graph=False, repetitions=100):
    """(median, 20th percentile, 80th percentile) in milliseconds."""
    if DEVICE == "cuda":
        bench = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
        return bench(run, rep=20 if graph else repetitions, quantiles=[0.5, 0.2, 0.8])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[2], sorted(times)[1], sorted(times)[3]


def measured_ceilings(size):
    """(bytes per second of a copy, read plus written; operations per second of a bf16 product of random matrices)."""
    source = torch.randn(size * size * 8, device=DEVICE)
    target = torch.empty_like(source)
    copy = time_ms(lambda: target.copy_(source))[0]
    a, b = tensor(size, size), tensor(size, size)
    return 2 * source.numel() * 4 / copy * 1e3, 2 * size**3 / time_ms(lambda: a @ b)[0] * 1e3


def attempt(run, graph):
    """Time or the reason there is none: a peer that runs out of memory must not end the table."""
    try:
        return dict(zip(("median", "p20", "p80"), time_ms(run, graph)))
    except Exception as problem:
        return {
            "failed": f"{type(problem).__name__}: {str(problem).splitlines()[0][:80] if str(problem) else ''}"
        }
    finally:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def measure(case, model, bandwidth, rate, compile_peers):
    peers = dict(case.peers)
    if case.compiled and compile_peers:
        compiled = torch.compile(case.compiled, dynamic=False)
        peers["compile"] = (
            with_gradients(compiled, case.inputs)
            if case.gradients
            else without_gradients(compiled, *case.inputs)
        )
    floor = 1e3 * max(case.bytes / bandwidth, case.flops / rate)
    row = {
        "kernel": case.kernel,
        "model": model,
        "size": case.size,
        "floor": floor,
        "target": case.target,
        "ours": attempt(case.ours, case.graph),
    }
    return row | {"peers": {name: attempt(run, case.graph) for name, run in peers.items()}}


def line(row):
    """One line of the table: microseconds, the ratio to the floor, and how much longer each peer takes."""
    ours = row["ours"]
    if "failed" in ours:
        return f"{row['kernel']:40} {row['model']:6} {row['size']:34} FAILED {ours['failed']}"
    text = f"{row['kernel']:40} {row['model']:6} {row['size']:34} {1e3 * row['floor']:9.1f} {1e3 * ours['median']:9.1f}"
    text += (
        f" ({1e3 * ours['p20']:.1f}-{1e3 * ours['p80']:.1f})  {ours['median'] / row['floor']:6.2f}"
        if row["floor"]
        else "       -"
    )
    peers = [
        f"{name} {p['median'] / ours['median']:.2f}x" if "median" in p else f"{name} failed"
        for name, p in row["peers"].items()
    ]
    return f"{text}  target {row['target']:8} " + ", ".join(peers)


# Tiles to try on a GPU, each without spills on sm_90 (python -m bench.aot): rows, depth, warps, stages, register cap.
SWEEP = [
    head.Tile(128, 64, 8, 3, 128),
    head.Tile(128, 64, 8, 4, None),
    head.Tile(128, 128, 8, 3, None),
    head.Tile(64, 64, 4, 3, None),
    head.Tile(64, 64, 4, 4, None),
    head.Tile(64, 128, 4, 3, None),
    head.Tile(128, 32, 8, 4, 128),
]


def sweep(shape, bandwidth, rate):
    """Each tile for log-prob statistics, the logit gradient and sampling: milliseconds."""
    width, *_, vocabulary, tokens, batches, _ = shape
    hidden, weight, column = tensor(tokens, width), tensor(vocabulary, width), floats(tokens)
    targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    key = [torch.randint(0, 1 << 40, (max(batches),), device=DEVICE) for _ in range(4)]
    runs = {
        ("stats", tokens): lambda: head.stats(hidden, weight, targets, 1.0),
        ("gradient", tokens // 2): lambda: head.gradient(
            hidden[: tokens // 2], weight, targets[: tokens // 2], *[column[: tokens // 2]] * 4, 1.0
        ),
    } | {
        ("few" if b <= 64 else "many", b): lambda b=b: sampling._sample_tokens(
            hidden[:b], weight, column[:b], *(k[:b] for k in key)
        )
        for b in batches
    }
    for (kernel, rows), run in runs.items():
        table = head.TILES if kernel in ("stats", "gradient") else sampling.TILES
        chosen, floor = (
            table[kernel, 90],
            1e3 * max(weight.numel() * 2 / bandwidth, 2 * rows * weight.numel() / rate),
        )
        for tile in SWEEP:
            table[kernel, 90] = tile
            result = attempt(run, False)
            yield {
                "kernel": kernel,
                "rows": rows,
                "tile": list(tile),
                "chosen": tile == chosen,
                "floor": floor,
                **result,
            }
        table[kernel, 90] = chosen


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", default="0.5B,1.5B,3B", help="comma-separated, of 0.5B, 1.5B, 3B"
    )
    parser.add_argument(
        "--only", default=",".join(FAMILIES), help=f"comma-separated, of {', '.join(FAMILIES)}"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument(
        "--sweep", action="store_true", help="alternative tiles of the lm_head kernels"
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out (it takes most of the run)",
    )
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.smoke:
        raise SystemExit(
            "python -m bench kernels needs a CUDA GPU; --smoke runs tiny shapes on this machine"
        )
    models = ["smoke"] if options.smoke else options.models.split(",")
    unknown = [x for x in models if x not in SHAPES] + [
        x for x in options.only.split(",") if x not in FAMILIES
    ]
    if unknown:
        raise SystemExit(
            f"unknown {', '.join(unknown)}: models are 0.5B, 1.5B, 3B, families {', '.join(FAMILIES)}"
        )
    torch.manual_seed(0)
    bandwidth, rate = measured_ceilings(256 if options.smoke else 8192)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()})"
    print(
        f"{device}, torch {torch.__version__}: copy {bandwidth / 1e12:.2f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s"
    )
    rows = []
    for model in models:
        if options.sweep:
            rows += [row | {"model": model} for row in sweep(SHAPES[model], bandwidth, rate)]
            print(*(json.dumps(row) for row in rows if row["model"] == model), sep="\n")
            continue
        for family in options.only.split(","):
            if family == "advantage" and model != models[0]:
                continue  # the same for every model
            cases = {
                "head": head_cases,
                "sampling": sampling_cases,
                "attention": attention_cases,
                "layers": layer_cases,
                "advantage": advantage_cases,
            }
            for case in cases[family](SHAPES[model]):
                rows.append(
                    measure(
                        case, model, bandwidth, rate, not options.no_compile and DEVICE == "cuda"
                    )
                )
                print(line(rows[-1]), flush=True)
    versions = {
        "device": device,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
    }
    print(json.dumps(versions | {"bandwidth": bandwidth, "rate": rate, "rows": rows}))


if __name__ == "__main__":
    main()
