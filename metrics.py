"""What a step reports, under TRL's metric names where one exists (docs/dashboard.md: how to read
them)."""

import math
from statistics import fmean, stdev

import torch

from runtime import distributed, machine
from tasks.statistics import interval
from tasks.verdicts import shares


@torch.no_grad()
def measure(loss, logprobs, entropy, clipped, batch, settings):
    """{name: 0-dim tensor} of a micro-batch: sums over its tokens, and the largest gap.

    clipped: (lower, upper) of grpo.clipped. ratio, gap and k3 compare the trainer's log-probs with
    the sampler's: their mismatch while both have the same weights.
    ref_k1, ref_k2, ref_k3 estimate the KL to the reference or the teacher
    (joschu.net/blog/kl-approx.html).
    """
    used = batch.weights != 0  # a filler's tokens have weight 0
    clipped_low, clipped_high = clipped
    mismatch = torch.where(used, logprobs - batch.sampler_logprobs, 0.0)

    columns = {
        "tokens": used,
        "clip_low": clipped_low & used,
        "clip_high": clipped_high & used,
        "ratio": torch.where(used, mismatch.exp(), 0.0),
        "gap": mismatch.abs(),
        "k3": mismatch.exp() - 1 - mismatch,
        "entropy": torch.where(used, entropy, 0.0),
    }
    if settings.kl_coef or settings.teacher:
        d = torch.where(used, batch.ref_logprobs - logprobs, 0.0)
        columns |= {"ref_k1": -d, "ref_k2": d**2 / 2, "ref_k3": d.exp() - 1 - d}

    found = {name: column.to(logprobs.dtype).sum() for name, column in columns.items()}
    found["largest_gap"] = mismatch.abs().amax()
    found["computed"] = torch.full_like(loss, len(batch.tokens))  # through the model
    found["loss"] = loss.detach()
    return found


def loss_metrics(measured, first_update):
    """Loss, clip fractions and mismatch of trainer and sampler over all micro-batches of all ranks.

    measured: measure's sums of this rank's micro-batches, of every update of the step.
    first_update: how many of them came before the weights changed: there trainer and sampler have
    the same weights, so their log-probs should agree.
    """
    rows = as_numbers(measured)
    everyone = distributed.gather(rows)
    first = distributed.gather(rows[:first_update])
    if not everyone:
        return {"loss": 0.0}

    found = {
        "loss": total(everyone, "loss"),
        "clip_ratio/low_mean": per_token(everyone, "clip_low"),
        "clip_ratio/high_mean": per_token(everyone, "clip_high"),
        # Through the model in the update, shared prompts once.
        "num_train_tokens": total(everyone, "computed"),
        # Of the whole distribution, where the loss was computed.
        "policy/entropy": per_token(everyone, "entropy"),
    }
    if "ref_k1" in everyone[0]:
        for kind in ("k1", "k2", "k3"):
            found[f"kl/{kind}"] = per_token(everyone, f"ref_{kind}")
    if first:  # none when the first update had no rollout with signal, GEPO's groups alone
        found["sampling/sampling_logp_difference/mean"] = per_token(first, "gap")
        found["sampling/sampling_logp_difference/max"] = max(row["largest_gap"] for row in first)
        found["sampling/importance_sampling_ratio/mean"] = per_token(first, "ratio")
        found["sampling/k3_kl"] = per_token(first, "k3")
    return found


def as_numbers(measured):
    """Rows of 0-dim tensors as rows of floats, in one copy from the device."""
    if not measured:
        return []
    table = torch.stack([torch.stack(list(row.values())) for row in measured])
    return [dict(zip(measured[0], values)) for values in table.tolist()]


def total(rows, name):
    return sum(row[name] for row in rows)


def per_token(rows, name):
    return total(rows, name) / total(rows, "tokens")


def rollout_metrics(pairs, group_size):
    """Rewards, groups without signal, lengths, entropy, how programs ended, and signs of hacking.

    pairs: (Completion, Verdict) of every sample of every rank, groups of `group_size` together.
    What the sandbox could not judge counts in no rate of right ones and in no reward.
    """
    completions = [completion for completion, _ in pairs]
    verdicts = [verdict for _, verdict in pairs]
    judged = [verdict for verdict in verdicts if verdict.judged]
    rewards = torch.tensor([float(verdict.reward) for verdict in judged])
    lengths = torch.tensor([float(len(completion.tokens)) for completion in completions])
    solved = torch.tensor([verdict.judged and verdict.correct for verdict in verdicts])
    unsolved = torch.tensor([verdict.judged and not verdict.correct for verdict in verdicts])
    cut = [completion.finish_reason == "length" for completion in completions]
    surprise = sum(-sum(completion.logprobs) for completion in completions)

    found = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        **group_metrics(verdicts, group_size),
        "pass_rate": mean([verdict.correct for verdict in judged]),
        "entropy": surprise / float(lengths.sum()),  # -log p of sampled tokens: unbiased
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": mean(cut),
        "completions/length_solved": float(lengths[solved].mean()),
        "completions/length_unsolved": float(lengths[unsolved].mean()),
        "num_tokens": float(lengths.sum()),
    }
    for target in sorted({verdict.target for verdict in judged if verdict.target}):
        right = [verdict.correct for verdict in judged if verdict.target == target]
        found[f"pass_rate/{target}"] = mean(right)
    for name in verdicts[0].components:
        values = torch.tensor([verdict.components[name] for verdict in verdicts])
        found[f"rewards/{name}/mean"] = float(values.nanmean())
        found[f"rewards/{name}/std"] = float(values[~values.isnan()].std())
    return {**found, **shares(verdicts)}


def group_metrics(verdicts, group_size):
    """What tells gain from sharpening, over the groups in which anything could be judged.

    Groups of 2 with right/right, right/wrong, wrong/unjudged: frac_all_right 1/3, frac_all_wrong
    1/3, pass@G 2/3, frac_reward_zero_std 2/3 (a group with one judged sample has no signal).
    """
    groups = []
    for start in range(0, len(verdicts), group_size):
        group = [verdict for verdict in verdicts[start : start + group_size] if verdict.judged]
        if group:
            groups.append(group)

    rewards = [[verdict.reward for verdict in group] for group in groups]
    right = [[verdict.correct for verdict in group] for group in groups]
    programs = [{verdict.program for verdict in group if verdict.program} for group in groups]
    no_signal = [len(set(found)) == 1 for found in rewards]
    found = {
        "frac_reward_zero_std": mean(no_signal),
        "frac_all_right": mean([all(found) for found in right]),
        "frac_all_wrong": mean([not any(found) for found in right]),
        "pass@G": mean([any(found) for found in right]),
        "completions/distinct_programs": mean([len(found) for found in programs]),  # of a group
    }
    if groups:
        found |= bounds("reward", around_mean([mean(of_group) for of_group in rewards]))
        found |= bounds("pass_rate", interval([mean(of_group) for of_group in right]))
        found |= bounds("pass@G", interval([any(of_group) for of_group in right]))
        found |= bounds("frac_reward_zero_std", interval(no_signal))
    return found


def bounds(name, low_and_high):
    """A figure's 95 % interval over the step's groups, named as an evaluation's are."""
    low, high = low_and_high
    return {f"{name}_low": low, f"{name}_high": high}


def around_mean(values, z=1.96):
    """Mean -+ z standard errors; of a single value nan. 0 and 1 -> 0.5 -+ 1.96 / 2."""
    if len(values) < 2:
        return math.nan, math.nan
    half = z * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def mean(values):
    """Their mean; nan of none."""
    return sum(values) / len(values) if values else math.nan


def timings(run, metrics, seconds):
    """times.jsonl's row: seconds and shares of the phases, rates, MFU and peak memory."""
    total = sum(seconds.values())
    trained = metrics.get("num_train_tokens", 0.0)  # of all ranks
    parameters = sum(p.numel() for n, p in run.model.named_parameters() if ".adapter." not in n)
    # Operations per parameter and token, attention not counted: without the weights' gradients 4.
    operations = (4 if run.settings.lora_rank else 6) * parameters
    rate_of_a_rank = operations * trained / distributed.world_size() / seconds["update"]

    times = {f"time/{phase}": value for phase, value in seconds.items()}
    times["time/step"] = total
    times |= {f"share/{phase}": value / total for phase, value in seconds.items()}
    times["perf/gen_tokens_per_s"] = metrics["num_tokens"] / seconds["generate"]
    times["perf/train_tokens_per_s"] = trained / seconds["update"]
    times["perf/mfu"] = rate_of_a_rank / run.peak_flops
    times["perf/peak_mem_gb"] = machine.peak_bytes(run.device) / 1e9
    # Keys and values that are kept through the update.
    times["perf/sampler_mem_gb"] = run.sampler.held_bytes() / 1e9
    return times


def progress(step, steps, metrics, times):
    """The line that a person reads."""
    if "buffer/deduction" in metrics:  # self-play
        stored = sum(metrics[f"buffer/{task}"] for task in ("deduction", "abduction", "induction"))
        outcome = (
            f"valid {metrics['propose/valid_frac']:.2f}  "
            f"solved {metrics['solve/accuracy']:.2f}  stored {stored:.0f}"
        )
    else:
        outcome = f"pass {metrics['pass_rate']:.3f}"
    return (
        f"step {step}/{steps}  reward {metrics['reward']:.3f}  {outcome}  "
        f"length {metrics['completions/mean_length']:.0f}  "
        f"no-signal {metrics['frac_reward_zero_std']:.2f}  entropy {metrics['entropy']:.3f}  "
        f"grad {metrics['grad_norm']:.2f}  |  sample {times['time/generate']:.1f}s  "
        f"reward +{times['time/reward']:.1f}s  update {times['time/update']:.1f}s"
    )
