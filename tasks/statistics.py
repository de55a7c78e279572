"""Figures of an evaluation: pass@k, intervals, and two evaluations side by side."""

import math
import random
from statistics import fmean, pvariance
from types import SimpleNamespace

from tasks.verdicts import shares


def summary(rows):
    """Figures of one evaluation, from the rows of its samples.jsonl.

    pass@k with its 95 % interval for k = 1, 2, 4, ... up to the fewest samples of a problem,
    any-of-n and all-of-n, lengths, and the shares of verdicts.shares. ValueError when no sample was
    judged.
    """
    outcomes = per_problem(rows)
    if not outcomes:
        raise ValueError(
            "nothing could be judged: every sample ended in a sandbox error "
            "(python -m sandbox doctor says why)"
        )

    found = {}
    fewest = min(map(len, outcomes.values()))
    k = 1
    while k <= fewest:
        rates = [pass_at_k(len(correct), sum(correct), k) for correct in outcomes.values()]
        low, high = interval(rates)
        found[f"pass@{k}"] = fmean(rates)
        found[f"pass@{k}_low"] = low
        found[f"pass@{k}_high"] = high
        k *= 2
    if fewest > 1:
        found["any_of_n"] = fmean(map(any, outcomes.values()))
        found["all_of_n"] = fmean(map(all, outcomes.values()))

    found["mean_tokens"] = fmean(row["tokens"] for row in rows)
    found["cut_frac"] = fmean(row["finish_reason"] == "length" for row in rows)
    return found | shares([_as_verdict(row) for row in rows])


def _as_verdict(row):
    """What shares() reads of a verdict, from a row of samples.jsonl."""
    parsed = SimpleNamespace(format_ok=row["format_ok"])
    return SimpleNamespace(**row, problem=row["id"], parsed=parsed)


def per_problem(rows):
    """{problem id: [correct of each judged sample]}."""
    outcomes = {}
    for row in rows:
        if row["status"] != "sandbox_error":
            outcomes.setdefault(row["id"], []).append(row["correct"])
    return outcomes


def pass_at_k(n, c, k):
    """Unbiased chance that one of k samples is right when c of n were: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374. pass_at_k(4, 1, 2) = 1 - 3/6 = 0.5.
    """
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def interval(rates, z=1.96):
    """95 % Wilson interval of the mean of per-problem pass rates, over problems.

    Several samples of a problem are not independent, so the count in Wilson's formula is
    p (1 - p) / (variance of the mean): the number of problems when n = 1, more when samples agree
    less. interval([1, 0, 1, 1]) = (0.301, 0.954).
    """
    mean = fmean(rates)
    count = len(rates)
    spread = pvariance(rates)
    if 0 < mean < 1 and spread > 0:
        count = count * mean * (1 - mean) / spread

    middle = mean + z * z / (2 * count)
    variance = mean * (1 - mean) / count
    half = z * math.sqrt(variance + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = (middle - half) / scale
    high = (middle + half) / scale
    return max(low, 0.0), min(high, 1.0)


def compare(rows_a, rows_b, draws=10_000):
    """Two evaluations of the same problems: their difference in pass@1 (b - a).

    difference_low, difference_high: 95 % of a paired bootstrap over problems.
    p: share of bootstrap differences on the other side of 0, doubled.
    gained, lost: problems whose pass rate rose, fell.
    """
    a, b = per_problem(rows_a), per_problem(rows_b)
    common = [id for id in a if id in b]
    if not common:
        raise ValueError(
            "the two evaluations have no problem in common: "
            "compare runs of the same --bench and --lang"
        )
    before = [fmean(a[id]) for id in common]
    after = [fmean(b[id]) for id in common]
    differences = [new - old for old, new in zip(before, after)]

    means = _bootstrap(differences, draws)
    not_above = sum(mean <= 0 for mean in means)
    not_below = sum(mean >= 0 for mean in means)

    return {
        "problems": len(common),
        "only_in_a": len(a) - len(common),
        "only_in_b": len(b) - len(common),
        "pass@1_a": fmean(before),
        "pass@1_b": fmean(after),
        "difference": fmean(differences),
        "difference_low": means[int(0.025 * draws)],
        "difference_high": means[int(0.975 * draws) - 1],
        "p": min(1.0, 2 * min(not_above, not_below) / draws),
        "gained": [id for id, change in zip(common, differences) if change > 0],
        "lost": [id for id, change in zip(common, differences) if change < 0],
        "unchanged": sum(change == 0 for change in differences),
    }


def _bootstrap(values, draws):
    """Means of samples with replacement, in order; always the same ones."""
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        drawn = rng.choices(values, k=len(values))
        means.append(fmean(drawn))
    return sorted(means)
