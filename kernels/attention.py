"""Paged decode attention: one query token per sequence against its pages of keys and values, and its shared-prefix form for groups.

Three kernels. `_decode_kernel`: one program per (sequence, KV head, split of 256 tokens) reduces its tokens with an online softmax. `_prefix_kernel`:
the same for the prefix that a group of samples shares, with all their query heads in one matrix tile, so that the prefix is read once. `_merge_splits_kernel`
puts the partial results together by log-sum-exp. The split *length* is fixed, so the order of every sum depends on the sequence's own length alone,
not on the batch; programs past the end leave at once, so one CUDA graph serves all lengths.
"""

from __future__ import annotations

import torch

from kernels import architecture, jit, tl, triton, use_triton, wide

SPLIT = 256  # tokens per program: 4 pages of 64. Batch 256 at 1k tokens gives 2048 programs, several waves on 132 multiprocessors
SLOTS = 16  # partial results the merge holds at a time
LOG2E = 1.4426950408889634

# torch references


def _gather_pages(pages, block_tables, lengths, count):
    """The first `count` pages of every sequence as [B, K, count * page_size, hd]. Past a sequence's end: the first page of the longest one, which
    is full whenever there is such an entry, so that nothing unwritten is read there."""
    _, kv_heads, page_size, head_dim = pages.shape
    index = torch.arange(count, device=pages.device)
    table = (
        torch.where(
            index * page_size < lengths[:, None],
            block_tables[:, :count],
            block_tables[lengths.argmax(), 0],
        )
        .long()
        .clamp_(min=0)
    )
    rows = table[:, None, :] * kv_heads + torch.arange(kv_heads, device=pages.device)[None, :, None]
    flat = pages.view(-1, page_size * head_dim)
    return flat.index_select(0, rows.flatten()).view(
        len(table), kv_heads, count * page_size, head_dim
    )


def _clear_tail(v, lengths, page_size):
    """Zero the slots past the end of each sequence's last page in place: they may hold anything, NaN too, and 0 * NaN is NaN."""
    last_page = ((lengths - 1).clamp(min=0) // page_size * page_size).long()
    tail = last_page[:, None] + torch.arange(page_size, device=v.device)
    rows = torch.arange(len(v), device=v.device)[:, None]
    by_token = v.transpose(1, 2)
    by_token[rows, tail] = by_token[rows, tail].masked_fill(
        (tail >= lengths[:, None])[:, :, None, None], 0.0
    )


def paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale):
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    count = max(1, -(-int(lengths.max()) // page_size))
    k = wide(_gather_pages(k_pages, block_tables, lengths, count))
    v = wide(_gather_pages(v_pages, block_tables, lengths, count))
    _clear_tail(v, lengths, page_size)
    hidden = torch.arange(count * page_size, device=q.device) >= lengths[:, None]
    scores = wide(q).view(batch, kv_heads, heads // kv_heads, head_dim) @ k.transpose(2, 3) * scale
    probabilities = scores.masked_fill_(hidden[:, None, None, :], float("-inf")).softmax(-1)
    out = (probabilities @ v).view(batch, heads, head_dim)
    return out.masked_fill_((lengths == 0)[:, None, None], 0.0).to(q.dtype)


# Triton kernels


@jit
def _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES: tl.constexpr):
    """(tokens that `sequence` shares with another live one of its group in its aligned block of SEQUENCES, index of the first live one)."""
    other = sequence // SEQUENCES * SEQUENCES + tl.arange(0, SEQUENCES)
    same = tl.load(group_ids + other, mask=other < B, other=0) == tl.load(group_ids + sequence)
    live = same & (tl.load(lengths + other, mask=other < B, other=0) > 0)
    shared = tl.max(tl.where(live, tl.load(prefix_lengths + other, mask=other < B, other=0), 0), 0)
    # One live member: nothing to share, the plain kernel reads all of it.
    return tl.where(tl.sum(live.to(tl.int32), 0) >= 2, shared, 0), tl.min(
        tl.where(live, other, B), 0
    )


@jit
def _attend_pages(
    q,
    k_pages,
    v_pages,
    table,
    head,
    K,
    begin,
    end,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Online softmax (base 2) of q [ROWS, HD] over tokens begin..end-1 of the pages in `table`: (unnormalised output, running maximum, sum)."""
    slot = tl.arange(0, TILE)
    column = tl.arange(0, HD)
    top = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    out = tl.zeros((ROWS, HD), dtype=tl.float32)
    for tile in range(begin // TILE, tl.cdiv(end, TILE)):
        page = tl.load(table + tile * TILE // PAGE).to(tl.int64)
        base = ((page * K + head) * PAGE + tile * TILE % PAGE) * HD
        token = tile * TILE + slot
        inside = (token >= begin) & (token < end)
        k = tl.load(k_pages + base + slot[None, :] * HD + column[:, None])
        scores = tl.dot(q, k, input_precision="ieee") * SCALE
        scores = tl.where(inside[None, :], scores, -float("inf"))
        # Every tile of the loop holds at least one token, so the new maximum is finite and -inf minus -inf cannot happen.
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        v = tl.load(
            v_pages + base + slot[:, None] * HD + column[None, :], mask=inside[:, None], other=0.0
        )
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    return out, top, total


@jit
def _decode_kernel(
    q,
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
    splits,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(lengths + sequence))
    if begin >= end:
        return
    if SHARED:
        shared, _first = _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES)
        begin = tl.maximum(begin, shared)
        if begin >= end:
            return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HD)
    first = (
        sequence.to(tl.int64) * K * R + head * R
    )  # this program's first query head; offsets from it fit 32 bits
    tile = tl.load(
        q + first * HD + row[:, None] * HD + column[None, :], mask=row[:, None] < R, other=0.0
    )
    table = block_tables + sequence.to(tl.int64) * max_pages
    result, top, total = _attend_pages(
        tile, k_pages, v_pages, table, head, K, begin, end, SCALE, ROWS, HD, PAGE, TILE
    )
    first = (
        first * slots + splits + split
    )  # the first `splits` slots are the prefix kernel's, when there is one
    tl.store(
        out + first * HD + row[:, None] * slots * HD + column[None, :],
        result / total[:, None],
        mask=row[:, None] < R,
    )
    tl.store(lse + first + row * slots, top + tl.log2(total), mask=row < R)


@jit
def _prefix_kernel(
    q,
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
    R: tl.constexpr,
    HEADS: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = tl.load(group_ids + sequence)
    if sequence % SEQUENCES > 0:
        if tl.load(group_ids + sequence - 1) == group:
            return  # the first sequence of the group in this aligned block works for all of them
    shared, live = _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, shared)
    if begin >= end:
        return
    row = tl.arange(0, SEQUENCES * HEADS)
    member = sequence + row // HEADS
    in_block = (member < B) & (member < (sequence // SEQUENCES + 1) * SEQUENCES) & (row % HEADS < R)
    mine = in_block & (tl.load(group_ids + member, mask=in_block, other=0) == group)
    column = tl.arange(0, HD)
    first = sequence.to(tl.int64) * K * R + head * R
    q_head = row // HEADS * K * R + row % HEADS
    tile = tl.load(
        q + first * HD + q_head[:, None] * HD + column[None, :], mask=mine[:, None], other=0.0
    )
    table = block_tables + live.to(tl.int64) * max_pages
    result, top, total = _attend_pages(
        tile, k_pages, v_pages, table, head, K, begin, end, SCALE, SEQUENCES * HEADS, HD, PAGE, TILE
    )
    first = first * slots + split
    tl.store(
        out + first * HD + q_head[:, None] * slots * HD + column[None, :],
        result / total[:, None],
        mask=mine[:, None],
    )
    tl.store(lse + first + q_head * slots, top + tl.log2(total), mask=mine)


@jit
def _merge_splits_kernel(
    partial,
    lse,
    out,
    lengths,
    prefix_lengths,
    group_ids,
    B,
    H,
    slots,
    splits,
    HD: tl.constexpr,
    SPLIT: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence)
    shared = 0
    if SHARED:
        shared, _first = _shared_tokens(sequence, lengths, prefix_lengths, group_ids, B, SEQUENCES)
        shared = tl.minimum(shared, length)  # a dead slot shares nothing, whatever its group does
    column = tl.arange(0, HD)
    row = sequence.to(tl.int64) * H + head
    # Finite, so that a sequence of length 0 (no valid slot at all) gives 0 / 1 and not NaN.
    top, total, result = -1e30, 0.0, tl.zeros((HD,), dtype=tl.float32)
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        begin = tl.where(slot < splits, slot, slot - splits) * SPLIT
        # Which slots were written: prefix splits below `shared`, own splits that reach past it. Nothing else is read.
        written = tl.where(
            slot < splits,
            begin < shared,
            (tl.minimum(begin + SPLIT, length) > tl.maximum(begin, shared)) & (slot < slots),
        )
        weight = tl.load(lse + row * slots + slot, mask=written, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(weight, 0))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(weight - new_top)
        part = tl.load(
            partial + (row * slots + slot)[:, None] * HD + column[None, :],
            mask=written[:, None],
            other=0.0,
        )
        result = result * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    tl.store(out + row * HD + column, result / tl.where(total > 0, total, 1.0))


# Launchers. Static choices per architecture; registers and spills of each are asserted in tests/test_kernels_aot.py.

DECODE_WARPS, DECODE_STAGES, MERGE_WARPS = 4, 3, 2
TILE_ELEMENTS = 8192  # keys per decode tile x head dim: 16 KB contiguous, 128 tokens at head dim 64 and 64 at 128
# Prefix: sequences per tile, tokens per tile, warps, stages. 16 x 8 padded query heads = 128 rows, one WGMMA tile of 8 warps; sm_80 would spill with it.
PREFIX = {90: (16, 64, 8, 2), 80: (8, 32, 4, 2)}


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
    (batch, heads, head_dim), (kv_heads, page_size), max_pages = (
        q.shape,
        k_pages.shape[1:3],
        block_tables.shape[1],
    )
    block_tables = block_tables.contiguous()
    per_kv, shared, arch = heads // kv_heads, group_ids is not None, arch or architecture(q)
    splits = triton.cdiv(max_pages * page_size, SPLIT)
    own = splits if shared else 0
    slots = splits + own
    prefix_lengths, group_ids = (prefix_lengths, group_ids) if shared else (lengths, lengths)
    partial = torch.empty(batch, heads, slots, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, slots, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    inputs = (
        q.contiguous(),
        k_pages,
        v_pages,
        block_tables,
        lengths,
        prefix_lengths,
        group_ids,
        partial,
        lse,
        batch,
        kv_heads,
        max_pages,
        slots,
    )
    sequences, tokens, warps, stages = PREFIX[arch]
    shape = {
        "SCALE": scale * LOG2E,
        "R": per_kv,
        "HD": head_dim,
        "PAGE": page_size,
        "SPLIT": SPLIT,
        "SEQUENCES": sequences,
    }
    grid = (batch, kv_heads, splits)
    if shared:
        tile = {"HEADS": triton.next_power_of_2(per_kv), "TILE": min(page_size, tokens)}
        _prefix_kernel[grid](*inputs, **shape, **tile, num_warps=warps, num_stages=stages)
    # 16 query heads is the smallest tensor-core tile; 6, 7 and 8 of a KV head fill part of it.
    tile = {
        "ROWS": max(16, triton.next_power_of_2(per_kv)),
        "TILE": min(page_size, 128, TILE_ELEMENTS // head_dim),
    }
    _decode_kernel[grid](
        *inputs,
        own,
        **shape,
        **tile,
        SHARED=shared,
        num_warps=DECODE_WARPS,
        num_stages=DECODE_STAGES,
    )
    merge = (partial, lse, out, lengths, prefix_lengths, group_ids, batch, heads, slots, own)
    _merge_splits_kernel[(batch, heads)](
        *merge,
        HD=head_dim,
        SPLIT=SPLIT,
        SLOTS=SLOTS,
        SHARED=shared,
        SEQUENCES=sequences,
        num_warps=MERGE_WARPS,
    )
    return out


def _fits(q, k_pages):
    """What the kernels need beyond a CUDA device. The page sizes to use: one decode tile, 128 tokens at head dim 64 and 64 at 128."""
    page_size, head_dim = k_pages.shape[2:]
    return (
        use_triton(q) and head_dim in (16, 32, 64, 128) and page_size in (16, 32, 64, 128, 256, 512)
    )


# Public functions


def paged_attention(q, k_pages, v_pages, block_tables, lengths, scale):
    """Softmax attention of each sequence's newest token over its cached tokens (PagedAttention, arXiv 2309.06180).

    q [B, H, hd]; k_pages, v_pages [pages, K, page_size, hd]; block_tables [B, max_pages] int32 (page of tokens 0..page_size-1, and so on; entries past
    the end are not read); lengths [B] int32, the current, already written token included. Length 0 gives zeros. Returns [B, H, hd].
    """
    run = _paged_attention if _fits(q, k_pages) else paged_attention_reference
    return run(q, k_pages, v_pages, block_tables, lengths, scale)


def shared_prefix_attention(
    q, k_pages, v_pages, block_tables, lengths, prefix_lengths, group_ids, scale
):
    """`paged_attention` where adjacent sequences of equal group_ids [B] share the pages of their first prefix_lengths [B] int32 tokens (whole pages).

    Same result; on CUDA a group's prefix is read once per aligned block of 16 sequences (Hydragen, arXiv 2402.05099) and merged with the rest by
    log-sum-exp: put a group's samples into adjacent slots, from a multiple of 16 where they fit. Dead slots (length 0) may sit between live ones.
    """
    if not _fits(q, k_pages):
        return paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale)
    return _paged_attention(
        q, k_pages, v_pages, block_tables, lengths, scale, prefix_lengths, group_ids
    )
