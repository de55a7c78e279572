"""Matrix product whose sums do not depend on how many rows there are, for the exact mode (exact.py).

cuBLAS picks tile and split by shape, so the same row gets other last bits in a batch of 64 than in one of 16,384. Here one tile serves every number
of rows, and each sum runs over the depth from first to last. What that costs against cuBLAS is for `python -m bench sampler` to say.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels import TensorDescriptor, architecture, head, jit, tl, triton
from kernels.head import Tile, tile_product

# 64 rows, so that a decode step of 64 samples wastes nothing; three programs of 128 threads share a Hopper multiprocessor.
LINEAR = {90: Tile(64, 64, 4, 3), 80: Tile(64, 64, 4, 3)}
COLUMNS = 128

linear_reference = F.linear


@jit
def _linear_kernel(
    x,
    w,
    out,
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
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, TILE)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(
        out + rows.to(tl.int64)[:, None] * N + columns[None, :],
        product.to(out.dtype.element_ty),
        mask=inside,
    )


def _linear(x, weight, arch=None):
    arch = arch or architecture(x)
    tile, (rows, depth), width = LINEAR[arch], x.shape, len(weight)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    x, weight = x.contiguous(), weight.contiguous()
    if arch >= 90:
        operands = (
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight, [COLUMNS, tile.depth]),
        )
    else:
        operands = x, weight
    shape = {"ROWS": tile.rows, "TILE": COLUMNS, "DEPTH": tile.depth, "TMA": arch >= 90}
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(width, COLUMNS),)
    _linear_kernel[grid](*operands, out, rows, width, depth, **shape, **head.launch_options(tile))
    return out


def fixed_linear(x, weight):
    """x [T, D] @ weight [N, D].T -> [T, N], each row the same to the last bit whatever the other rows. Not differentiable; 16 bits, D a multiple of 64."""
    return _linear(x, weight) if head.fits(x) else linear_reference(x, weight)
