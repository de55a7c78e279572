"""The lm_head on Triton: one tile product behind log-prob, entropy, their gradient and (in sampling.py) the draw of a token.

A tile is 128 tokens x 128 vocabulary entries in tensor cores; its epilogue leaves a few numbers per token and tile (14 KB per token at 151,936
entries), which a second kernel merges. Carrying the running softmax through a loop over tiles instead would spill registers. Logits never reach memory,
except in the two row kernels at the end, which serve the fused loss: there a chunk's logits are made once, by cuBLAS, and used twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import TensorDescriptor, architecture, jit, tl, triton, use_triton

LOG2E = 1.4426950408889634
TILE = 128  # vocabulary entries per tile; 151,936 = 1187 x 128


class Tile(NamedTuple):
    """How a tile kernel runs. `registers` caps them: at 128, two programs of 256 threads share a multiprocessor and hide each other's epilogue."""

    rows: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


# (kernel, architecture) -> tile; no autotuning. Registers, spills and shared memory of each are asserted in tests/test_kernels_aot.py.
TILES = {
    ("stats", 90): Tile(128, 64, 8, 3, 128),
    ("stats", 80): Tile(128, 64, 8, 3),
    ("gradient", 90): Tile(128, 64, 8, 3, 128),
    ("gradient", 80): Tile(128, 32, 8, 3),
}

# Triton kernels. Logits are kept times log2(e), so that exp2, one instruction, does for exp.


@jit
def tile_product(
    h,
    w,
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
    """hidden[row : row + ROWS] @ weight[column : column + TILE].T in fp32. h and w are tensor descriptors (TMA, sm_90) or pointers."""
    product = tl.zeros((ROWS, TILE), dtype=tl.float32)
    if TMA:
        for d in range(0, D, DEPTH):
            product = tl.dot(
                h.load([row, d]), w.load([column, d]).T, product, input_precision="ieee"
            )
    else:
        depth = tl.arange(0, DEPTH)
        h_at = h + ((row + tl.arange(0, ROWS)) % M)[:, None] * D + depth[None, :]
        w_at = w + ((column + tl.arange(0, TILE)) % V)[None, :] * D + depth[:, None]
        for d in range(0, D, DEPTH):
            product = tl.dot(tl.load(h_at + d), tl.load(w_at + d), product, input_precision="ieee")
    return product


@jit
def _stats_kernel(
    h,
    w,
    targets,
    tile_max,
    tile_sum,
    tile_moment,
    target_logit,
    scale,
    M,
    V,
    D,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """One tile of logits to (max m, sum of p = 2^(x - m), sum of p (x - m)) per row, [tiles, M], and the target's logit [M]."""
    # Row tiles run fastest: all of them use one tile of the weight while it is in L2, and the hidden states stay there throughout.
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


@jit
def _merge_tiles_kernel(
    tile_max,
    tile_sum,
    tile_moment,
    target_logit,
    logp,
    entropy,
    lse,
    M,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tile results [tiles, M] to log-prob, entropy and log-sum-exp [M], in nats."""
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
        # Moments are about the maximum, which moves: sum p (x - new) = sum p (x - old) + (old - new) sum p. About 0 they would cancel in the entropy.
        moment = (moment + total * (top - new_top)) * shrink + tl.sum(
            weight * (tl.load(tile_moment + at, mask=inside, other=0.0) + mass * below), 0
        )
        total = total * shrink + tl.sum(weight * mass, 0)
        top = new_top
    inside = rows < M
    spread = tl.log2(total)
    log_total = top + spread
    tl.store(
        logp + rows,
        (tl.load(target_logit + rows, mask=inside, other=0.0) - log_total) * 0.6931471805599453,
        mask=inside,
    )
    tl.store(entropy + rows, (spread - moment / total) * 0.6931471805599453, mask=inside)
    tl.store(lse + rows, log_total * 0.6931471805599453, mask=inside)


@jit
def _gradient_of(x, column, target, lse, entropy, grad_logp, grad_entropy, inverse_temperature):
    """dL/dz of a tile from its tempered logits x = z / temperature * log2(e); the rest are one number per row."""
    above = x - (lse * 1.4426950408889634)[:, None]
    p = tl.exp2(above)
    coefficient = grad_logp[:, None] + grad_entropy[:, None] * (
        above * 0.6931471805599453 + entropy[:, None]
    )
    gradient = -p * coefficient
    return (
        tl.where(column[None, :] == target[:, None], gradient + grad_logp[:, None], gradient)
        * inverse_temperature
    )


@jit
def _gradient_kernel(
    h,
    w,
    out,
    targets,
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
    """Recompute a tile of logits and write its dL/dz [M, V]."""
    row_tiles = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    tile = tl.program_id(0) // row_tiles
    column = tile * TILE + tl.arange(0, TILE)
    x = tile_product(h, w, row, tile * TILE, M, V, D, ROWS, TILE, DEPTH, TMA) * (
        inverse_temperature * 1.4426950408889634
    )
    rows = row + tl.arange(0, ROWS)
    inside = rows < M
    target = tl.load(targets + rows, mask=inside, other=-1)
    row_lse = tl.load(lse + rows, mask=inside, other=1e30)
    row_entropy = tl.load(entropy + rows, mask=inside, other=0.0)
    g = tl.load(grad_logp + rows, mask=inside, other=0.0)
    e = tl.load(grad_entropy + rows, mask=inside, other=0.0)
    gradient = _gradient_of(x, column, target, row_lse, row_entropy, g, e, inverse_temperature)
    if TMA:
        out.store([row, tile * TILE], gradient.to(out.dtype))
    else:
        corner = out + row.to(tl.int64) * out_stride + tile * TILE
        offset = tl.arange(0, ROWS)[:, None] * out_stride + tl.arange(0, TILE)[None, :]
        tl.store(corner + offset, gradient, mask=inside[:, None] & (column < V)[None, :])


@jit
def _logit_stats_kernel(logits, targets, logp, entropy, lse, scale, V, BLOCK: tl.constexpr):
    """One row of fp32 logits to log-prob, entropy and log-sum-exp; every lane keeps its own running maximum, so no barrier inside the loop."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    moment = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + column, mask=column < V, other=-1e30) * scale
        new_top = tl.maximum(top, x)
        shrink, p = tl.exp2(top - new_top), tl.where(column < V, tl.exp2(x - new_top), 0.0)
        moment = (moment + total * (top - new_top)) * shrink + p * (x - new_top)
        total = total * shrink + p
        top = new_top
    row_top = tl.max(top, 0)
    weight = tl.exp2(top - row_top)
    row_total = tl.sum(total * weight, 0)
    row_moment = tl.sum((moment + total * (top - row_top)) * weight, 0)
    log_total = row_top + tl.log2(row_total)
    target = tl.load(logits + row * V + tl.load(targets + row)) * scale
    tl.store(logp + row, (target - log_total) * 0.6931471805599453)
    tl.store(entropy + row, (tl.log2(row_total) - row_moment / row_total) * 0.6931471805599453)
    tl.store(lse + row, log_total * 0.6931471805599453)


@jit
def _logit_gradient_kernel(
    logits,
    out,
    targets,
    lse,
    entropy,
    grad_logp,
    grad_entropy,
    inverse_temperature,
    V,
    out_stride,
    BLOCK: tl.constexpr,
):
    """dL/dz of a block of one row of fp32 logits."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * V + column[None, :]
    x = tl.load(logits + at, mask=(column < V)[None, :], other=0.0) * (
        inverse_temperature * 1.4426950408889634
    )
    target, row_lse, row_entropy = (
        tl.load(targets + row),
        tl.load(lse + row),
        tl.load(entropy + row),
    )
    gradient = _gradient_of(
        x,
        column,
        target,
        row_lse,
        row_entropy,
        tl.load(grad_logp + row),
        tl.load(grad_entropy + row),
        inverse_temperature,
    )
    tl.store(
        out + row[:, None] * out_stride + column[None, :], gradient, mask=(column < V)[None, :]
    )


# Launchers


def fits(hidden):
    """Tensor cores want 16-bit inputs and a width that is a multiple of the tile's depth; anything else on CUDA runs in chunked torch."""
    return (
        use_triton(hidden)
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and hidden.shape[1] % 64 == 0
    )


def operands(hidden, weight, tile, tma):
    """hidden and weight as the kernels take them: tensor descriptors or themselves."""
    if not tma:
        return hidden, weight
    return TensorDescriptor.from_tensor(
        hidden, [tile.rows, tile.depth]
    ), TensorDescriptor.from_tensor(weight, [TILE, tile.depth])


def floats(*shape, device):
    """Uninitialised fp32. One allocation each: rows of one tensor would not be aligned, and every alignment is a compilation of its own."""
    return torch.empty(*shape, dtype=torch.float32, device=device)


def launch_options(tile):
    return {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }


def stats(hidden, weight, targets, temperature, arch=None):
    """(log-prob, entropy, log-sum-exp), each [T] fp32."""
    arch = arch or architecture(hidden)
    tile, (tokens, width), vocabulary = TILES["stats", arch], hidden.shape, len(weight)
    tiles = triton.cdiv(vocabulary, TILE)
    partial = [floats(tiles, tokens, device=hidden.device) for _ in range(3)]
    logit, logp, entropy, lse = (floats(tokens, device=hidden.device) for _ in range(4))
    h, w = operands(hidden.contiguous(), weight.contiguous(), tile, arch >= 90)
    shape = {"ROWS": tile.rows, "TILE": TILE, "DEPTH": tile.depth, "TMA": arch >= 90}
    grid = (triton.cdiv(tokens, tile.rows) * tiles,)
    _stats_kernel[grid](
        h,
        w,
        targets,
        *partial,
        logit,
        LOG2E / temperature,
        tokens,
        vocabulary,
        width,
        **shape,
        **launch_options(tile),
    )
    _merge_tiles_kernel[(triton.cdiv(tokens, 32),)](
        *partial, logit, logp, entropy, lse, tokens, tiles, ROWS=32, BLOCK=64, num_warps=4
    )
    return logp, entropy, lse


def _gradient_buffer(tokens, vocabulary, dtype, device):
    """[tokens, vocabulary] with rows 16-byte aligned, as tensor descriptors ask."""
    return torch.empty(tokens, triton.cdiv(vocabulary, 8) * 8, dtype=dtype, device=device)[
        :, :vocabulary
    ]


def gradient(
    hidden, weight, targets, lse, entropy, grad_logp, grad_entropy, temperature, arch=None
):
    """dL/dz [T, V] in the dtype of hidden, from recomputed logits."""
    arch = arch or architecture(hidden)
    tile, (tokens, width), vocabulary = TILES["gradient", arch], hidden.shape, len(weight)
    out = _gradient_buffer(tokens, vocabulary, hidden.dtype, hidden.device)
    h, w = operands(hidden.contiguous(), weight.contiguous(), tile, arch >= 90)
    target = TensorDescriptor.from_tensor(out, [tile.rows, TILE]) if arch >= 90 else out
    shape = {"ROWS": tile.rows, "TILE": TILE, "DEPTH": tile.depth, "TMA": arch >= 90}
    numbers = (
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
    )
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(vocabulary, TILE),)
    _gradient_kernel[grid](h, w, target, *numbers, **shape, **launch_options(tile))
    return out


def logit_stats(logits, targets, temperature):
    """As `stats`, from raw fp32 logits [T, V]."""
    logp, entropy, lse = (floats(len(logits), device=logits.device) for _ in range(3))
    _logit_stats_kernel[(len(logits),)](
        logits,
        targets,
        logp,
        entropy,
        lse,
        LOG2E / temperature,
        logits.shape[1],
        BLOCK=2048,
        num_warps=8,
    )
    return logp, entropy, lse


def logit_gradient(logits, targets, lse, entropy, grad_logp, grad_entropy, temperature, dtype):
    """dL/dz [T, V] in `dtype` from raw (not tempered) fp32 logits [T, V]."""
    tokens, vocabulary = logits.shape
    out = _gradient_buffer(tokens, vocabulary, dtype, logits.device)
    numbers = (
        targets,
        lse,
        entropy,
        grad_logp.contiguous(),
        grad_entropy.contiguous(),
        1.0 / temperature,
        vocabulary,
        out.stride(0),
    )
    _logit_gradient_kernel[(tokens, triton.cdiv(vocabulary, 2048))](
        logits, out, *numbers, BLOCK=2048, num_warps=8
    )
    return out
