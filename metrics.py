"""What a step reports, under TRL's metric names where one exists (README: how to read the dashboard)."""

import torch

import distributed


def loss_metrics(collected):
    """Sums of all micro-batches and ranks -> loss, clip fractions and the sampler-trainer gap, in TRL's names."""
    everyone = distributed.gather(collected)
    if not everyone:
        return {"loss": 0.0}
    total = {k: sum(sums[k] for _, (sums, _) in everyone) for k in everyone[0][1][0]}
    per_token = {k: v / total["tokens"] for k, v in total.items()}
    return {
        "loss": sum(loss for loss, _ in everyone),
        "clip_ratio/low_mean": per_token["clip_low"],
        "clip_ratio/high_mean": per_token["clip_high"],
        "sampling/sampling_logp_difference/mean": per_token["difference"],
        "sampling/sampling_logp_difference/max": max(gap for _, (_, gap) in everyone),
        "sampling/importance_sampling_ratio/mean": per_token["ratio"],
        "sampling/k3_kl": per_token["k3"],
    }


def rollout_metrics(completions, verdicts, stop_ids):
    """What the samples look like, over all ranks: rewards and their components, groups without variance, lengths, entropy."""
    pairs = [(c, v) for cs, vs in zip(completions, verdicts) for c, v in zip(cs, vs)]
    rows = distributed.gather(
        [(v.reward, v.correct, v.status, v.components, len(c.tokens), -sum(c.logprobs), c.tokens[-1] in stop_ids) for c, v in pairs]
    )
    rewards = torch.tensor([r[0] for r in rows])
    judged = rewards[~rewards.isnan()]
    groups = rewards.view(-1, len(completions[0]))
    flat = (groups == groups[:, :1]).all(1).float()
    lengths = [r[4] for r in rows]
    metrics = {
        "reward": float(judged.mean()) if len(judged) else float("nan"),
        "reward_std": float(judged.std()) if len(judged) > 1 else 0.0,
        "frac_reward_zero_std": float(flat.mean()),
        "pass_rate": sum(r[1] for r in rows) / len(rows),
        "entropy": sum(r[5] for r in rows) / sum(lengths),  # -log p of sampled tokens: unbiased
        "completions/mean_length": sum(lengths) / len(rows),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(not r[6] for r in rows) / len(rows),
        "num_tokens": sum(lengths),
    }
    for name, wanted in (("solved", True), ("unsolved", False)):
        chosen = [r[4] for r in rows if r[1] == wanted]
        metrics[f"completions/length_{name}"] = sum(chosen) / len(chosen) if chosen else float("nan")
    for name in sorted({k for r in rows for k in r[3]}):
        values = torch.tensor([r[3][name] for r in rows if name in r[3]])
        metrics[f"rewards/{name}/mean"] = float(values.mean())
        metrics[f"rewards/{name}/std"] = float(values.std()) if len(values) > 1 else 0.0
    for status in sorted({r[2] for r in rows}):
        metrics[f"sandbox/{status}_frac"] = sum(r[2] == status for r in rows) / len(rows)
    return metrics
