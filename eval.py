"""pass@k of a model on held-out problems: sampled by sampler.py, judged in the sandbox while others are still being sampled.

evaluate() is what train.py calls in the loop.
"""

import math
import statistics

import distributed
from rewards import shares
from sampler import Request


def evaluate(sampler, tokenizer, judge, problems, *, prompt, n=1, temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=256, seed=0, first=0):
    """Sample n completions per problem, judge them, spread over the ranks -> (metrics, one row per sample, in problem order).

    prompt(problem) -> chat messages, or token ids. temperature 0 is greedy. first: number of problems[0] in the whole
    evaluation; draws depend on (seed, number, sample) alone, so batches, ranks and a resume do not change them. Samples that
    the sandbox could not judge are left out of every figure and counted in sandbox/sandbox_error_frac.
    """
    numbered = distributed.share(list(enumerate(problems, first)))
    requests = [
        Request(
            _ids(tokenizer, prompt(problem)), n, max_new_tokens, temperature, top_p, top_k, stop_ids=tokenizer.stop_ids, seed=seed, id=number
        )
        for number, problem in numbered
    ]
    pending = [None] * len(requests)

    def start_judging(i, completions):
        pending[i] = [(c, judge.submit(numbered[i][1], tokenizer.decode(c.tokens), c.sample)) for c in completions]

    sampler.generate(requests, on_done=start_judging)
    pairs = [pair for group in pending for pair in group]
    verdicts = judge.collect([submission for _, submission in pairs])
    rows = [row(problem, c, s.text, v) for (c, s), v, problem in zip(pairs, verdicts, (p for _, p in numbered for _ in range(n)))]
    rows, verdicts = distributed.gather(rows), distributed.gather(verdicts)
    return {**summary(rows), **shares(verdicts)}, rows


def _ids(tokenizer, prompt):
    return tokenizer.encode_chat(prompt) if prompt and isinstance(prompt[0], dict) else prompt


def row(problem, completion, text, verdict):
    """What samples.jsonl keeps of one sample."""
    return {
        "id": problem.id,
        "sample": completion.sample,
        "question": problem.question,
        "correct": verdict.correct,
        "status": verdict.status,
        "value": verdict.value,
        "answer": None if problem.answer is None else str(problem.answer),
        "program": verdict.program,
        "text": text,
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
    }


def summary(rows):
    """pass@1 with its 95 % interval, pass@k for k = 2, 4, ... up to the samples of a problem, any-of-n and all-of-n."""
    outcomes = {}
    for r in rows:
        if r["status"] != "sandbox_error":
            outcomes.setdefault(r["id"], []).append(r["correct"])
    if not outcomes:
        raise ValueError("nothing could be judged: every sample ended in a sandbox error (python -m sandbox doctor says why)")
    rates = [sum(o) / len(o) for o in outcomes.values()]
    low, high = interval(rates)
    found = {"pass@1": statistics.fmean(rates), "pass@1_low": low, "pass@1_high": high}
    fewest = min(len(o) for o in outcomes.values())
    for k in (2**i for i in range(1, fewest.bit_length())):
        found[f"pass@{k}"] = statistics.fmean(pass_at_k(len(o), sum(o), k) for o in outcomes.values())
    if fewest > 1:
        found["any_of_n"] = statistics.fmean(any(o) for o in outcomes.values())
        found["all_of_n"] = statistics.fmean(all(o) for o in outcomes.values())
    found["mean_tokens"] = statistics.fmean(r["tokens"] for r in rows)
    found["cut_frac"] = statistics.fmean(r["finish_reason"] == "length" for r in rows)
    return found


def pass_at_k(n, c, k):
    """Unbiased chance that one of k samples is right when c of n were: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    pass_at_k(4, 1, 2) = 1 - 3/6 = 0.5.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(rates, z=1.96):
    """95 % Wilson interval of the mean of per-problem pass rates, over problems.

    Several samples of a problem are not independent, so the count in Wilson's formula is p (1 - p) / (variance of the mean):
    the number of problems when n = 1, more when samples agree less. interval([1, 0, 1, 1]) = (0.301, 0.954).
    """
    mean, count = statistics.fmean(rates), len(rates)
    if 0 < mean < 1 and (spread := statistics.pvariance(rates)) > 0:
        count = count * mean * (1 - mean) / spread
    middle, half = mean + z * z / (2 * count), z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)
