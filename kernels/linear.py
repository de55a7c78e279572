"""Matrix products that torch does not do well enough: training's on some CPUs, the exact mode's.

fp32 on a CPU: torch leaves products to MKL, which takes AVX-512 only where the processor says that
Intel made it. On an AMD EPYC with AVX-512 oneDNN, which torch has too, takes less than half of the
time at the same precision (BENCHMARKS.md, "Products on a CPU").

The exact mode (runtime/exact.py): cuBLAS picks tile and split by shape, so the same row gets other
last bits in a batch of 64 than in one of 16,384. Here one tile serves every number of rows, and
each sum runs over the depth from first to last. `python -m bench sampler` times it against cuBLAS.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch.nn import functional as F

from kernels import architecture, head, jit, tl, triton
from kernels.head import TILE, Tile, tile_product

# oneDNN compiles a product for every number of rows and keeps it, some 0.7 MB each: rows are filled
# up to a multiple of this.
FILLED = 64
# Rows of a head's gradient at a time: what is added to them, 15 MB at a width of 896, stays in the
# caches. 160 GFLOP/s a core; addmm_ has 110 (EPYC).
BLOCK = 4096

# 64 rows, so that a decode step of 64 samples wastes nothing; three programs of 128 threads share a
# Hopper multiprocessor.
LINEAR = {90: Tile(64, 64, 4, 3), 80: Tile(64, 64, 4, 3)}


# ---- training on a CPU ----


def fast_linear(x, weight):
    """x [T, D] @ weight [N, D].T -> [T, N]; differentiable. F.linear where oneDNN is not faster."""
    if not takes_onednn(x):
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        for_x = for_weight = None
        gradient = filled(gradient)  # once for both
        if ctx.needs_input_grad[0]:
            for_x = product(gradient, weight.T)[: len(x)]
        if ctx.needs_input_grad[1]:
            for_weight = weight_gradient(gradient, x)
        return for_x, for_weight


def product(x, weight):
    """x [T, D] @ weight [N, D].T -> [T, N] by the faster library. Not differentiable.

    `weight` may be a transposed view, as a gradient's factor is.
    """
    if not takes_onednn(x):
        return x @ weight.T
    return _onednn(filled(x), weight)[: len(x)]


def weight_gradient(gradient, x):
    """gradient [T, N].T @ x [T, D] -> [N, D] by the faster library. Not differentiable."""
    if not takes_onednn(x):
        return gradient.T @ x
    return _onednn(filled(gradient).T, filled(x).T)


def add_weight_gradient(total, gradient, x):
    """total [N, D] += gradient [T, N].T @ x [T, D] by the faster library."""
    if not takes_onednn(x):
        total.addmm_(gradient.T, x)
        return
    x = filled(x).T
    for start in range(0, len(total), BLOCK):
        rows = slice(start, start + BLOCK)
        part = filled(gradient[:, rows])
        total[rows].add_(_onednn(part.T, x))


def _onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def filled(x):
    """x [T, D] with rows of zeros up to a multiple of FILLED."""
    missing = -len(x) % FILLED
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def takes_onednn(x):
    return x.dtype == torch.float32 and x.is_cpu and onednn_is_faster()


@functools.cache
def onednn_is_faster():
    """Whether this processor has AVX-512, and MKL will not use it because Intel did not make it.

    A rule and no measurement, so that two runs on one machine give the same bits.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "vendor_id" in described and "GenuineIntel" not in described


# ---- the exact mode ----


def fixed_linear(x, weight):
    """x [T, D] @ weight [N, D].T -> [T, N], each row the same to the last bit whatever the others.

    Not differentiable. The kernel takes 16 bits and D a multiple of 64; else it is F.linear.
    """
    if not head.fits(x):
        return F.linear(x, weight)
    return _linear(x, weight)


def _linear(x, weight, arch=None):
    arch = arch or architecture(x)
    tile = LINEAR[arch]
    rows, depth = x.shape
    width = len(weight)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)

    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, TILE),)
    _linear_kernel[grid](
        *head.operands(x.contiguous(), weight.contiguous(), tile, arch),
        out,
        rows,
        width,
        depth,
        **head.tile_options(tile, arch),
    )
    return out


@jit(do_not_specialize=["M"])
def _linear_kernel(
    x,  # [M, D]
    w,  # [N, D]
    out,  # [M, N]
    M,
    N,
    D,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    row_tiles = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    column = tl.program_id(0) // row_tiles * TILE
    product = tile_product(x, w, row, column, M, N, D, ROWS, TILE, DEPTH, TMA)

    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, TILE)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_at, product.to(out.dtype.element_ty), mask=inside)
