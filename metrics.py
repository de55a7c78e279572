"""What a step reports, under TRL's metric names where one exists (README: how to read the dashboard)."""

import torch

from runtime import distributed
from tasks.verdicts import shares


def loss_metrics(collected, on_policy):
    """(loss, (sums, largest gap)) of the micro-batches of all updates, and of those before the first update -> loss, clip
    fractions, and how far the trainer's log-probs are from the sampler's while both have the same weights, over all ranks."""
    everyone, first = distributed.gather(collected), distributed.gather(on_policy)
    if not everyone:
        return {"loss": 0.0}
    total = lambda rows, key: sum(sums[key] for _, (sums, _) in rows)
    mean = lambda rows, key: total(rows, key) / total(rows, "tokens")
    found = {
        "loss": sum(loss for loss, _ in everyone),
        "clip_ratio/low_mean": mean(everyone, "clip_low"),
        "clip_ratio/high_mean": mean(everyone, "clip_high"),
        "num_train_tokens": float(
            total(everyone, "computed")
        ),  # through the model in the update, shared prompts once
        "policy/entropy": mean(
            everyone, "entropy"
        ),  # of the whole distribution, where the loss was computed
        **{
            f"kl/{k}": mean(everyone, f"ref_{k}")
            for k in ("k1", "k2", "k3")
            if f"ref_{k}" in everyone[0][1][0]
        },
    }
    if first:  # none when the first update had no rollout with signal, GEPO's groups alone
        found |= {
            "sampling/sampling_logp_difference/mean": mean(first, "difference"),
            "sampling/sampling_logp_difference/max": max(gap for _, (_, gap) in first),
            "sampling/importance_sampling_ratio/mean": mean(first, "ratio"),
            "sampling/k3_kl": mean(first, "k3"),
        }
    return found


def rollout_metrics(pairs, samples, stop_ids):
    """pairs: (Completion, Verdict) of every sample of every rank, groups of `samples` together -> rewards and their components,
    groups without signal, lengths, entropy, how programs ended and the shares that show reward hacking (rewards.shares)."""
    rewards = torch.tensor([v.reward for _, v in pairs])
    judged = rewards[~rewards.isnan()]
    groups = rewards.view(-1, samples)
    lengths = torch.tensor([float(len(c.tokens)) for c, _ in pairs])
    solved = torch.tensor([v.correct for _, v in pairs])
    metrics = {
        "reward": float(judged.mean()),
        "reward_std": float(judged.std()),
        "frac_reward_zero_std": float((groups == groups[:, :1]).all(1).float().mean()),
        "pass_rate": float(solved.float().mean()),
        "entropy": sum(-sum(c.logprobs) for c, _ in pairs)
        / float(lengths.sum()),  # -log p of sampled tokens: unbiased
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": sum(c.tokens[-1] not in stop_ids for c, _ in pairs)
        / len(pairs),
        "completions/length_solved": float(lengths[solved].mean()),
        "completions/length_unsolved": float(lengths[~solved].mean()),
        "num_tokens": float(lengths.sum()),
    }
    for name in pairs[0][1].components:
        values = torch.tensor([v.components[name] for _, v in pairs])
        metrics[f"rewards/{name}/mean"] = float(values.nanmean())
        metrics[f"rewards/{name}/std"] = float(values[~values.isnan()].std())
    return {**metrics, **shares([v for _, v in pairs])}


def progress(step, steps, metrics, times):
    """The line a person reads."""
    if "buffer/deduction" in metrics:  # self-play
        stored = sum(metrics[f"buffer/{task}"] for task in ("deduction", "abduction", "induction"))
        played = f"valid {metrics['propose/valid_frac']:.2f}  solved {metrics['solve/accuracy']:.2f}  stored {stored:.0f}  "
    else:
        played = f"pass {metrics['pass_rate']:.3f}  "
    return (
        f"step {step}/{steps}  reward {metrics['reward']:.3f}  {played}length {metrics['completions/mean_length']:.0f}  "
        f"no-signal {metrics['frac_reward_zero_std']:.2f}  entropy {metrics['entropy']:.3f}  grad {metrics['grad_norm']:.2f}  |  "
        f"sample {times['time/generate']:.1f}s  reward +{times['time/reward']:.1f}s  update {times['time/update']:.1f}s"
    )
