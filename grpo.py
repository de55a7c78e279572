"""Advantages and on-policy losses, as small pure functions on tensors. Edit here for an ablation.

Every loss has the form  sum_t weight_t * token_loss_t  over all completion tokens of the step.
`token_weights` holds the denominator (counted over every micro-batch and rank of the step), the
token losses hold the rest. With one update per rollout the ratio is 1, so the losses differ only by
weights and advantages.

    rewards -> advantages
    batch -> policy_loss -> token_loss -> clipped_loss, gspo_loss or cispo_loss
"""

import torch

from kernels.advantage import group_statistics
from metrics import measure

ADVANTAGES = "grpo mean rloo batch pass@k trr++ reinforce++ reinforce++_baseline distill".split()
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


# ---- advantages ----


def advantages(rewards, group_ids, kind="grpo", lengths=None, k=1):
    """Advantage of every rollout, [N]; exactly 0 where all rewards of its group are equal.

    rewards: [N]; NaN where the sandbox could not judge: such a rollout counts nowhere and gets 0.
    group_ids: [N] int64. lengths: [N] token counts, for trr++ alone. k: for pass@k alone.

    Rewards 1 0 0 1 in one group:
    grpo 0.866 -0.866 -0.866 0.866; mean 0.5 -0.5 -0.5 0.5; rloo 0.667 -0.667 -0.667 0.667.
    trr++ of rewards 1 0 with 1 and 3 tokens: mean 0.25, variance 0.25 -> 1.5 -0.5.
    """
    weights = lengths if kind == "trr++" else None
    mean, std, size, no_signal = group_statistics(rewards, group_ids, weights)
    centered = rewards.nan_to_num() - mean

    if kind == "grpo":  # arXiv 2402.03300
        values = centered / (std + 1e-6)
    elif kind == "mean":  # Dr. GRPO, arXiv 2503.20783
        values = centered
    elif kind == "rloo":  # arXiv 2402.14740: r - mean of the others = G / (G - 1) (r - mean)
        values = centered * size / (size - 1).clamp(min=1e-30)
    elif kind == "batch":  # Lite-PPO, arXiv 2508.08221: the deviation of the whole batch
        batch_std = group_statistics(rewards, torch.zeros_like(group_ids))[1]
        values = centered / (batch_std + 1e-6)
    elif kind == "pass@k":  # rewards 0 and 1
        values = pass_at_k_advantages(rewards.nan_to_num(), mean, size, k)
    elif kind == "trr++":  # Absolute Zero, arXiv 2505.03335: statistics over a group's TOKENS
        values = centered * torch.rsqrt(std**2 + 1e-8)
    else:
        raise ValueError(f"unknown advantage {kind!r}: choose one of {', '.join(ADVANTAGES)}")
    return values.masked_fill(no_signal, 0.0)


def pass_at_k_advantages(rewards, mean, size, k):
    """Pass@k training (arXiv 2508.10751, the closed form): k samples are one try, paid when any is
    right. [N]: mean pay of the tries with this sample less that of all tries, over its deviation.

    Rewards 1 0 0 1, k 2: 5 of 6 pairs pass, deviation 0.373; all of a right one's, 2 of 3 of a
    wrong one's -> 0.447 -0.447 -0.447 0.447. k 1 is grpo with the population's deviation.
    """
    wrong = (size * (1 - mean)).round()
    passes = 1 - none_right(wrong, size, k)
    with_this = 1 - (1 - rewards) * none_right(wrong - 1, size - 1, k - 1)
    return (with_this - passes) / ((passes * (1 - passes)).sqrt() + 1e-6)


def none_right(wrong, size, k):
    """Chance that k of `size` samples (all, where there are fewer) are wrong ones: C(wrong, k) /
    C(size, k). 2 of 4, k 2 -> 1/6."""
    chance = torch.ones_like(size)
    for i in range(k):
        factor = (wrong - i).clamp(min=0) / (size - i).clamp(min=1)
        chance = torch.where(i < size, chance * factor, chance)
    return chance


def reinforce_advantages(rewards, group_ids, lengths, baseline=False, kl=None, kl_coef=0.0):
    """REINFORCE++ (arXiv 2501.03262): token t of rollout i has the return r_i - kl_coef * sum_{u >=
    t} k1_iu.

    Returns are whitened over ALL tokens of the step: (x - mean) / sqrt(var + 1e-8), sample variance
    (verl's; the 1e-8 keeps a KL that is only rounding, as at the first step, from becoming a
    signal).

    rewards, group_ids, lengths: [N]; a NaN reward is masked. kl: per rollout a list of its tokens'
    k1 = log pi_old - log pi_ref, or None.
    baseline: r_i less its group's mean first (REINFORCE++-baseline). Without a KL a group of equal
    rewards then stays at exactly 0, though whitening would move it.

    Returns one list per rollout with an advantage per token.
    Rewards 1 of 1 token and 0 of 3: mean 0.25, std 0.5 -> 1.5 and -0.5 three times. Rewards 0, 0 of
    2 and 1 tokens, k1 0.2 0.1 and -0.3, kl_coef 1: returns -0.3 -0.1 0.3 -> -0.873 -0.218 1.091.
    """
    rewards = rewards.double()
    judged = ~rewards.isnan()
    scope = group_ids if baseline else torch.zeros_like(group_ids)
    mean, _, _, no_signal = group_statistics(rewards, scope)
    values = rewards.nan_to_num()
    if baseline:
        values = values - mean

    # One return per token. The KL of a token counts for it and for all tokens before it.
    returns = torch.repeat_interleave(values, lengths)
    if kl is not None:
        to_the_end = []
        for row in kl:
            tail_first = torch.tensor(row, dtype=torch.float64).flip(0)
            to_the_end.append(tail_first.cumsum(0).flip(0))
        returns = returns - kl_coef * torch.cat(to_the_end).to(returns.device)

    counts = lengths.tolist()
    used = torch.repeat_interleave(judged, lengths)
    if used.sum() < 2:
        return [[0.0] * count for count in counts]
    whitened = (returns - returns[used].mean()) * torch.rsqrt(returns[used].var() + 1e-8)

    silent = ~used if kl is not None else torch.repeat_interleave(no_signal, lengths)
    return [row.tolist() for row in whitened.masked_fill(silent, 0.0).split(counts)]


def distill_advantages(logprobs, teacher_logprobs):
    """log q - log p of every token that the policy has drawn, p its own and q the teacher's.

    The gradient then is that of KL(p || q) (on-policy distillation, Thinking Machines 2025; GKD,
    arXiv 2306.13649). p 0.5, q 0.25 -> -0.693.
    """
    return [teacher - own for own, teacher in zip(logprobs, teacher_logprobs)]


# ---- the loss of one micro-batch ----


def token_weights(loss, lengths, max_tokens):
    """Weight of each sequence's tokens in the step's loss, from the lengths of ALL its sequences.

    lengths: completion lengths on all ranks. max_tokens: the longest allowed completion.

    grpo: 1 / (N |o_i|), mean over sequences of the mean over tokens. dapo, cispo: 1 / sum |o|, mean
    over tokens. dr_grpo: 1 / (N max_tokens), a constant. gspo: as grpo, its ratio is the
    sequence's.
    Lengths 2, 6: grpo 0.25, 0.0833; dapo 0.125, 0.125; dr_grpo with max_tokens 10: 0.05, 0.05.
    """
    count = len(lengths)
    if loss in ("grpo", "gspo"):
        return [1 / (count * length) for length in lengths]
    if loss in ("dapo", "cispo"):
        return [1 / sum(lengths)] * count
    if loss == "dr_grpo":
        return [1 / (count * max_tokens)] * count
    raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")


def policy_loss(model, batch, settings):
    """Loss of one micro-batch, its part of the step's mean, and sums for the log (`measure`).

    batch: batches.Batch, whose weights hold the denominator of the whole step.
    """
    logprobs, entropy = model(batch, settings.temperature)
    losses = token_loss(logprobs, entropy, batch, settings)
    loss = (batch.weights * losses).sum()
    where_clipped = clipped(logprobs, batch, settings)
    return loss, measure(loss, logprobs, entropy, where_clipped, batch, settings)


def token_loss(logprobs, entropy, batch, settings):
    """What each token adds to the loss before its weight, [N]."""
    old = batch.old_logprobs
    advantages = batch.advantages
    if settings.positive_weight != 1:  # arXiv 2506.01347: right answers at 0.1 keep variety
        advantages = torch.where(advantages > 0, settings.positive_weight * advantages, advantages)
    if settings.tis:  # every loss is linear in the advantage
        weights = importance_weights(old, batch.sampler_logprobs, settings.tis, settings.tis_mask)
        advantages = advantages * weights

    low, high = settings.clip_low, settings.clip_high
    if settings.loss == "gspo":
        loss = gspo_loss(logprobs, old, advantages, batch.sequence, batch.count, low, high)
    elif settings.loss == "cispo":
        loss = cispo_loss(logprobs, old, advantages, settings.cispo_cap)
    else:  # grpo, dr_grpo and dapo differ in their weights alone
        loss = clipped_loss(logprobs, old, advantages, low, high)

    if settings.kl_coef and not settings.advantage.startswith("reinforce"):  # there: in the reward
        loss = loss + settings.kl_coef * reference_kl(logprobs, old, batch.ref_logprobs)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    return loss


def clipped_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """PPO's clipped surrogate per token [N]: -min(rho A, clip(rho, 1 - low, 1 + high) A).

    GRPO, Dr. GRPO and, with clip_high 0.28, DAPO (arXiv 2503.14476).
    rho 1.5, A 1, high 0.28 -> -1.28; rho 1.5, A -1 -> 1.5; rho 0.5, A -1, low 0.2 -> 0.8.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def gspo_loss(logprobs, old_logprobs, advantages, sequence, count, clip_low, clip_high):
    """GSPO (arXiv 2507.18071): one clipped ratio per sequence, exp(mean_t log rho_t), [N].

    sequence: [N] int64, the token's sequence, one of `count`. The ratio's gradient is shared by the
    sequence's tokens. The paper: clip_low 3e-4, clip_high 4e-4.
    Log ratios 0.2 and 0 of a sequence's two tokens: ratio e^0.1 for both.
    """
    mean = sequence_mean(logprobs - old_logprobs, sequence, count)
    same = torch.zeros_like(old_logprobs)
    return clipped_loss(mean, same, advantages, clip_low, clip_high)


def sequence_mean(values, sequence, count):
    """The mean over a sequence's tokens at every one of them, [N]."""
    zeros = values.new_zeros(count)
    lengths = zeros.index_add(0, sequence, torch.ones_like(values))
    return (zeros.index_add(0, sequence, values) / lengths)[sequence]


def cispo_loss(logprobs, old_logprobs, advantages, cap):
    """CISPO (arXiv 2506.13585): -sg(min(rho, cap)) A log pi per token [N].

    No token loses its gradient to the cap. ScaleRL: 5.
    """
    ratio = torch.exp(logprobs - old_logprobs).detach()
    return -ratio.clamp(max=cap) * advantages * logprobs


def importance_weights(old_logprobs, sampler_logprobs, cap, mask=False):
    """Truncated importance sampling per token [N]: min(pi_old / pi_sampler, cap), a constant.

    pi_old is the trainer's probability before the update, so the weight undoes the sampler's other
    arithmetic (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", cap 2). mask: 0 beyond the cap (Li et al. 2025, "When speed kills stability").
    Probabilities 0.3 and 0.1 with cap 2 -> 2, with mask 0; 0.1 and 0.2 -> 0.5.
    """
    ratio = torch.exp(old_logprobs - sampler_logprobs).detach()
    return ratio.masked_fill(ratio > cap, 0.0) if mask else ratio.clamp(max=cap)


def reference_kl(logprobs, old_logprobs, ref_logprobs):
    """KL(policy || reference) per token [N], whose gradient is right: rho * k3.

    k3 = exp(-d) + d - 1 with d = log pi - log pi_ref. k3 alone as a loss has the gradient of
    another quantity; times the ratio to the sampling policy it is an unbiased estimate of the KL
    and of its gradient (DeepSeek-V3.2). pi 0.5, pi_ref 0.25, pi_old 0.5: d = 0.693, k3 = 0.193.
    """
    d = logprobs - ref_logprobs
    return torch.exp(logprobs - old_logprobs) * (torch.exp(-d) + d - 1)


@torch.no_grad()
def clipped(logprobs, batch, settings):
    """([N], [N]) bool: tokens whose ratio the loss clips at its lower, and at its upper bound.

    Ratio 1.5, A 1, high 0.28 -> upper; A -1 -> neither; cispo's cap 1.28 -> upper for both.
    """
    log_ratio = logprobs - batch.old_logprobs
    if settings.loss == "cispo":  # a cap of the weight, whatever the advantage
        capped = (log_ratio.exp() > settings.cispo_cap) & (batch.advantages != 0)
        return torch.zeros_like(capped), capped
    if settings.loss == "gspo":
        log_ratio = sequence_mean(log_ratio, batch.sequence, batch.count)
    ratio = log_ratio.exp()
    too_low = (ratio < 1 - settings.clip_low) & (batch.advantages < 0)
    return too_low, (ratio > 1 + settings.clip_high) & (batch.advantages > 0)
