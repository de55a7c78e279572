"""Paged decode attention: one query token per sequence against its pages of keys and values.

Two kernels. `_decode_kernel`: one program per (sequence, KV head, split of 256 tokens) reduces its
tokens with an online softmax; a sequence of one split is done with that. `_merge_splits_kernel`
puts the partial results of the others together by log-sum-exp.

The split *length* is fixed, so the order of every sum depends on the sequence's own length alone,
not on the batch. Programs past the end leave at once, so one CUDA graph serves all lengths.

Samples of one prompt read the same pages, each for itself: the GPU's L2 cache has them by then. A
kernel that read a shared prefix once for all its samples (Hydragen, arXiv 2402.05099) was slower
at every size measured: 2.81 ms a step instead of 2.65 for 512 rows in groups of 16 (BENCHMARKS.md).
"""

from __future__ import annotations

import torch

from kernels import jit, tl, triton, use_triton, wide

# Tokens per program: 2 or 4 pages. Batch 256 at 1k tokens gives 2048 programs, several waves on
# 132 multiprocessors.
SPLIT = 256
# Tokens per tile: 8 KB of keys at head dim 64; seven programs share a Hopper multiprocessor.
TILE = 64
MERGED_SPLITS = 4  # partial results the merge holds at a time
LOG2E = 1.4426950408889634

# Static choices; registers and spills of each are asserted in tests/test_kernels_aot.py.
WARPS = 4
STAGES = 3


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


def _fits(q, k_pages):
    """What the kernels need beyond a CUDA device."""
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


def _paged_attention(q, k_pages, v_pages, block_tables, lengths, scale):
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    max_pages = block_tables.shape[1]
    per_kv = heads // kv_heads
    splits = triton.cdiv(max_pages * page_size, SPLIT)
    padded_heads = triton.next_power_of_2(per_kv)

    out = torch.empty_like(q)
    partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    grid = (batch, kv_heads, splits)
    _decode_kernel[grid](
        q.contiguous(),
        k_pages,
        v_pages,
        block_tables.contiguous(),
        lengths,
        out,
        partial,
        lse,
        kv_heads,
        max_pages,
        splits,
        SCALE=scale * LOG2E,
        R=per_kv,
        # The smallest tensor-core tile; 6, 7 and 8 query heads of a KV head fill part of it.
        ROWS=max(16, padded_heads),
        HD=head_dim,
        PAGE=page_size,
        PAGES=max(1, SPLIT // page_size),
        TILE=min(TILE, page_size),
        SPLIT=SPLIT,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if splits == 1:
        return out

    grid = (batch, kv_heads)
    _merge_splits_kernel[grid](
        partial,
        lse,
        out,
        lengths,
        kv_heads,
        splits,
        R=per_kv,
        HEADS=padded_heads,
        HD=head_dim,
        SPLIT=SPLIT,
        SPLITS=MERGED_SPLITS,
        num_warps=WARPS,
    )
    return out


# ---- Triton kernels ----


@jit(do_not_specialize=["max_pages", "splits"])
def _decode_kernel(
    q,  # [B, K * R, HD]
    k_pages,  # [pages, K, PAGE, HD]
    v_pages,
    block_tables,  # [B, max_pages]
    lengths,  # [B]
    out,  # [B, K * R, HD], written here for sequences of at most one split
    partial,  # results of the splits of the others, [B, K * R, splits, HD] fp32
    lse,  # their log-sum-exps, base 2, [B, K * R, splits] fp32
    K,
    max_pages,
    splits,
    SCALE: tl.constexpr,  # times log2(e): exp2 is one instruction
    R: tl.constexpr,  # query heads per KV head
    ROWS: tl.constexpr,  # R padded to a tensor-core tile
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,  # of a split
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One split of one sequence for the query heads of one KV head."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)

    # This program's first query head; offsets from it fit 32 bits.
    first = sequence.to(tl.int64) * K * R + head * R
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HD)
    is_head = row[:, None] < R
    offset = row[:, None] * HD + column[None, :]
    if begin >= end:
        if length + split == 0:
            nothing = tl.zeros((ROWS, HD), dtype=tl.float32)
            tl.store(out + first * HD + offset, nothing, mask=is_head)
        return

    # All table entries at once: a page number loaded inside the loop would make every tile wait
    # for two loads, one after the other.
    index = tl.arange(0, PAGES)
    table = block_tables + sequence.to(tl.int64) * max_pages + begin // PAGE
    entries = tl.load(table + index, mask=begin + index * PAGE < end, other=0)
    tile_q = tl.load(q + first * HD + offset, mask=is_head, other=0.0)

    token = tl.arange(0, TILE)
    top = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    result = tl.zeros((ROWS, HD), dtype=tl.float32)
    for start in range(0, end - begin, TILE):
        # A tile lies inside one page: TILE divides PAGE.
        page = tl.sum(tl.where(index == start // PAGE, entries, 0), 0).to(tl.int64)
        base = ((page * K + head) * PAGE + (begin + start) % PAGE) * HD
        inside = begin + start + token < end

        k = tl.load(k_pages + base + token[None, :] * HD + column[:, None])
        scores = tl.dot(tile_q, k, input_precision="ieee") * SCALE
        scores = tl.where(inside[None, :], scores, -float("inf"))

        # Every tile holds at least one token, so the new maximum is finite and -inf minus -inf
        # cannot happen.
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])

        v_at = v_pages + base + token[:, None] * HD + column[None, :]
        v = tl.load(v_at, mask=inside[:, None], other=0.0)
        total = total * shrink + tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, result * shrink[:, None], input_precision="ieee")
        top = new_top

    result = result / total[:, None]
    if length <= SPLIT:
        tl.store(out + first * HD + offset, result, mask=is_head)
    else:
        first = first * splits + split
        partial_at = partial + first * HD + row[:, None] * splits * HD + column[None, :]
        tl.store(partial_at, result, mask=is_head)
        tl.store(lse + first + row * splits, top + tl.log2(total), mask=row < R)


@jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    partial,  # [B, K * R, splits, HD], as _decode_kernel leaves them
    lse,  # [B, K * R, splits]
    out,  # [B, K * R, HD]
    lengths,  # [B]
    K,
    splits,
    R: tl.constexpr,
    HEADS: tl.constexpr,  # R padded to a power of two
    HD: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh the partial results of one sequence's query heads of one KV head."""
    sequence = tl.program_id(0)
    length = tl.load(lengths + sequence)
    if length <= SPLIT:
        return

    head = tl.arange(0, HEADS)
    column = tl.arange(0, HD)
    row = sequence.to(tl.int64) * K * R + tl.program_id(1) * R + head
    count = tl.cdiv(length, SPLIT)
    top = tl.full((HEADS,), -1e30, dtype=tl.float32)  # finite, for the heads that pad
    total = tl.zeros((HEADS,), dtype=tl.float32)
    result = tl.zeros((HEADS, HD), dtype=tl.float32)

    for start in range(0, count, SPLITS):
        split = start + tl.arange(0, SPLITS)
        written = (head < R)[:, None] & (split < count)[None, :]
        at = row[:, None] * splits + split[None, :]
        weight = tl.load(lse + at, mask=written, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(weight, 1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(weight - new_top[:, None])

        part_at = partial + at[:, :, None] * HD + column[None, None, :]
        part = tl.load(part_at, mask=written[:, :, None], other=0.0)
        result = result * shrink[:, None] + tl.sum(part * weight[:, :, None], 1)
        total = total * shrink + tl.sum(weight, 1)
        top = new_top

    out_at = out + row[:, None] * HD + column[None, :]
    mean = result / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_at, mean, mask=(head < R)[:, None])
