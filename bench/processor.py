"""The kernels of a CPU beside torch's calls: `python -m bench kernels` where there is no GPU.

Decode attention: native.c compiled for this processor and for older ones, beside torch's grouped
matrix products over keys and values that lie in one piece. Products: the linear layers and the head
of training, forward and backward, beside torch's.

Times are medians of calls after a warm-up; the calls of a row and of its peer are taken in turn.
"""

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.clock import device_name
from kernels import native
from kernels.linear import fast_linear, onednn_is_faster
from kernels.logprob import token_logprobs

ROUNDS = 9  # calls, after one that compiles

# name, (query heads, KV heads, head_dim), rows, tokens that a row sees
ATTENTION = (
    ("0.5B", (14, 2, 64), 128, 450),
    ("1.5B", (12, 2, 128), 64, 450),
    ("135M", (9, 3, 64), 128, 450),
    ("tiny", (4, 2, 32), 256, 120),
)
# name, tokens, inputs, outputs
PRODUCTS = (
    ("0.5B gate and up", 1500, 896, 9728),
    ("0.5B down", 1500, 4864, 896),
    ("135M gate and up", 2400, 576, 3072),
    ("tiny gate and up", 2400, 128, 768),
)
# name, tokens, hidden, vocabulary
HEADS = (
    ("0.5B head", 330, 896, 151_936),
    ("tiny head", 1400, 128, 768),
)


@dataclass
class Row:
    """One line of the table."""

    kernel: str
    size: str
    by: str  # instructions, or library
    ms: float
    torch_ms: float
    gflops: float  # per second

    def print(self):
        ratio = self.torch_ms / self.ms
        print(
            f"{self.kernel:24} {self.size:40} {self.by:10} {self.ms:9.2f} {self.gflops:9.1f}"
            f" {self.torch_ms:9.2f} {ratio:7.2f}",
            flush=True,
        )


def timed(ours, peer):
    """Milliseconds of each, medians of calls in turn."""
    times = ([], [])
    for _ in range(1 + ROUNDS):
        for run, seen in zip((ours, peer), times):
            start = time.perf_counter()
            run()
            seen.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(seen[1:]) for seen in times]


def instruction_sets():
    """This processor's, and older ones that it has too."""
    sets = ["native"]
    if platform.machine() == "x86_64":
        if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            sets.append("x86-64-v3")  # AVX2
        sets.append("x86-64")  # SSE2
    return sets


def attention_rows(name, heads, rows, context):
    query, kv, head_dim = heads
    run = -(-context // native.UNIT) * native.UNIT
    angle = torch.rand(rows, head_dim // 2)
    nothing = torch.zeros(rows, dtype=torch.int64)
    first = torch.arange(rows) * run
    tensors = (angle.cos(), angle.sin(), nothing, nothing, first, nothing + context)
    attend = native.attention(heads, *tensors, torch.ones(rows, dtype=torch.bool))
    qkv = torch.randn(rows, (query + 2 * kv) * head_dim)
    cache = torch.randn(2 * kv, rows * run, head_dim)
    out = torch.empty(rows, query * head_dim)

    def ours():
        attend(qkv.clone(), cache, out)  # it overwrites qkv

    q = torch.randn(rows, kv, query // kv, head_dim)
    keys = torch.randn(rows, kv, head_dim, context)
    values = torch.randn(rows, kv, context, head_dim)

    def grouped():
        return (q @ keys).softmax(-1) @ values

    operations = 4 * rows * query * context * head_dim
    size = f"{name}: {query}/{kv} heads of {head_dim}, {rows} x {context}"
    for instructions in instruction_sets():
        native.TARGET = instructions
        ms, torch_ms = timed(ours, grouped)
        yield Row("decode attention", size, instructions, ms, torch_ms, operations / ms / 1e6)
    native.TARGET = "native"


def product_rows(name, tokens, inputs, outputs):
    x = torch.randn(tokens, inputs, requires_grad=True)
    weight = torch.randn(outputs, inputs, requires_grad=True)
    gradient = torch.randn(tokens, outputs)

    def both(linear):
        torch.autograd.grad(linear(x, weight), (x, weight), gradient)

    def forward(linear):
        with torch.no_grad():
            linear(x, weight)

    library = "oneDNN" if onednn_is_faster() else "torch"
    size = f"{name}: {tokens} x {inputs} x {outputs}"
    product = 2 * tokens * inputs * outputs
    for kernel, run, operations in (
        ("product", forward, product),
        ("product and gradients", both, 3 * product),
    ):
        ms, torch_ms = timed(partial(run, fast_linear), partial(run, F.linear))
        yield Row(kernel, size, library, ms, torch_ms, operations / ms / 1e6)


def head_rows(name, tokens, hidden, vocabulary):
    """Beside plain torch, which holds all logits."""
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden).div_(hidden**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def ours():
        logprobs, _ = token_logprobs(x, weight, targets)
        torch.autograd.grad(logprobs.sum(), (x, weight))

    def plain():
        loss = F.cross_entropy(x @ weight.T, targets, reduction="sum")
        torch.autograd.grad(loss, (x, weight))

    library = "oneDNN" if onednn_is_faster() else "torch"
    ms, torch_ms = timed(ours, plain)
    size = f"{name}: {tokens} x {hidden} x {vocabulary}"
    operations = 8 * tokens * hidden * vocabulary  # the backward makes the logits again
    yield Row("log-prob and gradients", size, library, ms, torch_ms, operations / ms / 1e6)


def main():
    torch.manual_seed(0)
    print(f"{device_name()}, torch {torch.__version__}")
    print(
        f"{'kernel':24} {'size':40} {'by':10} {'ms':>9} {'GFLOP/s':>9} {'torch ms':>9} {'ratio':>7}"
    )
    rows = []
    for measure, cases in (
        (attention_rows, ATTENTION),
        (product_rows, PRODUCTS),
        (head_rows, HEADS),
    ):
        for case in cases:
            for row in measure(*case):
                row.print()
                rows.append(asdict(row))
    print(json.dumps({"device": device_name(), "torch": torch.__version__, "rows": rows}))
