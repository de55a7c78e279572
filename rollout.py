"""One step's samples: prompts -> completions -> programs that run while others still sample -> rewards -> advantages."""

import time
from dataclasses import dataclass, replace

import torch

import grpo
from batches import Sequence
from runtime import distributed
from sampler import Completion, Request
from tasks import translate
from tasks.data import in_passes
from tasks.problems import Problem, program_messages
from tasks.verdicts import Verdict


@dataclass
class Sample:
    """One completion with its verdict, and what the update needs of it (`sequence`; its `group` is the prompt's number in the run)."""

    problem: Problem
    completion: Completion
    verdict: Verdict
    sequence: Sequence


def next_problems(run, count):
    """The run's next `count` prompts with their numbers 0, 1, 2, ...: each pass over the data in a new order that depends on seed and pass alone."""
    numbers = range(run.drawn, run.drawn + count)
    run.drawn += count
    return list(zip(numbers, in_passes(run.problems, numbers, run.settings.seed)))


def prompt_messages(s, language, problem):
    if s.task == "translate":
        return translate.translation_messages(problem)
    return program_messages(problem, language, examples=s.examples, system=not s.short_prompt)


def rollout(run):
    """This rank's samples of the step's prompts -> (list[Sample] group by group, seconds waited for verdicts after sampling).

    With dynamic_sampling (DAPO, 2503.14476) groups whose rewards are all equal are replaced by new prompts, at most that many
    times; every rank takes part in every round, however many groups it still lacks.
    """
    s = run.settings
    samples, waited = draw(run, s.prompts)
    for _ in range(s.dynamic_sampling):
        missing = s.prompts - sum(distributed.gather([len(groups_with_signal(samples))]))
        if missing == 0:
            break
        more, seconds = draw(run, missing)
        samples, waited = samples + more, waited + seconds
    return samples, waited


def draw(run, count):
    """Sample the run's next `count` prompts, spread over the ranks, and judge them -> (list[Sample], seconds waited)."""
    s, tokenizer = run.settings, run.tokenizer
    numbered = distributed.share(next_problems(run, count))
    limits = dict(
        n=s.samples,
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        stop_ids=tokenizer.stop_ids,
        seed=s.seed,
    )
    ids = lambda p: tokenizer.encode_chat(prompt_messages(s, run.language, p))
    requests = [
        Request(ids(p), id=n, expected_tokens=run.lengths.get(p.id), **limits) for n, p in numbered
    ]
    pending = [[] for _ in requests]

    def start_programs(i, completions):
        pending[i] = [
            run.judge.submit(numbered[i][1], tokenizer.decode(c.tokens), c.sample)
            for c in completions
        ]

    completions = [
        c for group in run.sampler.generate(requests, on_done=start_programs) for c in group
    ]
    sampled = time.perf_counter()
    verdicts = run.judge.collect([p for group in pending for p in group], s.reward_deadline)
    waited = time.perf_counter() - sampled
    for n, (_, p) in enumerate(
        numbered
    ):  # what the sampler expects when it meets the problem again: it starts the longest first
        run.lengths[p.id] = sum(len(c.tokens) for c in completions if c.request == n) // s.samples
    samples = []
    for c, v in zip(completions, shaped(verdicts, completions, s)):
        sequence = Sequence(
            requests[c.request].prompt, c.tokens, c.logprobs, group=requests[c.request].id
        )
        samples.append(Sample(numbered[c.request][1], c, v, sequence))
    return samples, waited


def shaped(verdicts, completions, s):
    """Verdicts with what a step or a length adds to their rewards: the syntax mix and the soft overlong penalty. A collective."""
    rewards = [v.reward for v in verdicts]
    if s.syntax_mix:
        syntax = [v.components["syntax"] for v in verdicts]
        judged = [x for x in distributed.gather(syntax) if x == x]
        wrong = 1 - sum(judged) / max(1, len(judged))
        rewards = [wrong * x + (1 - wrong) * r for x, r in zip(syntax, rewards)]
    if s.overlong_buffer:
        rewards = [
            r + overlong_penalty(len(c.tokens), s.max_new_tokens, s.overlong_buffer)
            for r, c in zip(rewards, completions)
        ]
    return [replace(v, reward=r) for v, r in zip(verdicts, rewards)]


def overlong_penalty(length, limit, buffer):
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0 up to limit - buffer, then linear down to -1 at the limit.

    limit 100, buffer 20: length 80 -> 0, 90 -> -0.5, 100 -> -1.
    """
    return min(0.0, (limit - buffer - length) / buffer)


def groups_with_signal(samples):
    """Numbers of the groups whose rewards are not all equal; masked rewards (nan) do not count."""
    seen = {}
    for x in samples:
        if x.verdict.reward == x.verdict.reward:
            seen.setdefault(x.sequence.group, set()).add(x.verdict.reward)
    return {group for group, rewards in seen.items() if len(rewards) > 1}


def set_advantages(run, samples):
    """Advantages of this rank's samples -> the sequences that count in the loss: judged, not masked for length, and with dynamic sampling
    only those of groups with signal. A group never spans ranks; the batch's standard deviation (advantage = batch) does."""
    s = run.settings
    facts, mine = distributed.gather_and_place(
        [(x.verdict.reward, x.sequence.group) for x in samples]
    )
    everyone, ids = (
        torch.tensor([r for r, _ in facts], dtype=torch.float32),
        torch.tensor([g for _, g in facts]),
    )
    if s.advantage.startswith("reinforce"):
        values = reinforce(s, everyone, ids, samples)
    else:
        values = grpo.advantages(everyone, ids, s.advantage).tolist()
    for x, value in zip(samples, values[mine]):
        x.sequence.advantage = value
    kept = (
        groups_with_signal(samples) if s.dynamic_sampling else {x.sequence.group for x in samples}
    )
    return [q for q in counted(run, samples) if q.group in kept]


def counted(run, samples):
    """The sequences of samples that the sandbox could judge and that mask_truncated leaves in."""
    cut = lambda q: run.settings.mask_truncated and q.tokens[-1] not in run.tokenizer.stop_ids
    return [
        x.sequence for x in samples if x.verdict.reward == x.verdict.reward and not cut(x.sequence)
    ]


def reinforce(s, rewards, groups, samples):
    """REINFORCE++ advantages of the samples of all ranks, whitened together: one number a token, the KL to the reference in the reward."""
    lengths = distributed.gather([len(x.completion.tokens) for x in samples])
    kl = None
    if s.kl_coef:
        kl = distributed.gather(
            [
                [
                    a - b
                    for a, b in zip(
                        x.sequence.old_logprobs or x.sequence.logprobs, x.sequence.ref_logprobs
                    )
                ]
                for x in samples
            ]
        )
    return grpo.reinforce_advantages(
        rewards, lengths, groups, s.advantage == "reinforce++_baseline", kl, s.kl_coef
    )
