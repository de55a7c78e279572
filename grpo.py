"""Advantages and on-policy losses, as small pure functions on tensors. Edit a loss here for an ablation.

Every loss has the form  sum_t weight_t * token_loss_t  over all completion tokens of the step. `token_weights` holds the
denominator (counted over every micro-batch and rank of the step), the token losses hold the rest. With one update per
rollout the ratio is 1, so the losses differ only by weights and advantages (methods.md section 4).
"""

import torch

from kernels.advantage import group_advantages


def advantages(rewards, group_ids, kind="grpo"):
    """rewards [N] (nan = the sandbox could not judge: masked), group_ids [N] sorted -> advantages [N]; exactly 0 where all
    rewards of a group are equal, and for masked rewards.

    grpo (2402.03300): (r - mean) / (std + 1e-6), sample std      rewards 1 0 0 1 -> 0.866 -0.866 -0.866 0.866
    mean (Dr. GRPO, 2503.20783): r - mean                         rewards 1 0 0 1 -> 0.5 -0.5 -0.5 0.5
    rloo (2402.14740): r - mean of the others = G/(G-1) (r-mean)  rewards 1 0 0 1 -> 0.667 -0.667 -0.667 0.667
    batch (Lite-PPO, 2508.08221): (r - group mean) / std of the batch
    """
    return group_advantages(rewards, group_ids, kind=kind)


def token_weights(loss, lengths, max_tokens):
    """lengths: completion lengths of ALL sequences of the step, on all ranks -> the weight of each one's tokens.

    grpo: 1 / (N |o_i|), mean over sequences of the mean over tokens. dapo, cispo: 1 / sum |o|, mean over tokens.
    dr_grpo: 1 / (N max_tokens), a constant. gspo: as grpo, since its ratio is one per sequence.
    Lengths [2, 6]: grpo 0.25, 0.0833; dapo 0.125, 0.125; dr_grpo with max_tokens 10: 0.05, 0.05.
    """
    count, total = len(lengths), sum(lengths)
    if loss in ("grpo", "gspo"):
        return [1 / (count * n) for n in lengths]
    if loss in ("dapo", "cispo"):
        return [1 / total] * count
    if loss == "dr_grpo":
        return [1 / (count * max_tokens)] * count
    raise ValueError(f"unknown loss {loss!r}: choose grpo, dr_grpo, dapo, gspo or cispo")


def clipped_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """PPO's clipped surrogate, -min(rho A, clip(rho, 1-low, 1+high) A), per token [N]. GRPO, Dr. GRPO, DAPO (2503.14476: high 0.28).

    rho 1.5, A 1, high 0.28 -> -1.28; rho 1.5, A -1 -> 1.5; rho 0.5, A -1, low 0.2 -> 0.8.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def gspo_loss(logprobs, old_logprobs, advantages, sequence, clip_low, clip_high):
    """GSPO (2507.18071): one ratio per sequence, exp(mean_t log rho_t), clipped; its gradient is shared by the tokens.

    sequence [N]: number of the sequence of each token. Paper: clip_low 3e-4, clip_high 4e-4.
    """
    log_ratio = logprobs - old_logprobs
    count = int(sequence.max()) + 1 if sequence.numel() else 0
    lengths = torch.zeros(count, device=logprobs.device, dtype=logprobs.dtype).index_add(0, sequence, torch.ones_like(log_ratio))
    mean = torch.zeros_like(lengths).index_add(0, sequence, log_ratio) / lengths
    return clipped_loss(mean[sequence], torch.zeros_like(old_logprobs), advantages, clip_low, clip_high)


def cispo_loss(logprobs, old_logprobs, advantages, clip_high):
    """CISPO (2506.13585): -sg(min(rho, clip_high)) A log pi, per token. No token loses its gradient to the clip. ScaleRL: clip_high 5."""
    weight = torch.exp(logprobs - old_logprobs).detach().clamp(max=clip_high)
    return -weight * advantages * logprobs


def policy_loss(loss, logprobs, batch, clip_low, clip_high, rows=slice(None)):
    """Per-token loss of the tokens `rows` (default all) of a packed batch (batches.Batch); the step's loss is (batch.weights * this).sum().

    train.py calls it once per chunk of tokens, inside the fused kernel, but for gspo, whose ratio needs whole sequences.
    """
    old, advantages = batch.old_logprobs[rows], batch.advantages[rows]
    if loss == "gspo":
        return gspo_loss(logprobs, old, advantages, batch.sequence[rows], clip_low, clip_high)
    if loss == "cispo":
        return cispo_loss(logprobs, old, advantages, clip_high)
    return clipped_loss(logprobs, old, advantages, clip_low, clip_high)


def mismatch(logprobs, old_logprobs):
    """Sums over tokens that show how far the sampler is from the trainer: |difference|, k1, k3 and the ratio, plus the largest
    difference. k3 = rho - 1 - log rho >= 0 is an unbiased estimate of KL(old || new) under old's samples."""
    log_ratio = (logprobs - old_logprobs).detach()
    ratio = log_ratio.exp()
    return {
        "difference": log_ratio.abs().sum(),
        "k1": -log_ratio.sum(),
        "k3": (ratio - 1 - log_ratio).sum(),
        "ratio": ratio.sum(),
    }, log_ratio.abs().max()


def clip_fractions(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """How many tokens the clip silences, (below, above), as sums."""
    ratio = torch.exp(logprobs - old_logprobs).detach()
    return ((ratio < 1 - clip_low) & (advantages < 0)).sum(), ((ratio > 1 + clip_high) & (advantages > 0)).sum()
