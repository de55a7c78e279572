"""Advantages and on-policy losses, as small pure functions on tensors. Edit a loss here for an ablation.

Every loss has the form  sum_t weight_t * token_loss_t  over all completion tokens of the step. `token_weights` holds the
denominator (counted over every micro-batch and rank of the step), the token losses hold the rest. With one update per
rollout the ratio is 1, so the losses differ only by weights and advantages (methods.md section 4).
"""

import torch

from kernels.advantage import MOMENTS, group_advantages
from kernels.advantage import policy_loss as clipped_loss_and_moments


def advantages(rewards, group_ids, kind="grpo", lengths=None):
    """rewards [N] (nan = the sandbox could not judge: masked), group_ids [N] sorted -> advantages [N]; exactly 0 where all
    rewards of a group are equal, and for masked rewards.

    grpo (2402.03300): (r - mean) / (std + 1e-6), sample std      rewards 1 0 0 1 -> 0.866 -0.866 -0.866 0.866
    mean (Dr. GRPO, 2503.20783): r - mean                         rewards 1 0 0 1 -> 0.5 -0.5 -0.5 0.5
    rloo (2402.14740): r - mean of the others = G/(G-1) (r-mean)  rewards 1 0 0 1 -> 0.667 -0.667 -0.667 0.667
    batch (Lite-PPO, 2508.08221): (r - group mean) / std of the batch
    trr++ (Absolute Zero, 2505.03335): (r - mean) / sqrt(var + 1e-8) over the TOKENS of a group, one group per (task, role); lengths [N] are
          the completions' token counts                           rewards 1 0 of 1 and 3 tokens: mean 0.25, var 0.25 -> 1.5 -0.5
    """
    if kind == "trr++":
        return group_advantages(rewards, group_ids, kind="whiten", eps=1e-8, lengths=lengths)
    return group_advantages(rewards, group_ids, kind=kind)


def check_advantage(kind):
    """ValueError with a sentence for an unknown --advantage."""
    if kind not in ("reinforce++", "reinforce++_baseline"):
        advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), kind)


def reinforce_advantages(rewards, lengths, group_ids, baseline=False, kl=None, coef=0.0):
    """REINFORCE++ (2501.03262): token t of sample i has the return r_i - coef * sum_{u >= t} k1_iu, whitened over ALL tokens of the step.

    rewards (nan: masked), lengths, group_ids: one per sample; kl: per sample its tokens' k1 = log pi_old - log pi_ref, or None -> per sample a
    list with one advantage per token. baseline: r_i less its group's mean first (REINFORCE++-baseline; several samples per prompt); without
    a KL a group of equal rewards then stays at exactly 0, though whitening would move it. (x - mean) / sqrt(var + 1e-8), sample variance
    over tokens (verl's; the 1e-8 keeps a KL that is only rounding, as at the first step, from being blown up to a signal).
    Rewards 1 of 1 token and 0 of 3: mean 0.25, std 0.5 -> 1.5 and -0.5 three times. Rewards 0, 0 of 2 and 1 tokens, k1 0.2 0.1 and -0.3, coef 1:
    returns -0.3 -0.1 0.3, mean -0.033, std 0.306 -> -0.873 -0.218 1.091.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    index = torch.unique(torch.as_tensor(group_ids), return_inverse=True)[1]
    judged = ~rewards.isnan()
    flat = _equal_groups(rewards, judged, index if baseline else torch.zeros_like(index))
    values = rewards.masked_fill(~judged, 0.0)
    if baseline:
        count = torch.bincount(index[judged], minlength=int(index.max()) + 1).clamp(min=1)
        values = (
            values
            - (torch.zeros(len(count), dtype=values.dtype).index_add_(0, index, values) / count)[
                index
            ]
        )
    lengths = torch.as_tensor(lengths)
    returns = torch.repeat_interleave(values, lengths)
    if kl is not None:
        returns = returns - coef * torch.cat(
            [torch.tensor(row, dtype=torch.float64).flip(0).cumsum(0).flip(0) for row in kl]
        )
    used = torch.repeat_interleave(judged, lengths)
    if used.sum() < 2:
        return [[0.0] * n for n in lengths.tolist()]
    whitened = (returns - returns[used].mean()) * torch.rsqrt(returns[used].var() + 1e-8)
    zero = ~used if kl is not None else ~used | torch.repeat_interleave(flat, lengths)
    return [row.tolist() for row in whitened.masked_fill(zero, 0.0).split(lengths.tolist())]


def _equal_groups(rewards, judged, index):
    """True where every judged reward of the sample's group is the same number, by exact comparison."""
    count = int(index.max()) + 1
    low = torch.full((count,), float("inf"), dtype=rewards.dtype).scatter_reduce_(
        0, index, rewards.masked_fill(~judged, float("inf")), "amin"
    )
    high = torch.full((count,), float("-inf"), dtype=rewards.dtype).scatter_reduce_(
        0, index, rewards.masked_fill(~judged, float("-inf")), "amax"
    )
    return (low >= high)[index]


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
    lengths = torch.zeros(count, device=logprobs.device, dtype=logprobs.dtype).index_add(
        0, sequence, torch.ones_like(log_ratio)
    )
    mean = torch.zeros_like(lengths).index_add(0, sequence, log_ratio) / lengths
    return clipped_loss(
        mean[sequence], torch.zeros_like(old_logprobs), advantages, clip_low, clip_high
    )


def cispo_loss(logprobs, old_logprobs, advantages, clip_high):
    """CISPO (2506.13585): -sg(min(rho, clip_high)) A log pi, per token. No token loses its gradient to the clip. ScaleRL: clip_high 5."""
    weight = torch.exp(logprobs - old_logprobs).detach().clamp(max=clip_high)
    return -weight * advantages * logprobs


def importance_weights(old_logprobs, sampler_logprobs, cap):
    """Truncated importance sampling: min(pi_old / pi_sampler, cap) per token [N], a constant for the gradient. pi_old is the trainer's
    probability before the update, so the weight undoes the sampler's other arithmetic (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training", cap 2). Probabilities 0.3 and 0.1 with cap 2 -> 2; 0.1 and 0.2 -> 0.5.
    """
    return torch.exp(old_logprobs - sampler_logprobs).clamp(max=cap).detach()


def policy_loss(loss, logprobs, batch, clip_low, clip_high, rows=slice(None), tis=0.0):
    """Per-token loss of the tokens `rows` (default all) of a packed batch (batches.Batch); the step's loss is (batch.weights * this).sum().

    train.py calls it once per chunk of tokens, inside the fused kernel, but for gspo, whose ratio needs whole sequences.
    """
    old, advantages = batch.old_logprobs[rows], batch.advantages[rows]
    if tis > 0:  # every loss is linear in the advantage
        advantages = advantages * importance_weights(old, batch.sampler_logprobs[rows], tis)
    if loss == "gspo":
        return gspo_loss(logprobs, old, advantages, batch.sequence[rows], clip_low, clip_high)
    if loss == "cispo":
        return cispo_loss(logprobs, old, advantages, clip_high)
    return clipped_loss(logprobs, old, advantages, clip_low, clip_high)


def reference_kl(logprobs, old_logprobs, ref_logprobs):
    """Per-token KL(policy || reference) whose gradient is right, [N]: rho * k3, with k3 = exp(-d) + d - 1, d = log pi - log pi_ref.

    k3 alone as a loss has the gradient of another quantity; times the ratio to the sampling policy it is an unbiased estimate of the
    KL and of its gradient (DeepSeek-V3.2; methods.md section 4). pi 0.5, pi_ref 0.25, pi_old 0.5: d = 0.693, k3 = 0.193.
    """
    d = logprobs - ref_logprobs
    return torch.exp(logprobs - old_logprobs) * (torch.exp(-d) + d - 1)


def token_loss(s, logprobs, entropy, batch, rows=slice(None)):
    """What one token adds to the loss before its weight: the policy loss, the KL to the reference, the entropy bonus (settings s)."""
    loss = policy_loss(s.loss, logprobs, batch, s.clip_low, s.clip_high, rows, s.tis)
    if s.kl_coef and not s.advantage.startswith("reinforce"):  # REINFORCE++ has it in the reward
        loss = loss + s.kl_coef * reference_kl(
            logprobs, batch.old_logprobs[rows], batch.ref_logprobs[rows]
        )
    return loss - s.entropy_coef * entropy if s.entropy_coef else loss


def measure(s, logprobs, entropy, batch):
    """Sums over the tokens of a micro-batch for the log (kernels.advantage.MOMENTS), one launch each -> (sums, largest |log ratio|).

    ratio, k1, k2, k3 of log-probs against the sampler's estimate their mismatch; ref_k1, ref_k2, ref_k3 the KL to the reference.
    """
    _, moments = clipped_loss_and_moments(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.weights,
        s.clip_low,
        s.clip_high,
        entropy,
    )
    *sums, largest = moments.tolist()
    named = dict(zip(MOMENTS, sums))
    if (
        s.old_logprobs == "trainer"
    ):  # clipping is told from the trainer's old log-probs, the mismatch from the sampler's
        _, moments = clipped_loss_and_moments(
            logprobs, batch.sampler_logprobs, batch.advantages, batch.weights
        )
        *sums, largest = moments.tolist()
        named.update(
            {
                name: value
                for name, value in zip(MOMENTS, sums)
                if name in ("ratio", "difference", "k1", "k2", "k3")
            }
        )
    if s.kl_coef:
        _, moments = clipped_loss_and_moments(
            batch.ref_logprobs, logprobs, batch.advantages, batch.weights
        )
        named.update(
            {
                f"ref_{name}": value
                for name, value in zip(MOMENTS, moments.tolist())
                if name in ("k1", "k2", "k3")
            }
        )
    return named, largest
