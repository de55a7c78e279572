"""Exact categorical sampling from the lm_head with the token's log-prob and the entropy, by tile masses and inverse CDF.

The vocabulary is cut into tiles of 128. Uniform u0 picks a tile by its probability mass, u1 a token inside it: P(tile) P(token | tile) = p(token).
u0 and u1 are a hash of (seed, request, sample, position) and nothing else, so a draw does not depend on batch, slot, order or machine.

On CUDA the tile kernel's epilogue draws a candidate in every tile (u1 is the same for all: only one of them is used) and leaves five numbers per row
and tile; a second kernel picks the tile. One Gumbel number per logit, the usual way, would cost five times the arithmetic of the whole softmax.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels import architecture, head, jit, tl, triton, use_triton, wide
from kernels.head import TILE, Tile, tile_product

# torch references

_GOLDEN, _MIX1, _MIX2 = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # splitmix64's constants as signed 64-bit integers


def _mix_reference(x):
    """splitmix64's finaliser (Steele et al. 2014) on int64, whose arithmetic right shifts a mask makes logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniforms_reference(seeds, requests, samples, positions):
    """Two independent fp32 uniforms per row, [2, B], from four int64 [B]; multiples of 2^-24 strictly between 0 and 1."""
    state = torch.zeros_like(seeds)
    for key in (seeds, requests, samples, positions):
        state = _mix_reference(state + _GOLDEN + key)
    bits = torch.stack(((state >> 41) & 0x7FFFFF, (state >> 9) & 0x7FFFFF))
    return (bits.float() + 0.5) * 2.0**-23


def _first_above(masses, uniform):
    """First index whose cumulative mass exceeds uniform * total, never one of mass 0 (nor past the last other, where rounding could put it)."""
    cumulative = masses.cumsum(-1)
    hit = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (masses > 0)
    last = masses.shape[1] - 1 - (masses > 0).flip(1).to(torch.int8).argmax(1)
    return torch.where(hit.any(1), hit.to(torch.int8).argmax(1), last)


def _sample(logits, temperature, uniforms):
    """(token, log-prob, entropy) of rows of logits [B, V] by uniforms [2, B]; no host sync, so that a CUDA graph may hold it."""
    rows, greedy = torch.arange(len(logits), device=logits.device), temperature <= 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    top, best = logits.max(-1)
    below = logits.sub_(top[:, None])
    weights = below.exp()
    tiles = F.pad(weights, (0, -logits.shape[1] % TILE)).view(len(logits), -1, TILE)
    masses = tiles.sum(-1)
    total = masses.sum(-1)
    tile = _first_above(masses, uniforms[0])
    token = torch.where(greedy, best, tile * TILE + _first_above(tiles[rows, tile], uniforms[1]))
    logp = below.gather(1, token[:, None]).squeeze(1) - total.log()
    return token, logp, total.log() - torch.linalg.vecdot(weights, below) / total


def sample_tokens_reference(hidden, weight, temperature, seeds, requests, samples, positions):
    return _sample(
        wide(hidden) @ wide(weight).T,
        temperature,
        uniforms_reference(seeds, requests, samples, positions),
    )


# Triton kernels


@jit
def _mix(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@jit
def _uniforms_kernel(seeds, requests, samples, positions, out, B, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < B
    state = _mix(tl.load(seeds + row, mask=inside, other=0) - 0x61C8864680B583EB)
    state = _mix(state - 0x61C8864680B583EB + tl.load(requests + row, mask=inside, other=0))
    state = _mix(state - 0x61C8864680B583EB + tl.load(samples + row, mask=inside, other=0))
    state = _mix(state - 0x61C8864680B583EB + tl.load(positions + row, mask=inside, other=0))
    tl.store(
        out + row,
        (((state >> 41) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07,
        mask=inside,
    )
    tl.store(
        out + B + row,
        (((state >> 9) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07,
        mask=inside,
    )


@jit
def _pick(masses, cumulative, threshold, index, SIZE: tl.constexpr):
    """`_first_above` for rows [ROWS, SIZE] with the cumulative masses and the threshold [ROWS, 1] given."""
    first = tl.min(tl.where((cumulative > threshold) & (masses > 0), index, SIZE), 1)
    return tl.minimum(first, tl.max(tl.where(masses > 0, index, 0), 1))


@jit
def _draw_kernel(
    h,
    w,
    temperature,
    uniforms,
    tile_max,
    tile_sum,
    tile_moment,
    candidate,
    candidate_logit,
    M,
    V,
    D,
    tiles,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One tile of logits to the three numbers of head.py's softmax and a candidate token with its logit, per row, [M, tiles]."""
    row_tiles = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    tile = tl.program_id(0) // row_tiles
    product = tile_product(h, w, row, tile * TILE, M, V, D, ROWS, TILE, DEPTH, TMA)
    rows = row + tl.arange(0, ROWS)
    inside = rows < M
    t = tl.load(temperature + rows, mask=inside, other=1.0)
    x = product * (1.4426950408889634 / tl.where(t > 0, t, 1.0))[:, None]
    x = tl.where(tile * TILE + tl.arange(0, TILE)[None, :] < V, x, -1e30)
    top = tl.max(x, 1)
    above = x - top[:, None]
    p = tl.exp2(above)
    at = rows.to(tl.int64) * tiles + tile
    tl.store(tile_max + at, top, mask=inside)
    tl.store(tile_sum + at, tl.sum(p, 1), mask=inside)
    tl.store(tile_moment + at, tl.sum(p * above, 1), mask=inside)
    # Greedy: nothing but the maxima keep their mass, and a threshold of 0 picks the first of them.
    p = tl.where((t <= 0)[:, None] & (p < 1.0), 0.0, p)
    u = tl.where(t > 0, tl.load(uniforms + M + rows, mask=inside, other=0.5), 0.0)
    # Inverse CDF in two levels, 8 groups of 16 tokens: a scan over all 128 would need twice the registers (251 against 127).
    groups = tl.reshape(p, (ROWS, GROUPS, TILE // GROUPS))
    mass = tl.sum(groups, 2)
    cumulative = tl.cumsum(mass, 1)
    threshold = (u * tl.max(cumulative, 1))[:, None]
    group = _pick(mass, cumulative, threshold, tl.arange(0, GROUPS)[None, :], GROUPS)[:, None]
    before = tl.max(tl.where(tl.arange(0, GROUPS)[None, :] < group, cumulative, 0.0), 1)
    tokens = tl.sum(
        tl.where(tl.arange(0, GROUPS)[None, :, None] == group[:, :, None], groups, 0.0), 1
    )
    index = tl.arange(0, TILE // GROUPS)[None, :]
    token = _pick(tokens, tl.cumsum(tokens, 1) + before[:, None], threshold, index, TILE // GROUPS)
    chosen = tl.sum(tl.where(index == token[:, None], tokens, 0.0), 1)
    tl.store(candidate + at, tl.sum(group, 1) * (TILE // GROUPS) + token, mask=inside)
    tl.store(candidate_logit + at, top + tl.log2(chosen), mask=inside)


@jit
def _choose_kernel(
    temperature,
    uniforms,
    tile_max,
    tile_sum,
    tile_moment,
    candidate,
    candidate_logit,
    token,
    logp,
    entropy,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: pick its tile by mass, take that tile's candidate; log-prob and entropy in nats."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    index = tl.arange(0, BLOCK)[None, :]
    at = row[:, None] * tiles + index
    inside = index < tiles
    m = tl.load(tile_max + at, mask=inside, other=-1e30)
    top = tl.max(m, 1)
    below = m - top[:, None]
    weight = tl.exp2(below)
    mass = weight * tl.load(tile_sum + at, mask=inside, other=0.0)
    total = tl.sum(mass, 1)
    moment = tl.sum(weight * tl.load(tile_moment + at, mask=inside, other=0.0) + mass * below, 1)
    greedy = tl.load(temperature + row) <= 0
    mass = tl.where(greedy[:, None] & (m < top[:, None]), 0.0, mass)
    cumulative = tl.cumsum(mass, 1)
    u = tl.where(greedy, 0.0, tl.load(uniforms + row))
    tile = _pick(mass, cumulative, (u * tl.max(cumulative, 1))[:, None], index, BLOCK)
    log_total = top + tl.log2(total)
    tl.store(token + row, tile.to(tl.int64) * TILE + tl.load(candidate + row * tiles + tile))
    tl.store(
        logp + row, (tl.load(candidate_logit + row * tiles + tile) - log_total) * 0.6931471805599453
    )
    tl.store(entropy + row, (tl.log2(total) - moment / total) * 0.6931471805599453)


# Launchers. Up to 64 rows the bytes of the weight are the floor: a smaller tile with three programs per multiprocessor keeps more of them in flight.

TILES = {
    ("few", 90): Tile(64, 64, 4, 3),
    ("many", 90): Tile(128, 64, 8, 3, 128),
    ("few", 80): Tile(64, 64, 4, 3),
    ("many", 80): Tile(128, 64, 8, 3),
}
GROUPS = 8


def _uniforms(seeds, requests, samples, positions):
    out = torch.empty(2, len(seeds), dtype=torch.float32, device=seeds.device)
    _uniforms_kernel[(triton.cdiv(len(seeds), 128),)](
        seeds, requests, samples, positions, out, len(seeds), BLOCK=128, num_warps=4
    )
    return out


def _sample_tokens(
    hidden, weight, temperature, seeds, requests, samples, positions, arch=None, one_tile=False
):
    arch = arch or architecture(hidden)
    (rows, width), vocabulary, device = hidden.shape, len(weight), hidden.device
    tile, tiles = (
        TILES["few" if rows <= 64 and not one_tile else "many", arch],
        triton.cdiv(vocabulary, TILE),
    )
    uniforms = _uniforms(seeds, requests, samples, positions)
    top, mass, moment, logit = (head.floats(rows, tiles, device=device) for _ in range(4))
    results = (top, mass, moment, torch.empty(rows, tiles, dtype=torch.int32, device=device), logit)
    token, logp, entropy = (
        torch.empty(rows, dtype=torch.int64, device=device),
        head.floats(rows, device=device),
        head.floats(rows, device=device),
    )
    h, w = head.operands(hidden.contiguous(), weight, tile, arch >= 90)
    shape = {
        "ROWS": tile.rows,
        "TILE": TILE,
        "DEPTH": tile.depth,
        "TMA": arch >= 90,
        "GROUPS": GROUPS,
    }
    grid = (triton.cdiv(rows, tile.rows) * tiles,)
    _draw_kernel[grid](
        h,
        w,
        temperature,
        uniforms,
        *results,
        rows,
        vocabulary,
        width,
        tiles,
        **shape,
        **head.launch_options(tile),
    )
    block = triton.next_power_of_2(tiles)
    _choose_kernel[(rows,)](
        temperature,
        uniforms,
        *results,
        token,
        logp,
        entropy,
        tiles,
        TILE=TILE,
        BLOCK=block,
        num_warps=4,
    )
    return token, logp, entropy


# Public functions


def sample_tokens(hidden, weight, temperature, seeds, requests, samples, positions, one_tile=False):
    """Draw one token per row from softmax(hidden @ weight.T / temperature): (tokens [B] int64, logprobs [B] fp32, entropy [B] fp32).

    hidden [B, D], weight [V, D], temperature [B] fp32 (0 = greedy: the first maximum, log-prob and entropy of the untempered distribution), and the
    draw's key: seeds, requests, samples, positions [B] int64. No logits reach memory on CUDA (bf16 or fp16, D a multiple of 64). one_tile: the same
    tile for every number of rows, so that a row's last bits do not depend on it.
    """
    if head.fits(hidden):
        return _sample_tokens(
            hidden, weight, temperature, seeds, requests, samples, positions, one_tile=one_tile
        )
    return sample_tokens_reference(hidden, weight, temperature, seeds, requests, samples, positions)


def _truncate(logits, top_p, top_k):
    """-1e30 outside the top_k largest (0 = all) and then outside the smallest set of mass >= top_p of what is left (finite: 0 * inf is NaN)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill((top_k[:, None] > 0) & (rank >= top_k[:, None]), -1e30)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (rank > 0), -1e30)
    return torch.empty_like(logits).scatter_(1, order, ordered)


def sample_logits(logits, temperature, seeds, requests, samples, positions, top_p, top_k):
    """`sample_tokens` from given logits [B, V] with nucleus (top_p [B], 1 = all) and top-k (top_k [B] int64, 0 = all) truncation, for evaluation.

    The log-prob and entropy are those of the truncated, renormalised, tempered distribution (greedy rows: of the untempered, untruncated one).
    """
    greedy = temperature <= 0
    tempered = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    kept = torch.where(greedy[:, None], tempered, _truncate(tempered, top_p, top_k))
    uniforms = (_uniforms if use_triton(logits) else uniforms_reference)(
        seeds, requests, samples, positions
    )
    return _sample(kept, torch.where(greedy, 0.0, 1.0), uniforms)
