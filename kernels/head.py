"""The lm_head on Triton: one tile product behind the log-prob with its entropy and gradient
(logprob.py, which has the references) and behind the draw of a token (sampling.py).

A tile is 128 tokens x 128 vocabulary entries in tensor cores. Its epilogue leaves a few numbers per
token and tile (14 KB per token at 151,936 entries), which a second kernel merges; carrying the
running softmax through a loop over tiles instead would spill registers. Logits never reach memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import TensorDescriptor, architecture, jit, tl, triton, use_triton

LOG2E = 1.4426950408889634
TILE = 128  # vocabulary entries per tile; 151,936 = 1187 x 128
# A program of the merge: 32 tokens, whose fp32 are one line of 128 bytes, and 64 tiles at a time,
# 16 values a thread.
MERGE_ROWS, MERGE_BLOCK = 32, 64


class Tile(NamedTuple):
    """How a tile kernel runs.

    rows, depth: of the tile of hidden states; TILE x depth is that of the weight.
    registers: cap per thread. At 128, two programs of 256 threads share a multiprocessor and hide
        each other's epilogue.
    """

    rows: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


# (kernel, architecture) -> tile; no autotuning. Registers, spills and shared memory of each are
# asserted in tests/test_kernels_aot.py.
TILES = {
    ("stats", 90): Tile(128, 64, 8, 3, 128),
    ("stats", 80): Tile(128, 64, 8, 3),
    ("gradient", 90): Tile(128, 64, 8, 3, 128),
    ("gradient", 80): Tile(128, 32, 8, 3),
}


class Stats(NamedTuple):
    """Of each token, [T] fp32, in nats."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor


# ---- launchers ----


def fits(hidden):
    """True where the kernels can run; anything else on CUDA runs in chunked torch.

    Tensor cores want 16-bit inputs and a width that is a multiple of the tile's depth.
    """
    is_16_bit = hidden.dtype in (torch.bfloat16, torch.float16)
    return use_triton(hidden) and is_16_bit and hidden.shape[1] % 64 == 0


def stats(hidden, weight, targets, temperature, arch=None):
    """Log-prob of each target, entropy and log-sum-exp of its distribution.

    hidden [T, D], weight [V, D], targets [T] int64; the logits are divided by temperature.
    """
    arch = arch or architecture(hidden)
    tile = TILES["stats", arch]
    tokens, width = hidden.shape
    vocabulary = len(weight)
    tiles = triton.cdiv(vocabulary, TILE)

    device = hidden.device
    tile_max, tile_sum, tile_moment = (floats(tiles, tokens, device=device) for _ in range(3))
    target_logit, logp, entropy, lse = (floats(tokens, device=device) for _ in range(4))

    grid = (triton.cdiv(tokens, tile.rows) * tiles,)
    _stats_kernel[grid](
        *operands(hidden.contiguous(), weight.contiguous(), tile, arch),
        targets,
        tile_max,
        tile_sum,
        tile_moment,
        target_logit,
        LOG2E / temperature,
        tokens,
        vocabulary,
        width,
        **tile_options(tile, arch),
    )

    grid = (triton.cdiv(tokens, MERGE_ROWS),)
    _merge_tiles_kernel[grid](
        tile_max,
        tile_sum,
        tile_moment,
        target_logit,
        logp,
        entropy,
        lse,
        tokens,
        tiles,
        ROWS=MERGE_ROWS,
        BLOCK=MERGE_BLOCK,
        num_warps=4,
    )
    return Stats(logp, entropy, lse)


def gradient(
    hidden,
    weight,
    targets,
    lse,
    entropy,
    grad_logp,
    grad_entropy,
    temperature,
    arch=None,
):
    """dL/dz [T, V] in the dtype of hidden, from recomputed logits z (formula: logprob.py).

    lse, entropy: of `stats`. grad_logp, grad_entropy [T]: the upstream gradients.
    """
    arch = arch or architecture(hidden)
    tile = TILES["gradient", arch]
    tokens, width = hidden.shape
    vocabulary = len(weight)

    # Rows start at multiples of 16 bytes, as tensor descriptors ask.
    padded = triton.cdiv(vocabulary, 8) * 8
    whole = torch.empty(tokens, padded, dtype=hidden.dtype, device=hidden.device)
    out = target = whole[:, :vocabulary]
    if arch >= 90:
        target = TensorDescriptor.from_tensor(out, [tile.rows, TILE])

    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(vocabulary, TILE),)
    _gradient_kernel[grid](
        *operands(hidden.contiguous(), weight.contiguous(), tile, arch),
        target,
        targets,
        lse,
        entropy,
        grad_logp.contiguous(),
        grad_entropy.contiguous(),
        1.0 / temperature,
        tokens,
        vocabulary,
        width,
        out.stride(0),
        **tile_options(tile, arch),
    )
    return out


# ---- for every launcher of a kernel with `tile_product` ----


def operands(hidden, weight, tile, arch):
    """hidden and weight as the kernels take them: tensor descriptors (TMA) or themselves."""
    if arch < 90:
        return hidden, weight
    hidden_tiles = TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth])
    weight_tiles = TensorDescriptor.from_tensor(weight, [TILE, tile.depth])
    return hidden_tiles, weight_tiles


def tile_options(tile, arch):
    """The constants of `tile_product` and the launch options."""
    options = {
        "ROWS": tile.rows,
        "TILE": TILE,
        "DEPTH": tile.depth,
        "TMA": arch >= 90,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if tile.registers:
        options["maxnreg"] = tile.registers
    return options


def floats(*shape, device):
    """Uninitialised fp32.

    One allocation each: rows of one tensor would not be aligned, and every alignment is a
    compilation of its own.
    """
    return torch.empty(*shape, dtype=torch.float32, device=device)


# ---- Triton kernels ----
# Logits are kept times log2(e), so that exp2, one instruction, does for exp.


@jit
def tile_product(
    h,  # [M, D]: a tensor descriptor (TMA, sm_90) or a pointer
    w,  # [V, D], likewise
    row,
    column,
    M,
    V,
    D,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """hidden[row : row + ROWS] @ weight[column : column + TILE].T in fp32."""
    product = tl.zeros((ROWS, TILE), dtype=tl.float32)
    if TMA:
        for d in range(0, D, DEPTH):
            a = h.load([row, d])
            b = w.load([column, d]).T
            product = tl.dot(a, b, product, input_precision="ieee")
    else:
        # Rows and columns past the end read others instead of a mask: nobody uses the result.
        depth = tl.arange(0, DEPTH)
        rows = (row + tl.arange(0, ROWS)) % M
        columns = (column + tl.arange(0, TILE)) % V
        h_at = h + rows[:, None] * D + depth[None, :]
        w_at = w + columns[None, :] * D + depth[:, None]
        for d in range(0, D, DEPTH):
            product = tl.dot(tl.load(h_at + d), tl.load(w_at + d), product, input_precision="ieee")
    return product


@jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["targets"])
def _stats_kernel(
    h,  # [M, D]
    w,  # [V, D]
    targets,  # [M]
    tile_max,  # [tiles, M]: m, the largest logit of the tile
    tile_sum,  # [tiles, M]: sum of p = 2^(x - m)
    tile_moment,  # [tiles, M]: sum of p (x - m)
    target_logit,  # [M]
    scale,
    M,
    V,
    D,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of logits to three numbers per row, and the target's logit if the tile has it."""
    # Row tiles run fastest: all of them use one tile of the weight while it is in L2, and the
    # hidden states stay there throughout.
    row_tiles = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    tile = tl.program_id(0) // row_tiles
    column = tile * TILE + tl.arange(0, TILE)
    x = tile_product(h, w, row, tile * TILE, M, V, D, ROWS, TILE, DEPTH, TMA) * scale
    x = tl.where(column[None, :] < V, x, -1e30)

    top = tl.max(x, 1)
    above = x - top[:, None]
    p = tl.exp2(above)

    rows = row + tl.arange(0, ROWS)
    inside = rows < M
    target = tl.load(targets + rows, mask=inside, other=-1)
    logit = top + tl.sum(tl.where(column[None, :] == target[:, None], above, 0.0), 1)

    at = tile.to(tl.int64) * M + rows
    tl.store(tile_max + at, top, mask=inside)
    tl.store(tile_sum + at, tl.sum(p, 1), mask=inside)
    tl.store(tile_moment + at, tl.sum(p * above, 1), mask=inside)
    tl.store(target_logit + rows, logit, mask=inside & (target // TILE == tile))


@jit(do_not_specialize=["M"])
def _merge_tiles_kernel(
    tile_max,  # [tiles, M], as _stats_kernel leaves them
    tile_sum,
    tile_moment,
    target_logit,  # [M]
    logp,  # [M]
    entropy,
    lse,
    M,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-prob, entropy and log-sum-exp of ROWS tokens, in nats."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    moment = tl.zeros((ROWS,), dtype=tl.float32)

    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)[:, None]
        at = tile.to(tl.int64) * M + rows[None, :]
        inside = (tile < tiles) & (rows < M)[None, :]

        m = tl.load(tile_max + at, mask=inside, other=-1e30)
        new_top = tl.maximum(top, tl.max(m, 0))
        shrink = tl.exp2(top - new_top)
        below = m - new_top[None, :]
        weight = tl.exp2(below)
        mass = tl.load(tile_sum + at, mask=inside, other=1.0)

        # Moments are about the maximum, which moves:
        # sum p (x - new) = sum p (x - old) + (old - new) sum p.
        # About 0 they would cancel in the entropy.
        tile_moments = tl.load(tile_moment + at, mask=inside, other=0.0) + mass * below
        moved = (moment + total * (top - new_top)) * shrink
        moment = moved + tl.sum(weight * tile_moments, 0)
        total = total * shrink + tl.sum(weight * mass, 0)
        top = new_top

    inside = rows < M
    spread = tl.log2(total)
    log_total = top + spread
    logit = tl.load(target_logit + rows, mask=inside, other=0.0)
    tl.store(logp + rows, (logit - log_total) * 0.6931471805599453, mask=inside)
    tl.store(entropy + rows, (spread - moment / total) * 0.6931471805599453, mask=inside)
    tl.store(lse + rows, log_total * 0.6931471805599453, mask=inside)


@jit
def _gradient_kernel(
    h,  # [M, D]
    w,  # [V, D]
    out,  # [M, V], a tensor descriptor or a pointer with row stride out_stride
    targets,  # [M], as the next four
    lse,
    entropy,
    grad_logp,
    grad_entropy,
    inverse_temperature,
    M,
    V,
    D,
    out_stride,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Recompute a tile of logits and write its dL/dz."""
    row_tiles = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    tile = tl.program_id(0) // row_tiles
    column = tile * TILE + tl.arange(0, TILE)
    scale = inverse_temperature * 1.4426950408889634
    x = tile_product(h, w, row, tile * TILE, M, V, D, ROWS, TILE, DEPTH, TMA) * scale

    rows = row + tl.arange(0, ROWS)
    inside = rows < M
    target = tl.load(targets + rows, mask=inside, other=-1)
    row_lse = tl.load(lse + rows, mask=inside, other=1e30)
    row_entropy = tl.load(entropy + rows, mask=inside, other=0.0)
    g = tl.load(grad_logp + rows, mask=inside, other=0.0)
    e = tl.load(grad_entropy + rows, mask=inside, other=0.0)

    # dL/dz = (g (delta - p) - e p (log p + entropy)) / temperature
    above = x - (row_lse * 1.4426950408889634)[:, None]
    p = tl.exp2(above)
    log_p_and_entropy = above * 0.6931471805599453 + row_entropy[:, None]
    coefficient = g[:, None] + e[:, None] * log_p_and_entropy
    gradient = -p * coefficient
    is_target = column[None, :] == target[:, None]
    gradient = tl.where(is_target, gradient + g[:, None], gradient) * inverse_temperature

    if TMA:
        out.store([row, tile * TILE], gradient.to(out.dtype))
    else:
        corner = out + row.to(tl.int64) * out_stride + tile * TILE
        offset = tl.arange(0, ROWS)[:, None] * out_stride + tl.arange(0, TILE)[None, :]
        tl.store(corner + offset, gradient, mask=inside[:, None] & (column < V)[None, :])
