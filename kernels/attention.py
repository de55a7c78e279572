"""Paged decode attention: one query token per sequence against its pages of keys and values; and its shared-prefix form for groups."""

import torch


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _gather_pages(pages, block_tables, lengths, count):
    """The first `count` pages of every sequence as [B, K, count * page_size, hd]; table entries past a sequence's end read its first page."""
    _, kv_heads, page_size, head_dim = pages.shape
    index = torch.arange(count, device=pages.device)
    table = torch.where(index * page_size < lengths[:, None], block_tables[:, :count], block_tables[:, :1]).long().clamp_(min=0)
    rows = table[:, None, :] * kv_heads + torch.arange(kv_heads, device=pages.device)[None, :, None]
    flat = pages.view(-1, page_size * head_dim)
    return flat.index_select(0, rows.flatten()).view(len(table), kv_heads, count * page_size, head_dim)


def paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale):
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    count = max(1, -(-int(lengths.max()) // page_size))
    k = _wide(_gather_pages(k_pages, block_tables, lengths, count))
    v = _wide(_gather_pages(v_pages, block_tables, lengths, count))
    # Slots past the end may hold anything, NaN too, and 0 * NaN is NaN: zero the tail of each last page, the only one not full.
    hidden = torch.arange(count * page_size, device=q.device) >= lengths[:, None]
    last = ((lengths - 1).clamp(min=0) // page_size * page_size).long()
    tail = last[:, None] + torch.arange(page_size, device=q.device)
    rows = torch.arange(batch, device=q.device)[:, None]
    v.transpose(1, 2)[rows, tail] = v.transpose(1, 2)[rows, tail].masked_fill(hidden.gather(1, tail)[:, :, None, None], 0.0)
    scores = _wide(q).view(batch, kv_heads, heads // kv_heads, head_dim) @ k.transpose(2, 3) * scale
    probabilities = scores.masked_fill_(hidden[:, None, None, :], float("-inf")).softmax(-1)
    out = (probabilities @ v).view(batch, heads, head_dim)
    return out.masked_fill_((lengths == 0)[:, None, None], 0.0).to(q.dtype)


def paged_attention(q, k_pages, v_pages, block_tables, lengths, scale):
    """Softmax attention of each sequence's newest token over its cached tokens (PagedAttention, arXiv 2309.06180).

    q [B, H, hd]; k_pages, v_pages [pages, K, page_size, hd]; block_tables [B, max_pages] int32 (page of tokens 0..page_size-1, and so on; entries past
    the end are not read); lengths [B] int32, the current, already written token included. Length 0 gives zeros. Returns [B, H, hd].
    """
    return paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale)


def shared_prefix_attention(q, k_pages, v_pages, block_tables, lengths, prefix_lengths, group_ids, scale):
    """`paged_attention` where adjacent sequences of equal group_ids [B] share the pages of their first prefix_lengths [B] tokens (whole pages).

    Same result; on CUDA a group's prefix is read once for all its samples (Hydragen, arXiv 2402.05099) and merged with the rest by log-sum-exp.
    """
    return paged_attention_reference(q, k_pages, v_pages, block_tables, lengths, scale)
