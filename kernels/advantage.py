"""Advantages of groups of rollouts in one launch, and the clipped policy loss with everything one logs about it in one pass.

Both are a few kilobytes to a megabyte of arithmetic, so on CUDA the launch is the whole cost: in torch they are ten to forty launches and a host sync.
"""

from __future__ import annotations

import torch

from kernels import jit, tl, triton, use_triton, wide

KINDS = ("grpo", "mean", "rloo", "batch", "whiten")
# What `policy_loss` measures over the tokens of non-zero weight: sums, except the last, a maximum.
MOMENTS = (
    "tokens",
    "clip_low",
    "clip_high",
    "ratio",
    "difference",
    "k1",
    "k2",
    "k3",
    "entropy",
    "kl_reference",
    "max_difference",
)

# torch references


def _segments(group_ids):
    """(index of each row's group in 0..count-1, count)."""
    values, index = torch.unique(group_ids, return_inverse=True)
    return index, len(values)


def _mean(values, weights, index, count):
    """Weighted mean of each row's group and the group's total weight, both [N]."""
    total = weights.new_zeros(count).index_add_(0, index, weights)
    sums = values.new_zeros(count).index_add_(0, index, values * weights)
    return (sums / total.clamp(min=1e-30))[index], total[index]


def _all_equal(values, valid, index, count):
    """True where every valid reward of the row's group is the same number, by exact comparison."""
    low = values.new_full((count,), float("inf")).scatter_reduce_(
        0, index, values.masked_fill(~valid, float("inf")), "amin"
    )
    high = values.new_full((count,), float("-inf")).scatter_reduce_(
        0, index, values.masked_fill(~valid, float("-inf")), "amax"
    )
    return (low >= high)[index]


def group_advantages_reference(rewards, group_ids, kind="grpo", eps=1e-6, ddof=1, lengths=None):
    index, count = _segments(group_ids)
    valid = ~rewards.isnan()
    values = torch.where(valid, wide(rewards), 0.0)
    weights = valid.to(values.dtype) * (1 if lengths is None else lengths.to(values.dtype))
    mean, total = _mean(values, weights, index, count)
    centred = values - mean
    scope, scopes = (torch.zeros_like(index), 1) if kind == "batch" else (index, count)
    scope_mean, scope_total = _mean(values, weights, scope, scopes)
    variance = (
        _mean((values - scope_mean) ** 2, weights, scope, scopes)[0]
        * scope_total
        / (scope_total - ddof).clamp(min=1e-30)
    )
    if kind == "mean":
        advantages = centred
    elif kind == "rloo":
        advantages = centred * total / (total - 1).clamp(min=1e-30)
    elif kind == "whiten":
        advantages = centred * torch.rsqrt(variance + eps)
    else:
        advantages = centred / (variance.sqrt() + eps)
    return advantages.masked_fill(_all_equal(values, valid, index, count) | ~valid, 0.0)


def policy_loss_reference(
    logprobs, old_logprobs, advantages, weights, clip_low, clip_high, entropy, ref_logprobs, beta
):
    used = weights != 0
    # A token of weight 0 may carry anything, NaN too: it is replaced before any arithmetic, so that it cannot reach loss or gradient.
    log_ratio = torch.where(used, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    advantages = torch.where(used, advantages, 0.0)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    log_reference = (
        torch.where(used, ref_logprobs - logprobs, 0.0)
        if ref_logprobs is not None
        else torch.zeros_like(loss)
    )
    kl = log_reference.exp() - log_reference - 1
    total = (weights * (loss + beta * kl)).sum()
    with torch.no_grad():
        low = (ratio < 1 - clip_low) & (advantages < 0)
        high = (ratio > 1 + clip_high) & (advantages > 0)
        entropy = torch.where(used, entropy, 0.0) if entropy is not None else torch.zeros_like(loss)
        k3 = ratio - 1 - log_ratio
        columns = (
            used,
            low,
            high,
            torch.where(used, ratio, 0.0),
            log_ratio.abs(),
            -log_ratio,
            log_ratio**2 / 2,
            k3,
            entropy,
            kl,
        )
        sums = torch.stack([column.to(loss.dtype).sum() for column in columns])
        largest = log_ratio.abs().amax() if len(log_ratio) else sums.new_zeros(())
    return total, torch.cat((sums, largest[None]))


# Triton kernels


@jit
def _load_rewards(rewards, groups, lengths, at, N, WEIGHTED: tl.constexpr):
    """(rewards with 0 for NaN, group ids, weights with 0 for NaN or past the end)."""
    value = tl.load(rewards + at, mask=at < N, other=float("nan"))
    valid = value == value
    weight = valid.to(tl.float32)
    if WEIGHTED:
        weight = tl.where(valid, tl.load(lengths + at, mask=at < N, other=0).to(tl.float32), 0.0)
    return tl.where(valid, value, 0.0), tl.load(groups + at, mask=at < N, other=0), weight, valid


@jit
def _advantages_kernel(
    rewards,
    groups,
    lengths,
    out,
    N,
    EPS: tl.constexpr,
    DDOF: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rollouts against all N. Comparing group ids costs N^2 compares, nothing at these sizes, and needs neither offsets nor sorted ids."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    reward, group, _weight, row_valid = _load_rewards(rewards, groups, lengths, row, N, WEIGHTED)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    scope_total = tl.zeros((ROWS,), dtype=tl.float32)
    scope_sums = tl.zeros((ROWS,), dtype=tl.float32)
    low = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    high = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        value, other, weight, valid = _load_rewards(
            rewards, groups, lengths, start + tl.arange(0, BLOCK), N, WEIGHTED
        )
        same = (other[None, :] == group[:, None]) & valid[None, :]
        share = tl.where(same, weight[None, :], 0.0)
        total += tl.sum(share, 1)
        sums += tl.sum(share * value[None, :], 1)
        low = tl.minimum(low, tl.min(tl.where(same, value[None, :], float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(same, value[None, :], -float("inf")), 1))
        scope_total += tl.sum(weight, 0)
        scope_sums += tl.sum(weight * value, 0)
    mean = sums / tl.maximum(total, 1e-30)
    if KIND != "batch":
        scope_total, scope_sums = total, sums
    scope_mean = scope_sums / tl.maximum(scope_total, 1e-30)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        value, other, weight, valid = _load_rewards(
            rewards, groups, lengths, start + tl.arange(0, BLOCK), N, WEIGHTED
        )
        share = weight[None, :] + tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        if KIND != "batch":
            share = tl.where(other[None, :] == group[:, None], share, 0.0)
        distance = value[None, :] - scope_mean[:, None]
        squares += tl.sum(share * distance * distance, 1)
    variance = squares / tl.maximum(scope_total - DDOF, 1e-30)
    advantage = reward - mean
    if KIND == "rloo":
        advantage = advantage * total / tl.maximum(total - 1.0, 1e-30)
    elif KIND == "whiten":
        advantage = advantage * tl.rsqrt(variance + EPS)
    elif KIND != "mean":
        advantage = advantage / (tl.sqrt(variance) + EPS)
    tl.store(out + row, tl.where(row_valid & (low < high), advantage, 0.0), mask=row < N)


@jit
def _policy_loss_kernel(
    logprobs,
    old,
    advantages,
    weights,
    entropy,
    ref,
    coefficient,
    partial,
    T,
    clip_low,
    clip_high,
    beta,
    ENTROPY: tl.constexpr,
    REFERENCE: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of tokens: the loss, its derivative by each log-prob, and the block's moments, [programs, 1 + MOMENTS]."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    weight = tl.load(weights + token, mask=inside, other=0.0)
    used = weight != 0
    logp = tl.load(logprobs + token, mask=used, other=0.0)
    difference = logp - tl.load(old + token, mask=used, other=0.0)
    advantage = tl.load(advantages + token, mask=used, other=0.0)
    ratio = tl.exp(difference)
    surrogate = ratio * advantage
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * advantage
    loss = -tl.minimum(surrogate, clipped)
    slope = tl.where(surrogate <= clipped, -surrogate, 0.0)
    kl = tl.zeros((BLOCK,), dtype=tl.float32)
    if REFERENCE:
        to_reference = tl.load(ref + token, mask=used, other=0.0) - logp
        inverse = tl.exp(to_reference)
        kl = inverse - to_reference - 1.0
        loss += beta * kl
        slope += beta * (1.0 - inverse)
    tl.store(coefficient + token, weight * slope, mask=inside)
    at = partial + tl.program_id(0) * (1 + MOMENTS)
    tl.store(at, tl.sum(weight * loss, 0))
    tl.store(at + 1, tl.sum(used.to(tl.float32), 0))
    tl.store(at + 2, tl.sum(((ratio < 1.0 - clip_low) & (advantage < 0)).to(tl.float32), 0))
    tl.store(at + 3, tl.sum(((ratio > 1.0 + clip_high) & (advantage > 0)).to(tl.float32), 0))
    tl.store(at + 4, tl.sum(tl.where(used, ratio, 0.0), 0))
    tl.store(at + 5, tl.sum(tl.abs(difference), 0))
    tl.store(at + 6, -tl.sum(difference, 0))
    tl.store(at + 7, tl.sum(difference * difference * 0.5, 0))
    tl.store(at + 8, tl.sum(ratio - 1.0 - difference, 0))
    entropies = tl.zeros((BLOCK,), dtype=tl.float32)
    if ENTROPY:
        entropies = tl.load(entropy + token, mask=used, other=0.0)
    tl.store(at + 9, tl.sum(entropies, 0))
    tl.store(at + 10, tl.sum(kl, 0))
    tl.store(at + 11, tl.max(tl.abs(difference), 0))


@jit
def _sum_partials_kernel(
    partial, out, programs, MOMENTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the blocks in a fixed order; the last column is a maximum."""
    column = tl.arange(0, WIDTH)
    sums = tl.zeros((WIDTH,), dtype=tl.float32)
    largest = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, programs, BLOCK):
        block = start + tl.arange(0, BLOCK)[:, None]
        inside = (block < programs) & (column[None, :] < 1 + MOMENTS)
        part = tl.load(partial + block * (1 + MOMENTS) + column[None, :], mask=inside, other=0.0)
        sums += tl.sum(part, 0)
        largest = tl.maximum(largest, tl.max(part, 0))
    tl.store(out + column, tl.where(column == MOMENTS, largest, sums), mask=column < 1 + MOMENTS)


# Launchers

ROWS, BLOCK = (
    4,
    512,
)  # the table of ids is [4, 512] at a time: 16 values a thread; 512 rollouts are 128 programs of one round
TOKENS = 1024  # tokens per program of the loss


def _group_advantages(rewards, group_ids, kind, eps, ddof, lengths):
    rewards, out = (
        rewards.float().contiguous(),
        torch.empty(len(rewards), dtype=torch.float32, device=rewards.device),
    )
    shape = {
        "EPS": eps,
        "DDOF": ddof,
        "KIND": kind,
        "WEIGHTED": lengths is not None,
        "ROWS": ROWS,
        "BLOCK": BLOCK,
    }
    weights = rewards if lengths is None else lengths
    _advantages_kernel[(triton.cdiv(len(rewards), ROWS),)](
        rewards, group_ids, weights, out, len(rewards), **shape, num_warps=4
    )
    return out


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logprobs,
        old_logprobs,
        advantages,
        weights,
        clip_low,
        clip_high,
        entropy,
        ref_logprobs,
        beta,
    ):
        tokens, programs = len(logprobs), triton.cdiv(len(logprobs), TOKENS)
        coefficient = torch.empty_like(logprobs)
        partial = torch.empty(
            programs, 1 + len(MOMENTS), dtype=torch.float32, device=logprobs.device
        )
        out = torch.empty(1 + len(MOMENTS), dtype=torch.float32, device=logprobs.device)
        optional = [logprobs if x is None else x.contiguous() for x in (entropy, ref_logprobs)]
        tensors = (
            logprobs.contiguous(),
            old_logprobs.contiguous(),
            advantages.contiguous(),
            weights.contiguous(),
            *optional,
            coefficient,
            partial,
        )
        flags = {
            "ENTROPY": entropy is not None,
            "REFERENCE": ref_logprobs is not None,
            "MOMENTS": len(MOMENTS),
            "BLOCK": TOKENS,
        }
        _policy_loss_kernel[(programs,)](
            *tensors, tokens, clip_low, clip_high, beta, **flags, num_warps=4
        )
        _sum_partials_kernel[(1,)](
            partial, out, programs, MOMENTS=len(MOMENTS), WIDTH=16, BLOCK=64, num_warps=4
        )
        ctx.save_for_backward(coefficient)
        loss, moments = out[0].clone(), out[1:]
        ctx.mark_non_differentiable(moments)
        return loss, moments

    @staticmethod
    def backward(ctx, grad_loss, _moments):
        (coefficient,) = ctx.saved_tensors
        return coefficient * grad_loss, None, None, None, None, None, None, None, None


# Public functions


def group_advantages(rewards, group_ids, kind="grpo", eps=1e-6, ddof=1, lengths=None):
    """Advantage of every rollout against its group, [N] fp32, in one launch and without a host sync on CUDA.

    rewards [N] fp32, group_ids [N] int64 (equal = same group, groups of any size and order). A NaN reward is a masked rollout: left out of every
    statistic, advantage 0. A group whose rewards are all the same number (exact comparison), or that has one member, gives exactly 0. Of the group:
      grpo    (r - mean) / (std + eps)                       GRPO, arXiv 2402.03300; ddof 1 and eps 1e-6 as verl (TRL: 1e-4)
      mean    r - mean                                       Dr. GRPO, arXiv 2503.20783
      rloo    r - mean of the others = G/(G-1) (r - mean)    RLOO, arXiv 2402.14740
      batch   (r - mean) / (std of all rewards + eps)        Lite-PPO, arXiv 2508.08221; TRL's scale_rewards="batch"
      whiten  (r - mean) / sqrt(var + eps)                   REINFORCE++ (arXiv 2501.03262, one group), TRR++ (one group per (task, role))
    lengths [N] weighs each rollout by its token count, that is statistics over tokens (REINFORCE++, TRR++; eps 1e-8 there). ddof 0: population.
    Rewards 1, 0, 0, 0: mean .25, std .5 -> grpo 1.5, -.5 x 3; mean .75, -.25 x 3; rloo 1, -1/3 x 3.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown advantage kind {kind!r}: use one of {', '.join(KINDS)}")
    run = _group_advantages if use_triton(rewards) else group_advantages_reference
    return run(rewards, group_ids, kind, eps, ddof, lengths)


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    weights,
    clip_low=0.2,
    clip_high=0.2,
    entropy=None,
    ref_logprobs=None,
    beta=0.0,
):
    """(loss, moments): PPO's clipped loss over tokens, all inputs [T] fp32, and what to log about it, in one pass. Differentiable in logprobs.

    loss = sum_t weights_t (-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta k3(reference)), rho = exp(logprobs - old_logprobs),
    k3 = exp(d) - d - 1, d = ref_logprobs - logprobs (GRPO, arXiv 2402.03300; DAPO's clip-higher, 2503.14476). weights hold mask and normaliser: a
    token of weight 0 counts nowhere. moments [11]: see MOMENTS; k1, k2, k3 estimate KL(old || new). rho 1.5, A 1, clip_high .28, weight 1: loss -1.28.
    """
    run = _PolicyLoss.apply if use_triton(logprobs) else policy_loss_reference
    return run(
        logprobs,
        old_logprobs,
        advantages,
        weights,
        clip_low,
        clip_high,
        entropy,
        ref_logprobs,
        beta,
    )
