"""Matrix product whose sums do not depend on how many rows there are, for the exact mode
(runtime/exact.py).

cuBLAS picks tile and split by shape, so the same row gets other last bits in a batch of 64 than in
one of 16,384. Here one tile serves every number of rows, and each sum runs over the depth from
first to last. `python -m bench sampler` times it against cuBLAS.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels import architecture, head, jit, tl, triton
from kernels.head import TILE, Tile, tile_product

# 64 rows, so that a decode step of 64 samples wastes nothing; three programs of 128 threads share a
# Hopper multiprocessor.
LINEAR = {90: Tile(64, 64, 4, 3), 80: Tile(64, 64, 4, 3)}


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
