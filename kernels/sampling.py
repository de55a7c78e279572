"""Exact categorical sampling from the lm_head with the token's log-prob and the entropy, by tile masses and inverse CDF.

The vocabulary is cut into tiles of 128. Uniform u0 picks a tile by its probability mass, u1 a token inside it: P(tile) P(token | tile) = p(token).
u0 and u1 are a hash of (seed, request, sample, position) and nothing else, so a draw does not depend on batch, slot, order or machine.
"""

import torch
from torch.nn import functional as F

TILE = 128  # 151,936 = 1187 * 128: no tile of Qwen2.5 is ragged. Part of the definition of the draw: changing it changes every sample.
_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's constants as signed 64-bit


def _mix(x):
    """splitmix64's finaliser (Steele et al. 2014) on int64, where the shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniforms_reference(seeds, requests, samples, positions):
    """Two independent fp32 uniforms in (0, 1) per row, [B, 2], from four int64 [B]."""
    state = torch.zeros_like(seeds)
    for key in (seeds, requests, samples, positions):
        state = _mix(state + _GOLDEN + key)
    bits = torch.stack(((state >> 40) & 0xFFFFFF, (state >> 8) & 0xFFFFFF), dim=1)
    return (bits.float() + 0.5) * 2.0**-24


def _draw(logits, uniforms):
    """Token [B] drawn from softmax(logits [B, V]) with uniforms [B, 2], and the log-sum-exp [B]."""
    rows = torch.arange(len(logits), device=logits.device)
    padded = F.pad(logits, (0, -logits.shape[1] % TILE), value=float("-inf"))
    tiles = padded.view(len(logits), -1, TILE)
    top = logits.amax(-1)
    masses = (tiles - top[:, None, None]).exp_().sum(-1)
    cumulative = masses.cumsum(-1)
    tile = _first_above(cumulative, uniforms[:, :1] * cumulative[:, -1:], masses)
    weights = (tiles[rows, tile] - top[:, None]).exp_()
    inside = weights.cumsum(-1)
    token = tile * TILE + _first_above(inside, uniforms[:, 1:] * inside[:, -1:], weights)
    return token, top + cumulative[:, -1].log()


def _first_above(cumulative, threshold, masses):
    """First index whose cumulative mass exceeds the threshold, never one of mass 0 (rounding may put the threshold at the very end)."""
    last = masses.shape[1] - 1 - (masses > 0).flip(1).to(torch.int8).argmax(1)
    return torch.minimum((cumulative <= threshold).sum(1), last)


def _sample(logits, temperature, uniforms):
    greedy = temperature <= 0
    logits = logits / torch.where(greedy, 1.0, temperature)[:, None]
    token, lse = _draw(logits, uniforms)
    token = torch.where(greedy, logits.argmax(-1), token)
    logp = logits - lse[:, None]
    entropy = -torch.linalg.vecdot(logp.exp(), logp.clamp(min=torch.finfo(logp.dtype).min))
    return token, logp.gather(1, token[:, None]).squeeze(1), entropy


def sample_tokens_reference(hidden, weight, temperature, seeds, requests, samples, positions):
    wide = (lambda x: x if x.dtype == torch.float64 else x.float())
    return _sample(wide(hidden) @ wide(weight).T, temperature, uniforms_reference(seeds, requests, samples, positions))


def sample_tokens(hidden, weight, temperature, seeds, requests, samples, positions):
    """Draw one token per row from softmax(hidden @ weight.T / temperature): (tokens [B] int64, logprobs [B] fp32, entropy [B] fp32).

    hidden [B, D], weight [V, D], temperature [B] fp32 (0 = greedy: the first maximum, log-prob and entropy of the untempered distribution), and the
    draw's key: seeds, requests, samples, positions [B] int64. No logits reach memory on CUDA.
    """
    return sample_tokens_reference(hidden, weight, temperature, seeds, requests, samples, positions)


def _truncate(logits, top_p, top_k):
    """-inf outside the top_k largest (0 = all) and then outside the smallest set of mass >= top_p of what is left."""
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill((top_k[:, None] > 0) & (rank >= top_k[:, None]), float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (rank > 0), float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


def sample_logits(logits, temperature, seeds, requests, samples, positions, top_p, top_k):
    """`sample_tokens` from given logits [B, V] with nucleus (top_p [B], 1 = all) and top-k (top_k [B] int64, 0 = all) truncation, for evaluation.

    The log-prob and entropy are those of the truncated, renormalised, tempered distribution (greedy rows: of the untempered, untruncated one).
    """
    greedy = (temperature <= 0)[:, None]
    tempered = logits.float() / torch.where(greedy, 1.0, temperature[:, None])
    kept = torch.where(greedy, tempered, _truncate(tempered, top_p, top_k))
    token, logp, entropy = _sample(kept, torch.where(greedy[:, 0], 0.0, 1.0), uniforms_reference(seeds, requests, samples, positions))
    return token, logp, entropy
