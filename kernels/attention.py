"""Paged decode attention: one query token per sequence against its pages of keys and values, and
its form for groups of samples that share a prefix.

Three kernels. `_decode_kernel`: one program per (sequence, KV head, split of 256 tokens) reduces
its tokens with an online softmax. `_prefix_kernel`: the same for the prefix that a group of samples
shares, with all their query heads in one matrix tile, so that the prefix is read once.
`_merge_splits_kernel` puts the partial results together by log-sum-exp.

The split *length* is fixed, so the order of every sum depends on the sequence's own length alone,
not on the batch. Programs past the end leave at once, so one CUDA graph serves all lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import architecture, jit, tl, triton, use_triton, wide

# Tokens per program: 4 pages of 64. Batch 256 at 1k tokens gives 2048 programs, several waves on
# 132 multiprocessors.
SPLIT = 256
SLOTS = 16  # partial results the merge holds at a time
LOG2E = 1.4426950408889634

# Static choices; registers and spills of each are asserted in tests/test_kernels_aot.py.
DECODE_WARPS, DECODE_STAGES, MERGE_WARPS = 4, 3, 2
# Keys per decode tile x head dim: 16 KB contiguous, 128 tokens at head dim 64 and 64 at 128.
TILE_ELEMENTS = 8192


class PrefixTile(NamedTuple):
    """How the prefix kernel runs; sequences: whose query heads make one tile."""

    sequences: int
    tokens: int
    warps: int
    stages: int


# By architecture. 16 sequences x 8 padded query heads = 128 rows, one WGMMA tile of 8 warps; sm_80
# would spill with it.
PREFIX = {
    90: PrefixTile(sequences=16, tokens=64, warps=8, stages=2),
    80: PrefixTile(sequences=8, tokens=32, warps=4, stages=2),
}


# ---- public functions ----


def paged_attention(q, k_pages, v_pages, block_tables, lengths, scale):
    """Attention of each sequence's newest token over its cached ones (arXiv 2309.06180).

    q [B, H, hd]
    k_pages, v_pages [pages, K, page_size, hd]
    block_tables [B, max_pages] int32: entry i is the page of tokens i * page_size and on; entries
        past the end of a sequence are not read
    lengths [B] int32: tokens, the current, already written one included; 0 gives zeros
    Returns [B, H, hd]. Two tokens of equal score with values 1 and 3: 2.
    """
    if not _fits(q, k_pages):
        return paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale)
    return _paged_attention(q, k_pages, v_pages, block_tables, lengths, scale)


def shared_prefix_attention(
    q, k_pages, v_pages, block_tables, lengths, prefix_lengths, group_ids, scale
):
    """`paged_attention` where neighbours of one group share the pages of their first tokens.

    prefix_lengths [B] int32: tokens shared with the group, whole pages
    group_ids [B] int64: adjacent sequences of equal id are a group

    Same result. On CUDA a group's prefix is read once per aligned block of 16 sequences (Hydragen,
    arXiv 2402.05099) and merged with the rest by log-sum-exp: put a group's samples into adjacent
    slots, from a multiple of 16 where they fit. Dead slots (length 0) may sit between live ones.
    """
    if not _fits(q, k_pages):
        return paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale)
    return _paged_attention(
        q, k_pages, v_pages, block_tables, lengths, scale, prefix_lengths, group_ids
    )


def _fits(q, k_pages):
    """What the kernels need beyond a CUDA device.

    The page sizes to use: one decode tile, 128 tokens at head dim 64 and 64 at 128.
    """
    page_size, head_dim = k_pages.shape[2:]
    fits_tile = head_dim in (16, 32, 64, 128)
    fits_page = page_size in (16, 32, 64, 128, 256, 512)
    return use_triton(q) and fits_tile and fits_page


# ---- torch references ----


def paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale):
    """`paged_attention` over the gathered pages of all sequences at once."""
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]

    count = max(1, -(-int(lengths.max()) // page_size))
    k = wide(_gather_pages(k_pages, block_tables, lengths, count))
    v = wide(_gather_pages(v_pages, block_tables, lengths, count))
    _clear_tail(v, lengths, page_size)

    grouped_q = wide(q).view(batch, kv_heads, heads // kv_heads, head_dim)
    scores = grouped_q @ k.transpose(2, 3) * scale
    past_end = torch.arange(count * page_size, device=q.device) >= lengths[:, None]
    scores.masked_fill_(past_end[:, None, None, :], float("-inf"))

    out = (scores.softmax(-1) @ v).view(batch, heads, head_dim)
    is_empty = (lengths == 0)[:, None, None]
    return out.masked_fill_(is_empty, 0.0).to(q.dtype)


def _gather_pages(pages, block_tables, lengths, count):
    """The first `count` pages of every sequence as [B, K, count * page_size, hd].

    Past a sequence's end stands the first page of the longest one, which is full whenever there is
    such an entry, so that nothing unwritten is read there.
    """
    _, kv_heads, page_size, head_dim = pages.shape
    used = torch.arange(count, device=pages.device) * page_size < lengths[:, None]
    filler = block_tables[lengths.argmax(), 0]
    table = torch.where(used, block_tables[:, :count], filler).long().clamp_(min=0)

    # Pages and heads as rows of one matrix: row = page * K + head.
    head = torch.arange(kv_heads, device=pages.device)[None, :, None]
    rows = table[:, None, :] * kv_heads + head
    gathered = pages.view(-1, page_size * head_dim).index_select(0, rows.flatten())
    return gathered.view(len(table), kv_heads, count * page_size, head_dim)


def _clear_tail(v, lengths, page_size):
    """Zero the slots past the end of each sequence's last page, in place.

    They may hold anything, NaN too, and 0 * NaN is NaN.
    """
    last_page = ((lengths - 1).clamp(min=0) // page_size * page_size).long()
    tail = last_page[:, None] + torch.arange(page_size, device=v.device)
    past_end = (tail >= lengths[:, None])[:, :, None, None]

    rows = torch.arange(len(v), device=v.device)[:, None]
    by_token = v.transpose(1, 2)
    by_token[rows, tail] = by_token[rows, tail].masked_fill(past_end, 0.0)


# ---- launcher ----


def _paged_attention(
    q,
    k_pages,
    v_pages,
    block_tables,
    lengths,
    scale,
    prefix_lengths=None,
    group_ids=None,
    arch=None,
):
    """Both public functions on Triton; a prefix is shared where group_ids are given."""
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    max_pages = block_tables.shape[1]
    per_kv = heads // kv_heads

    shared = group_ids is not None
    if not shared:  # the kernels take them all the same, and do not read them
        prefix_lengths, group_ids = lengths, lengths

    # Partial results: one slot per split, and before them one per split of the shared prefix.
    splits = triton.cdiv(max_pages * page_size, SPLIT)
    prefix_splits = splits if shared else 0
    slots = prefix_splits + splits
    partial = torch.empty(batch, heads, slots, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, slots, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)

    prefix = PREFIX[arch or architecture(q)]
    inputs = (q.contiguous(), k_pages, v_pages, block_tables.contiguous(), lengths)
    inputs += (prefix_lengths, group_ids, partial, lse, batch, kv_heads, max_pages, slots)
    shape = {
        "SCALE": scale * LOG2E,
        "R": per_kv,
        "HD": head_dim,
        "PAGE": page_size,
        "SPLIT": SPLIT,
        "SEQUENCES": prefix.sequences,
    }
    padded_heads = triton.next_power_of_2(per_kv)

    grid = (batch, kv_heads, splits)
    if shared:
        _prefix_kernel[grid](
            *inputs,
            **shape,
            HEADS=padded_heads,
            TILE=min(page_size, prefix.tokens),
            num_warps=prefix.warps,
            num_stages=prefix.stages,
        )
    _decode_kernel[grid](
        *inputs,
        prefix_splits,
        **shape,
        # The smallest tensor-core tile; 6, 7 and 8 query heads of a KV head fill part of it.
        ROWS=max(16, padded_heads),
        TILE=min(page_size, 128, TILE_ELEMENTS // head_dim),
        SHARED=shared,
        num_warps=DECODE_WARPS,
        num_stages=DECODE_STAGES,
    )

    grid = (batch, heads)
    _merge_splits_kernel[grid](
        partial,
        lse,
        out,
        lengths,
        prefix_lengths,
        group_ids,
        batch,
        heads,
        slots,
        prefix_splits,
        HD=head_dim,
        SPLIT=SPLIT,
        SLOTS=SLOTS,
        SHARED=shared,
        SEQUENCES=prefix.sequences,
        num_warps=MERGE_WARPS,
    )
    return out


# ---- Triton kernels ----


@jit(do_not_specialize=["B", "max_pages", "slots", "splits"])
def _decode_kernel(
    q,  # [B, K * R, HD]
    k_pages,  # [pages, K, PAGE, HD]
    v_pages,
    block_tables,  # [B, max_pages]
    lengths,  # [B]
    prefix_lengths,  # [B], read only if SHARED
    group_ids,  # [B], read only if SHARED
    out,  # partial results [B, K * R, slots, HD] fp32
    lse,  # their log-sum-exps, base 2, [B, K * R, slots] fp32
    B,
    K,
    max_pages,
    slots,
    splits,  # the first `splits` slots are the prefix kernel's; 0 where there is none
    SCALE: tl.constexpr,
    R: tl.constexpr,  # query heads per KV head
    ROWS: tl.constexpr,  # R padded to a tensor-core tile
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """One split of one sequence for the query heads of one KV head."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(lengths + sequence))
    if begin >= end:
        return
    if SHARED:
        shared, _first = _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES)
        begin = tl.maximum(begin, shared)
        if begin >= end:
            return

    # This program's first query head; offsets from it fit 32 bits.
    first = sequence.to(tl.int64) * K * R + head * R
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HD)
    q_at = q + first * HD + row[:, None] * HD + column[None, :]
    tile = tl.load(q_at, mask=row[:, None] < R, other=0.0)

    table = block_tables + sequence.to(tl.int64) * max_pages
    result, top, total = _attend_pages(
        tile, k_pages, v_pages, table, head, K, begin, end, SCALE, ROWS, HD, PAGE, TILE
    )

    first = first * slots + splits + split
    out_at = out + first * HD + row[:, None] * slots * HD + column[None, :]
    tl.store(out_at, result / total[:, None], mask=row[:, None] < R)
    tl.store(lse + first + row * slots, top + tl.log2(total), mask=row < R)


@jit
def _prefix_kernel(
    q,  # tensors as in _decode_kernel
    k_pages,
    v_pages,
    block_tables,
    lengths,
    prefix_lengths,
    group_ids,
    out,
    lse,
    B,
    K,
    max_pages,
    slots,
    SCALE: tl.constexpr,
    R: tl.constexpr,  # query heads per KV head
    HEADS: tl.constexpr,  # R padded to a power of two
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """One split of a shared prefix for the query heads of one KV head, of a whole group."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    group = tl.load(group_ids + sequence)
    # The first sequence of the group in this aligned block works for all of them.
    if sequence % SEQUENCES > 0:
        if tl.load(group_ids + sequence - 1) == group:
            return
    shared, live = _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, shared)
    if begin >= end:
        return

    # Row of the tile -> member of the block and its query head; the rows of others are masked out.
    row = tl.arange(0, SEQUENCES * HEADS)
    member = sequence + row // HEADS
    block_end = (sequence // SEQUENCES + 1) * SEQUENCES
    in_block = (member < B) & (member < block_end) & (row % HEADS < R)
    mine = in_block & (tl.load(group_ids + member, mask=in_block, other=0) == group)

    column = tl.arange(0, HD)
    first = sequence.to(tl.int64) * K * R + head * R
    q_head = row // HEADS * K * R + row % HEADS
    q_at = q + first * HD + q_head[:, None] * HD + column[None, :]
    tile = tl.load(q_at, mask=mine[:, None], other=0.0)

    table = block_tables + live.to(tl.int64) * max_pages
    result, top, total = _attend_pages(
        tile, k_pages, v_pages, table, head, K, begin, end, SCALE, SEQUENCES * HEADS, HD, PAGE, TILE
    )

    first = first * slots + split
    out_at = out + first * HD + q_head[:, None] * slots * HD + column[None, :]
    tl.store(out_at, result / total[:, None], mask=mine[:, None])
    tl.store(lse + first + q_head * slots, top + tl.log2(total), mask=mine)


@jit(do_not_specialize=["B", "slots", "splits"])
def _merge_splits_kernel(
    partial,  # [B, H, slots, HD]
    lse,  # [B, H, slots]
    out,  # [B, H, HD]
    lengths,
    prefix_lengths,
    group_ids,
    B,
    H,
    slots,
    splits,  # as in _decode_kernel
    HD: tl.constexpr,
    SPLIT: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Weigh the partial results of one query head of one sequence by their log-sum-exps."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + sequence)
    shared = 0
    if SHARED:
        shared, _first = _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES)
        shared = tl.minimum(shared, length)  # a dead slot shares nothing, whatever its group does

    column = tl.arange(0, HD)
    row = sequence.to(tl.int64) * H + head
    # Finite, so that a sequence of length 0 (no valid slot at all) gives 0 / 1 and not NaN.
    top = -1e30
    total = 0.0
    result = tl.zeros((HD,), dtype=tl.float32)

    for start in range(0, slots, SLOTS):
        # Which slots were written: prefix splits below `shared`, own splits that reach past it.
        # Nothing else is read.
        slot = start + tl.arange(0, SLOTS)
        begin = tl.where(slot < splits, slot, slot - splits) * SPLIT
        end = tl.minimum(begin + SPLIT, length)
        is_own = (end > tl.maximum(begin, shared)) & (slot < slots)
        written = tl.where(slot < splits, begin < shared, is_own)

        weight = tl.load(lse + row * slots + slot, mask=written, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(weight, 0))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(weight - new_top)

        part_at = partial + (row * slots + slot)[:, None] * HD + column[None, :]
        part = tl.load(part_at, mask=written[:, None], other=0.0)
        result = result * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top

    tl.store(out + row * HD + column, result / tl.where(total > 0, total, 1.0))


@jit
def _attend_pages(
    q,  # [ROWS, HD], a tile in registers
    k_pages,
    v_pages,
    table,  # this sequence's row of the block table
    head,
    K,
    begin,
    end,
    SCALE: tl.constexpr,  # times log2(e): exp2 is one instruction
    ROWS: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Online softmax (base 2) of q over tokens begin..end-1 of the pages in `table`.

    Returns (unnormalised output [ROWS, HD], running maximum [ROWS], sum [ROWS]).
    """
    slot = tl.arange(0, TILE)
    column = tl.arange(0, HD)
    top = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    out = tl.zeros((ROWS, HD), dtype=tl.float32)

    for tile in range(begin // TILE, tl.cdiv(end, TILE)):
        # A tile lies inside one page: TILE divides PAGE.
        page = tl.load(table + tile * TILE // PAGE).to(tl.int64)
        base = ((page * K + head) * PAGE + tile * TILE % PAGE) * HD
        token = tile * TILE + slot
        inside = (token >= begin) & (token < end)

        k = tl.load(k_pages + base + slot[None, :] * HD + column[:, None])
        scores = tl.dot(q, k, input_precision="ieee") * SCALE
        scores = tl.where(inside[None, :], scores, -float("inf"))

        # Every tile of the loop holds at least one token, so the new maximum is finite and
        # -inf minus -inf cannot happen.
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])

        v_at = v_pages + base + slot[:, None] * HD + column[None, :]
        v = tl.load(v_at, mask=inside[:, None], other=0.0)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    return out, top, total


@jit
def _shared_tokens(
    sequence,
    lengths,
    prefix_lengths,
    group_ids,
    B,
    SEQUENCES: tl.constexpr,
):
    """What `sequence` shares inside its aligned block of SEQUENCES: (tokens, first live member).

    tokens: shared with another live sequence of its group. first live member: index in the batch.
    """
    other = sequence // SEQUENCES * SEQUENCES + tl.arange(0, SEQUENCES)
    inside = other < B
    group = tl.load(group_ids + other, mask=inside, other=0)
    same = group == tl.load(group_ids + sequence)
    length = tl.load(lengths + other, mask=inside, other=0)
    live = same & (length > 0)

    prefix = tl.load(prefix_lengths + other, mask=inside, other=0)
    shared = tl.max(tl.where(live, prefix, 0), 0)

    # One live member: nothing to share, the plain kernel reads all of it.
    members = tl.sum(live.to(tl.int32), 0)
    shared = tl.where(members >= 2, shared, 0)
    first = tl.min(tl.where(live, other, B), 0)
    return shared, first
