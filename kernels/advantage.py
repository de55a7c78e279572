"""Statistics of groups of rewards, which every advantage of grpo.py is made of, in one launch.

The arithmetic is a few kilobytes, so on a GPU the launch is the whole cost: in torch it is some
twenty launches.
"""

from __future__ import annotations

import torch

from kernels import jit, tl, triton, use_triton, wide

# The table of ids is [4, 512] at a time: 16 values a thread; 512 rollouts are 128 programs of one
# round.
ROWS = 4
BLOCK = 512


def group_statistics(rewards, group_ids, weights=None):
    """Mean, standard deviation and size of every rollout's group, and whether it has no signal.

    rewards: [N] fp32; NaN where the sandbox could not judge: such a rollout counts nowhere.
    group_ids: [N] int64; equal numbers are one group, of any size and order.
    weights: [N], what each rollout counts for (its token count for statistics over tokens).

    Returns mean, std (sample standard deviation), size (sum of the weights), each [N] fp32, and
    no_signal [N] bool: the rollout was not judged, or all judged rewards of its group are the same
    number, by exact comparison. One launch and no wait for the host on a GPU.
    Rewards 1, 0, 0, 0: mean 0.25, std 0.5, size 4, no_signal False. 0.1, 0.1, 0.1: no_signal True.
    """
    if use_triton(rewards):
        return _group_statistics(rewards, group_ids, weights)
    return group_statistics_reference(rewards, group_ids, weights)


# ---- torch reference ----


def group_statistics_reference(rewards, group_ids, weights=None):
    groups, index = torch.unique(group_ids, return_inverse=True)
    judged = ~rewards.isnan()
    values = torch.where(judged, wide(rewards), 0.0)
    share = judged.to(values.dtype)
    if weights is not None:
        share = share * weights.to(values.dtype)

    def total(x):
        """Sum over each row's group, [N]."""
        return values.new_zeros(len(groups)).index_add_(0, index, x)[index]

    size = total(share)
    mean = total(values * share) / size.clamp(min=1e-30)
    squares = total((values - mean) ** 2 * share) / size.clamp(min=1e-30)
    variance = squares * size / (size - 1).clamp(min=1e-30)

    # Compared as they are: three rewards of 0.1 have a mean that is not 0.1.
    infinity = float("inf")
    low = values.new_full((len(groups),), infinity)
    high = values.new_full((len(groups),), -infinity)
    low.scatter_reduce_(0, index, values.masked_fill(~judged, infinity), "amin")
    high.scatter_reduce_(0, index, values.masked_fill(~judged, -infinity), "amax")
    no_signal = (low >= high)[index] | ~judged
    return mean, variance.sqrt(), size, no_signal


# ---- Triton ----


def _group_statistics(rewards, group_ids, weights):
    rewards = rewards.float().contiguous()
    count = len(rewards)
    mean, std, size = torch.empty(3, count, dtype=torch.float32, device=rewards.device)
    no_signal = torch.empty(count, dtype=torch.bool, device=rewards.device)
    _group_statistics_kernel[(triton.cdiv(count, ROWS),)](
        rewards,
        group_ids,
        rewards if weights is None else weights,
        mean,
        std,
        size,
        no_signal,
        count,
        WEIGHTED=weights is not None,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return mean, std, size, no_signal


@jit
def _load_rewards(rewards, groups, weights, at, N, WEIGHTED: tl.constexpr):
    """Rewards (0 where not judged), group ids, weights (0 where not judged or past the end),
    judged."""
    value = tl.load(rewards + at, mask=at < N, other=float("nan"))
    group = tl.load(groups + at, mask=at < N, other=0)
    judged = value == value
    weight = judged.to(tl.float32)
    if WEIGHTED:
        given = tl.load(weights + at, mask=at < N, other=0).to(tl.float32)
        weight = tl.where(judged, given, 0.0)
    return tl.where(judged, value, 0.0), group, weight, judged


@jit
def _group_statistics_kernel(
    rewards,
    groups,
    weights,
    mean_out,
    std_out,
    size_out,
    no_signal_out,
    N,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rollouts against all N.

    Comparing group ids is N^2 compares, nothing at these sizes, and needs no sorted ids.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, group, _, row_judged = _load_rewards(rewards, groups, weights, row, N, WEIGHTED)

    # First pass: size, mean, smallest and largest reward of each row's group.
    size = tl.zeros((ROWS,), dtype=tl.float32)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    low = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    high = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, other, weight, judged = _load_rewards(rewards, groups, weights, at, N, WEIGHTED)
        same = (other[None, :] == group[:, None]) & judged[None, :]
        share = tl.where(same, weight[None, :], 0.0)
        size += tl.sum(share, 1)
        sums += tl.sum(share * value[None, :], 1)
        low = tl.minimum(low, tl.min(tl.where(same, value[None, :], float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(same, value[None, :], -float("inf")), 1))
    mean = sums / tl.maximum(size, 1e-30)

    # Second pass: squared distances from the mean.
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, other, weight, judged = _load_rewards(rewards, groups, weights, at, N, WEIGHTED)
        share = tl.where(other[None, :] == group[:, None], weight[None, :], 0.0)
        distance = value[None, :] - mean[:, None]
        squares += tl.sum(share * distance * distance, 1)
    variance = squares / tl.maximum(size - 1, 1e-30)

    inside = row < N
    tl.store(mean_out + row, mean, mask=inside)
    tl.store(std_out + row, tl.sqrt(variance), mask=inside)
    tl.store(size_out + row, size, mask=inside)
    tl.store(no_signal_out + row, (low >= high) | (row_judged == 0), mask=inside)
