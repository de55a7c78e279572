"""Exact categorical sampling from the lm_head with the token's log-prob, by tile masses and inverse
CDF.

The vocabulary is cut into tiles of 128. Uniform u0 picks a tile by its probability mass, u1 a token
inside it: P(tile) P(token | tile) = p(token). u0 and u1 are a hash of (seed, request, sample,
position) and nothing else, so a draw does not depend on batch, slot, order or machine.

On CUDA the tile kernel's epilogue draws a candidate in every tile (u1 is the same for all: only one
of them is used) and leaves four numbers per row and tile; a second kernel picks the tile. One
Gumbel number per logit, the usual way, would cost five times the arithmetic of the whole softmax.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from kernels import architecture, head, jit, tl, triton, wide
from kernels.head import TILE, Tile, tile_product

# Up to 64 rows the bytes of the weight are the floor: a smaller tile with two programs of four
# stages per multiprocessor keeps more of them in flight (1.54 of the floor at 0.5B, three programs
# of three stages 1.78; at 1.5B 1.30 and 1.27).
FEW_ROWS = 64
TILES = {
    ("few", 90): Tile(64, 64, 4, 4),
    ("many", 90): Tile(128, 64, 8, 3, 128),
    ("few", 80): Tile(64, 64, 4, 4),
    ("many", 80): Tile(128, 64, 8, 3),
}
# The draw inside a tile has two levels, 8 groups of 16 tokens: a scan over all 128 would need twice
# the registers (251 against 127).
GROUPS = 8

# splitmix64's constants as signed 64-bit integers
GOLDEN = -0x61C8864680B583EB
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15


# ---- public functions ----


def sample_tokens(hidden, weight, temperature, uniforms, one_tile=False):
    """Draw one token per row from softmax(hidden @ weight.T / temperature).

    hidden [B, D], weight [V, D]
    temperature [B] fp32: 0 is greedy, the first maximum with its untempered log-prob
    uniforms [2, B] fp32: of uniforms_reference
    one_tile: the same tile for every number of rows, so that a row's last bits do not depend on it
    Returns (tokens [B] int64, logprobs [B] fp32). Two equal logits: log-prob -0.693.

    On CUDA no logits reach memory (bf16 or fp16, D a multiple of 64).
    """
    if not head.fits(hidden):
        return sample_tokens_reference(hidden, weight, temperature, uniforms)
    return draw(hidden, weight, temperature, uniforms, one_tile=one_tile)


def sample_logits(logits, temperature, uniforms, top_p, top_k):
    """`sample_tokens` from given logits [B, V] with truncation, for evaluation.

    top_p [B] fp32: nucleus, 1 is all. top_k [B] int64: 0 is all.
    The log-prob is that of the truncated, renormalised, tempered distribution; a greedy row's of
    the untempered, untruncated one.
    """
    greedy = temperature <= 0
    divisor = torch.where(greedy, 1.0, temperature)
    tempered = logits.float() / divisor[:, None]
    kept = torch.where(greedy[:, None], tempered, _truncate(tempered, top_p, top_k))
    return sample_reference(kept, torch.where(greedy, 0.0, 1.0), uniforms)


def _truncate(logits, top_p, top_k):
    """-1e30 outside the top_k largest and then outside the smallest set of mass >= top_p of those.

    Finite, because 0 * inf is NaN.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    below_top_k = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    ordered = ordered.masked_fill(below_top_k, -1e30)

    # A token stays if the larger ones before it do not make up top_p; the largest always stays.
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside_nucleus = (before >= top_p[:, None]) & (rank > 0)
    ordered = ordered.masked_fill(outside_nucleus, -1e30)
    return torch.empty_like(logits).scatter_(1, order, ordered)


# ---- torch references ----


def sample_tokens_reference(hidden, weight, temperature, uniforms):
    """`sample_tokens` by way of the logits [B, V]."""
    logits = wide(hidden) @ wide(weight).T
    return sample_reference(logits, temperature, uniforms)


def sample_reference(logits, temperature, uniforms):
    """(token, log-prob) of rows of logits [B, V] by uniforms [2, B].

    No host sync, so that a CUDA graph may hold it.
    """
    greedy = temperature <= 0
    divisor = torch.where(greedy, 1.0, temperature)
    logits = logits / divisor[:, None]
    top, best = logits.max(-1)
    below = logits.sub_(top[:, None])

    padding = -logits.shape[1] % TILE
    tiles = F.pad(below.exp(), (0, padding)).view(len(logits), -1, TILE)
    masses = tiles.sum(-1)
    tile = _first_above(masses, uniforms[0])
    rows = torch.arange(len(logits), device=logits.device)
    inside = _first_above(tiles[rows, tile], uniforms[1])
    token = torch.where(greedy, best, tile * TILE + inside)

    logit = below.gather(1, token[:, None]).squeeze(1)
    return token, logit - masses.sum(-1).log()


def _first_above(masses, uniform):
    """First index of [B, n] whose cumulative mass exceeds uniform * total.

    Never one of mass 0, nor past the last other, where rounding could put it.
    """
    cumulative = masses.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    has_mass = masses > 0
    hit = (cumulative > threshold) & has_mass
    first = hit.to(torch.int8).argmax(1)

    from_the_end = has_mass.flip(1).to(torch.int8).argmax(1)
    last = masses.shape[1] - 1 - from_the_end
    return torch.where(hit.any(1), first, last)


def uniforms_reference(seeds, requests, samples, positions):
    """Two independent fp32 uniforms per row, [2, B], from four int64 [B].

    They are multiples of 2^-24 strictly between 0 and 1.
    """
    state = torch.zeros_like(seeds)
    for key in (seeds, requests, samples, positions):
        state = _mix_reference(state + GOLDEN + key)
    high = (state >> 41) & 0x7FFFFF
    low = (state >> 9) & 0x7FFFFF
    bits = torch.stack((high, low))
    return (bits.float() + 0.5) * 2.0**-23


def _mix_reference(x):
    """splitmix64's finaliser (Steele et al. 2014) on int64.

    The right shifts of int64 are arithmetic; a mask makes them logical.
    """
    x = x ^ ((x >> 30) & 0x3FFFFFFFF)
    x = x * MIX_1
    x = x ^ ((x >> 27) & 0x1FFFFFFFFF)
    x = x * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


# ---- launcher ----


def draw(hidden, weight, temperature, uniforms, arch=None, one_tile=False, moved=None):
    """The two kernels of `sample_tokens` -> (tokens [B] int64, logprobs [B] fp32).

    moved: (rows.Rows, active, column) of the slots that the second also moves on, as rows.advance
        does; None: it only draws.
    """
    arch = arch or architecture(hidden)
    rows, width = hidden.shape
    vocabulary = len(weight)
    device = hidden.device
    is_few = rows <= FEW_ROWS and not one_tile
    tile = TILES["few" if is_few else "many", arch]
    tiles = triton.cdiv(vocabulary, TILE)

    tile_max = head.floats(rows, tiles, device=device)
    tile_sum = head.floats(rows, tiles, device=device)
    candidate_logit = head.floats(rows, tiles, device=device)
    candidate = torch.empty(rows, tiles, dtype=torch.int32, device=device)
    grid = (triton.cdiv(rows, tile.rows) * tiles,)
    _draw_kernel[grid](
        *head.operands(hidden.contiguous(), weight, tile, arch),
        temperature,
        uniforms,
        tile_max,
        tile_sum,
        candidate,
        candidate_logit,
        rows,
        vocabulary,
        width,
        tiles,
        **head.tile_options(tile, arch),
        GROUPS=GROUPS,
    )

    token = torch.empty(rows, dtype=torch.int64, device=device)
    logp = head.floats(rows, device=device)
    if moved:
        state, active, column = moved
        slots = (active, column, state.values, state.out, state.values.shape[1], state.longest + 1)
        stops = state.stops
    else:  # the kernel takes them all the same, and does not read them
        slots = (token, token, token, token, 0, 0)
        stops = 0
    grid = (rows,)
    _choose_kernel[grid](
        temperature,
        uniforms,
        tile_max,
        tile_sum,
        candidate,
        candidate_logit,
        token,
        logp,
        *slots,
        tiles,
        stops,
        TILE=TILE,
        BLOCK=triton.next_power_of_2(tiles),
        STOPS=triton.next_power_of_2(max(1, stops)),
        ADVANCE=moved is not None,
        num_warps=8,
    )
    return token, logp


# ---- Triton kernels ----
# The constants are the references': a kernel sees no plain globals.


@jit
def uniforms_of(seed, request, sample, position):
    """`uniforms_reference` of one key."""
    state = _mix(seed - 0x61C8864680B583EB)
    state = _mix(state - 0x61C8864680B583EB + request)
    state = _mix(state - 0x61C8864680B583EB + sample)
    state = _mix(state - 0x61C8864680B583EB + position)

    # 23 bits each, times 2^-23.
    high = (state >> 41) & 0x7FFFFF
    low = (state >> 9) & 0x7FFFFF
    u0 = (high.to(tl.float32) + 0.5) * 1.1920928955078125e-07
    u1 = (low.to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return u0, u1


@jit
def _mix(x):
    x = x ^ ((x >> 30) & 0x3FFFFFFFF)
    x = x * -0x40A7B892E31B1A47
    x = x ^ ((x >> 27) & 0x1FFFFFFFFF)
    x = x * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@jit(do_not_specialize=["M"])
def _draw_kernel(
    h,  # [M, D]
    w,  # [V, D]
    temperature,  # [M]
    uniforms,  # [2, M]
    tile_max,  # [M, tiles]: m, the largest logit, times log2(e)
    tile_sum,  # [M, tiles]: sum of p = 2^(x - m)
    candidate,  # [M, tiles]: index inside the tile of the token drawn there
    candidate_logit,  # [M, tiles]
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
    """One tile of logits to its softmax numbers and a candidate token, for ROWS rows."""
    row_tiles = tl.cdiv(M, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    tile = tl.program_id(0) // row_tiles
    product = tile_product(h, w, row, tile * TILE, M, V, D, ROWS, TILE, DEPTH, TMA)

    # Tempered logits times log2(e); -1e30 past the end of the vocabulary.
    rows = row + tl.arange(0, ROWS)
    inside = rows < M
    t = tl.load(temperature + rows, mask=inside, other=1.0)
    scale = 1.4426950408889634 / tl.where(t > 0, t, 1.0)
    x = product * scale[:, None]
    column = tile * TILE + tl.arange(0, TILE)
    x = tl.where(column[None, :] < V, x, -1e30)

    top = tl.max(x, 1)
    p = tl.exp2(x - top[:, None])
    at = rows.to(tl.int64) * tiles + tile
    tl.store(tile_max + at, top, mask=inside)
    tl.store(tile_sum + at, tl.sum(p, 1), mask=inside)

    # Greedy: nothing but the maxima keep their mass, and a threshold of 0 picks the first of them.
    greedy = t <= 0
    p = tl.where(greedy[:, None] & (p < 1.0), 0.0, p)
    u1 = tl.load(uniforms + M + rows, mask=inside, other=0.5)
    u1 = tl.where(t > 0, u1, 0.0)

    # The group whose cumulative mass first exceeds the threshold, and the mass before it.
    SIZE: tl.constexpr = TILE // GROUPS
    groups = tl.reshape(p, (ROWS, GROUPS, SIZE))
    mass = tl.sum(groups, 2)
    cumulative = tl.cumsum(mass, 1)
    threshold = (u1 * tl.max(cumulative, 1))[:, None]
    number = tl.arange(0, GROUPS)[None, :]
    group = _pick(mass, cumulative, threshold, number, GROUPS)[:, None]
    before = tl.max(tl.where(number < group, cumulative, 0.0), 1)

    # The token inside it.
    is_chosen = tl.arange(0, GROUPS)[None, :, None] == group[:, :, None]
    tokens = tl.sum(tl.where(is_chosen, groups, 0.0), 1)
    index = tl.arange(0, SIZE)[None, :]
    cumulative = tl.cumsum(tokens, 1) + before[:, None]
    token = _pick(tokens, cumulative, threshold, index, SIZE)

    chosen = tl.sum(tl.where(index == token[:, None], tokens, 0.0), 1)
    drawn = tl.sum(group, 1) * SIZE + token
    tl.store(candidate + at, drawn, mask=inside)
    tl.store(candidate_logit + at, top + tl.log2(chosen), mask=inside)


@jit
def _pick(masses, cumulative, threshold, index, SIZE: tl.constexpr):
    """`_first_above` for rows [ROWS, SIZE], given cumulative masses and threshold [ROWS, 1]."""
    has_mass = masses > 0
    hit = (cumulative > threshold) & has_mass
    first = tl.min(tl.where(hit, index, SIZE), 1)
    last = tl.max(tl.where(has_mass, index, 0), 1)
    return tl.minimum(first, last)


@jit(do_not_specialize=["columns", "longest", "stops"])
def _choose_kernel(
    temperature,  # [M]
    uniforms,  # [2, M]
    tile_max,  # [M, tiles], as _draw_kernel leaves them
    tile_sum,
    candidate,
    candidate_logit,
    token,  # [M]
    logp,  # [M], in nats
    active,  # [M] slots, this and what follows read only if ADVANCE
    column,  # [M]
    values,  # [slots + 1, columns], the state of the sampler's rows
    out,  # [slots + 1, 2, longest]
    columns,
    longest,
    tiles,
    stops,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STOPS: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """One row: pick its tile by mass, take that tile's candidate, and move its slot on."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    index = tl.arange(0, BLOCK)[None, :]
    at = row[:, None] * tiles + index
    inside = index < tiles

    m = tl.load(tile_max + at, mask=inside, other=-1e30)
    top = tl.max(m, 1)
    weight = tl.exp2(m - top[:, None])
    sums = tl.load(tile_sum + at, mask=inside, other=0.0)
    mass = weight * sums
    total = tl.sum(mass, 1)

    greedy = tl.load(temperature + row) <= 0
    mass = tl.where(greedy[:, None] & (m < top[:, None]), 0.0, mass)
    cumulative = tl.cumsum(mass, 1)
    u0 = tl.load(uniforms + row)
    u0 = tl.where(greedy, 0.0, u0)
    threshold = (u0 * tl.max(cumulative, 1))[:, None]
    tile = _pick(mass, cumulative, threshold, index, BLOCK)

    log_total = top + tl.log2(total)
    chosen = row * tiles + tile
    drawn = tile.to(tl.int64) * TILE + tl.load(candidate + chosen)
    log_probability = (tl.load(candidate_logit + chosen) - log_total) * 0.6931471805599453
    tl.store(token + row, drawn)
    tl.store(logp + row, log_probability)

    if ADVANCE:
        # The numbers are the columns of kernels/rows.py.
        slot = tl.load(active + row)
        out_at = out + slot * 2 * longest + tl.load(column + row)
        tl.store(out_at, drawn.to(tl.int32))
        tl.store(out_at + longest, log_probability.to(tl.int32, bitcast=True))

        at = values + slot * columns
        index = tl.arange(0, STOPS)[None, :]
        stop_ids = tl.load(at[:, None] + 12 + index, mask=index < stops, other=-1)
        stopped = tl.max((stop_ids == drawn[:, None]).to(tl.int32), 1) == 1
        position = tl.load(at + 1)
        alive = tl.load(at + 2) == 1
        goes_on = alive & ~stopped & (position + 1 < tl.load(at + 4))
        tl.store(at, drawn, mask=alive)
        tl.store(at + 1, position + 1, mask=alive)
        tl.store(at + 2, goes_on.to(tl.int64))
