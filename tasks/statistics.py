"""Figures of an evaluation: pass@k, intervals, and two evaluations side by side."""

import math
import random
import statistics
from types import SimpleNamespace

from tasks.verdicts import shares


def summary(rows):
    """pass@k with its 95 % interval for k = 1, 2, 4, ... up to the samples of a problem, any-of-n and all-of-n, lengths, and the
    shares of rewards.shares."""
    outcomes = per_problem(rows)
    if not outcomes:
        raise ValueError(
            "nothing could be judged: every sample ended in a sandbox error (python -m sandbox doctor says why)"
        )
    fewest, found = min(len(o) for o in outcomes.values()), {}
    for k in (2**i for i in range(fewest.bit_length())):
        rates = [pass_at_k(len(o), sum(o), k) for o in outcomes.values()]
        low, high = interval(rates)
        found |= {
            f"pass@{k}": statistics.fmean(rates),
            f"pass@{k}_low": low,
            f"pass@{k}_high": high,
        }
    if fewest > 1:
        found["any_of_n"] = statistics.fmean(any(o) for o in outcomes.values())
        found["all_of_n"] = statistics.fmean(all(o) for o in outcomes.values())
    found["mean_tokens"] = statistics.fmean(r["tokens"] for r in rows)
    found["cut_frac"] = statistics.fmean(r["finish_reason"] == "length" for r in rows)
    verdicts = [
        SimpleNamespace(**r, problem=r["id"], parsed=SimpleNamespace(format_ok=r["format_ok"]))
        for r in rows
    ]
    return {**found, **shares(verdicts)}


def per_problem(rows):
    """{problem id: [correct of each judged sample]}."""
    outcomes = {}
    for r in rows:
        if r["status"] != "sandbox_error":
            outcomes.setdefault(r["id"], []).append(r["correct"])
    return outcomes


def pass_at_k(n, c, k):
    """Unbiased chance that one of k samples is right when c of n were: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    pass_at_k(4, 1, 2) = 1 - 3/6 = 0.5.
    """
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def interval(rates, z=1.96):
    """95 % Wilson interval of the mean of per-problem pass rates, over problems.

    Several samples of a problem are not independent, so the count in Wilson's formula is p (1 - p) / (variance of the mean):
    the number of problems when n = 1, more when samples agree less. interval([1, 0, 1, 1]) = (0.301, 0.954).
    """
    mean, count = statistics.fmean(rates), len(rates)
    if 0 < mean < 1 and (spread := statistics.pvariance(rates)) > 0:
        count = count * mean * (1 - mean) / spread
    middle, half = (
        mean + z * z / (2 * count),
        z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count)),
    )
    scale = 1 + z * z / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def compare(rows_a, rows_b, draws=10_000):
    """Two evaluations of the same problems -> their difference in pass@1 (b - a) with a paired bootstrap over problems.

    p: share of bootstrap differences on the other side of 0, doubled. gained, lost: problems whose pass rate rose, fell.
    """
    a, b = per_problem(rows_a), per_problem(rows_b)
    common = [id for id in a if id in b]
    if not common:
        raise ValueError(
            "the two evaluations have no problem in common: compare runs of the same --bench and --lang"
        )
    rates = [(sum(a[id]) / len(a[id]), sum(b[id]) / len(b[id])) for id in common]
    differences = [after - before for before, after in rates]
    rng = random.Random(0)
    means = sorted(
        statistics.fmean(rng.choices(differences, k=len(differences))) for _ in range(draws)
    )
    opposite = min(sum(m <= 0 for m in means), sum(m >= 0 for m in means)) / draws
    return {
        "problems": len(common),
        "only_in_a": len(a) - len(common),
        "only_in_b": len(b) - len(common),
        "pass@1_a": statistics.fmean(before for before, _ in rates),
        "pass@1_b": statistics.fmean(after for _, after in rates),
        "difference": statistics.fmean(differences),
        "difference_low": means[int(0.025 * draws)],
        "difference_high": means[int(0.975 * draws) - 1],
        "p": min(1.0, 2 * opposite),
        "gained": [id for id, d in zip(common, differences) if d > 0],
        "lost": [id for id, d in zip(common, differences) if d < 0],
        "unchanged": sum(d == 0 for d in differences),
    }
