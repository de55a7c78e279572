"""Figures of an evaluation: pass@k, intervals, and two evaluations side by side."""

import math
import operator
import random
from dataclasses import dataclass
from statistics import fmean, pvariance, stdev
from types import SimpleNamespace

from tasks.verdicts import shares

KS = (1, 2, 4, 8, 10, 16)  # of pass@k: powers of two, and 10 as HumanEval's paper has it
DRAWS = 10_000  # of the bootstrap and of the test, whose least p is about 2 / DRAWS


def summary(rows):
    """Figures of one evaluation, from the rows of its samples.jsonl.

    pass_rates, of EvalPlus also under base/ for the base tests alone; pass@1 of each target
    language, where there are several; lengths; and the shares of verdicts.shares. ValueError when no sample was judged.
    """
    outcomes = per_problem(rows)
    if not outcomes:
        raise ValueError(
            "nothing could be judged: every sample ended in a sandbox error "
            "(python -m sandbox doctor says why)"
        )

    found = pass_rates(outcomes)
    if "base" in rows[0]:
        base = pass_rates(per_problem(rows, "base"))
        found |= {f"base/{name}": value for name, value in base.items()}

    for target in sorted({row["target"] for row in rows if "target" in row}):
        of_target = per_problem([row for row in rows if row["target"] == target])
        if of_target:
            found[f"pass@1/{target}"] = pass_rates(of_target)["pass@1"]

    found["mean_tokens"] = fmean(row["tokens"] for row in rows)
    found["cut_frac"] = fmean(row["finish_reason"] == "length" for row in rows)
    return found | shares([_as_verdict(row) for row in rows])


def _as_verdict(row):
    """What shares() reads of a verdict, from a row of samples.jsonl."""
    parsed = SimpleNamespace(format_ok=row["format_ok"])
    return SimpleNamespace(**row, problem=row["id"], parsed=parsed)


def per_problem(rows, outcome="correct"):
    """{problem id: [outcome of each judged sample]}."""
    outcomes = {}
    for row in rows:
        if row["status"] != "sandbox_error":
            outcomes.setdefault(row["id"], []).append(row[outcome])
    return outcomes


def pass_rates(outcomes):
    """pass@k with its 95 % interval over problems, any-of-n and all-of-n.

    For k of KS and n, the most samples of a problem, but no k above the fewest judged samples of a
    problem: nobody has measured that. Samples 3, 3, 2 give pass@1 and pass@2.
    """
    counts = [len(judged) for judged in outcomes.values()]
    found = {}
    for k in sorted({*KS, max(counts)}):
        if k > min(counts):
            break
        rates = [pass_at_k(len(judged), sum(judged), k) for judged in outcomes.values()]
        low, high = interval(rates)
        found[f"pass@{k}"] = fmean(rates)
        found[f"pass@{k}_low"] = low
        found[f"pass@{k}_high"] = high

    if min(counts) > 1:
        found["any_of_n"] = fmean(map(any, outcomes.values()))
        found["all_of_n"] = fmean(map(all, outcomes.values()))
    return found


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


def compare(runs_a, runs_b, draws=DRAWS):
    """Two sides, of one evaluation or several (seeds): their difference in pass@1 (b - a).

    runs_a, runs_b: the rows of each run of a side. Compared are the problems that all runs have
    judged; a problem's pass rate on a side is the mean over its runs.
    pass@1_a, pass@1_b: means over the runs, which runs_a and runs_b list one by one.
    spread_a, spread_b: their standard deviation over the runs; none for a single run.
    difference_low, difference_high: 95 % of a paired bootstrap over problems. How much another seed
        would change is not in it: that is the spread.
    p: of the differences' mean, two-sided, their signs flipped at random (see sign_test).
    gained, lost: problems whose pass rate rose, fell.
    """
    rates_a = [rates_of(rows) for rows in runs_a]
    rates_b = [rates_of(rows) for rows in runs_b]
    everywhere = set.intersection(*[set(rates) for rates in rates_a + rates_b])
    common = [id for id in rates_a[0] if id in everywhere]
    if not common:
        raise ValueError(
            "the evaluations have no problem in common: compare runs of the same --bench and --lang"
        )
    each_a = [fmean(rates[id] for id in common) for rates in rates_a]
    each_b = [fmean(rates[id] for id in common) for rates in rates_b]

    differences = []
    for id in common:
        before = fmean(rates[id] for rates in rates_a)
        after = fmean(rates[id] for rates in rates_b)
        differences.append(after - before)
    means = _bootstrap(differences, draws)

    found = {
        "problems": len(common),
        "only_in_a": len(set().union(*rates_a)) - len(common),
        "only_in_b": len(set().union(*rates_b)) - len(common),
        "runs_a": each_a,
        "runs_b": each_b,
        "pass@1_a": fmean(each_a),
        "pass@1_b": fmean(each_b),
    }
    if len(each_a) > 1:
        found["spread_a"] = stdev(each_a)
    if len(each_b) > 1:
        found["spread_b"] = stdev(each_b)
    return found | {
        "difference": fmean(differences),
        "difference_low": means[int(0.025 * draws)],
        "difference_high": means[int(0.975 * draws) - 1],
        "p": sign_test(differences, draws),
        "gained": [id for id, change in zip(common, differences) if change > 0],
        "lost": [id for id, change in zip(common, differences) if change < 0],
        "unchanged": sum(change == 0 for change in differences),
    }


def figure_rows(rows):
    """{figure: rows whose pass@1 it is}: pass@1, and pass@n where problems have n samples.

    pass@n has one row of each problem of which all n samples were judged, right when any is.
    """
    found = {"pass@1": rows}
    outcomes = per_problem(rows)
    n = max(map(len, outcomes.values()), default=1)
    if n > 1:
        whole = {id: judged for id, judged in outcomes.items() if len(judged) == n}
        found[f"pass@{n}"] = [
            {"id": id, "status": "ok", "correct": any(judged)} for id, judged in whole.items()
        ]
    return found


def rate_with_interval(rows):
    """(pass@1, low, high); None when nothing was judged."""
    outcomes = per_problem(rows)
    if not outcomes:
        return None
    rates = pass_rates(outcomes)
    return rates["pass@1"], rates["pass@1_low"], rates["pass@1_high"]


def changes(before, after):
    """{figure: before, after, gain} of two evaluations of one run, for each of figure_rows.

    before, after: (rate, low, high). gain: (difference, low, high), paired over problems; with p
    and with how many problems were gained and lost, and of how many.
    """
    found = {}
    rows_before, rows_after = figure_rows(before), figure_rows(after)
    for figure, old in rows_before.items():
        new = rows_after.get(figure, [])
        if not per_problem(old).keys() & per_problem(new).keys():
            continue
        paired = compare([old], [new])
        found[figure] = {
            "before": rate_with_interval(old),
            "after": rate_with_interval(new),
            "gain": tuple(
                paired[name] for name in ("difference", "difference_low", "difference_high")
            ),
            "p": p_text(paired["p"]),
            "gained": len(paired["gained"]),
            "lost": len(paired["lost"]),
            "problems": paired["problems"],
        }
    return found


@dataclass
class Pair:
    """One problem before and after, with a sample of each side to look at."""

    id: str
    change: int  # of its pass rate: 1 gained, -1 lost, 0 neither (or not judged on a side)
    before: dict
    after: dict
    outcomes_before: list[bool]  # of its judged samples
    outcomes_after: list[bool]


def side_by_side(before, after):
    """A Pair of each problem that both evaluations have, in the order of `before`.

    The samples to look at are the first two of the same number that changed as the rate did.
    """
    sides = [{}, {}]
    for side, rows in zip(sides, (before, after)):
        for row in rows:
            side.setdefault(row["id"], []).append(row)
    judged = per_problem(before), per_problem(after)

    found = []
    for id, olds in sides[0].items():
        news = sides[1].get(id)
        if not news:
            continue
        outcomes = [of_side.get(id, []) for of_side in judged]
        change = 0
        if all(outcomes):
            old_rate, new_rate = map(fmean, outcomes)
            change = (new_rate > old_rate) - (new_rate < old_rate)

        samples = (olds[0], news[0])
        for old, new in zip(olds, news):
            if new["correct"] - old["correct"] == change:
                samples = (old, new)
                break
        found.append(Pair(id, change, *samples, *outcomes))
    return found


def rates_of(rows):
    """{problem id: share of its judged samples that are right}."""
    return {id: fmean(judged) for id, judged in per_problem(rows).items()}


def sign_test(differences, draws=DRAWS):
    """p, two-sided, of paired differences whose mean would be 0 if the two sides were alike.

    Were they alike, each difference could as well have the other sign: p is the share of random
    signs that give a mean as far up, or as far down, doubled. The signs that were found count as
    one draw, so p is never 0. Five gained and none lost: about 2 / 2**5 = 0.06.
    """
    changes = [change for change in differences if change != 0]
    found = abs(sum(changes)) - 1e-12  # signs in another order round otherwise
    rng = random.Random(0)
    as_far = 1
    for _ in range(draws):
        signs = rng.choices((1, -1), k=len(changes))
        as_far += sum(map(operator.mul, signs, changes)) >= found
    return min(1.0, 2 * as_far / (draws + 1))


def p_text(p, draws=DRAWS):
    """A p of so many draws: below the least one that they can show, only that is known."""
    least = 2 / draws
    return f"< {least:.4f}" if p <= least else f"{p:.4f}"


def _bootstrap(values, draws):
    """Means of samples with replacement, in order; always the same ones."""
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        drawn = rng.choices(values, k=len(values))
        means.append(fmean(drawn))
    return sorted(means)
