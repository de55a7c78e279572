"""One step's samples: prompts -> completions -> programs, which run while others still sample ->
verdicts.

`run.task` is this module or selfplay/loop.py: both have rollout() and set_advantages().
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

import grpo
from batches import Sequence
from metrics import rollout_metrics
from runtime import distributed
from sampler import Completion, Request
from shaping import shaped
from tasks import faults, translate
from tasks.problems import Problem, program_messages
from tasks.render import solution
from tasks.verdicts import Verdict


@dataclass
class Sample:
    """One completion with its verdict, and what the update needs of it.

    sequence.group is the number of its prompt in the run.
    """

    problem: Problem
    completion: Completion
    verdict: Verdict
    sequence: Sequence


# ---- prompts ----


def prompt_messages(settings, language, problem):
    """The chat that asks for a problem's program."""
    if settings.task == "translate":
        return translate.translation_messages(problem)
    with_instructions = not settings.short_prompt
    return program_messages(problem, language, settings.examples, system=with_instructions)


# ---- samples and verdicts ----


def rollout(run, step):
    """This rank's samples of the step's prompts, group by group.

    Returns (list[Sample], seconds waited for verdicts after sampling, metrics of all ranks).

    With dynamic_sampling (DAPO, arXiv 2503.14476) groups that are all right or all wrong are
    replaced by new prompts, at most that many times; every rank takes part in every round.
    """
    settings = run.settings
    samples, waited = sample_and_judge(run, settings.prompts)
    for _ in range(settings.dynamic_sampling):
        found = sum(distributed.gather([len(groups_with_signal(samples, settings))]))
        if found == settings.prompts:
            break
        more, seconds = sample_and_judge(run, settings.prompts - found)
        samples += more
        waited += seconds

    pairs = distributed.gather([(sample.completion, sample.verdict) for sample in samples])
    judged = [verdict for _, verdict in pairs if verdict.judged]
    run.curriculum.learn([(verdict.problem, is_right(verdict, settings)) for verdict in judged])
    return samples, waited, rollout_metrics(pairs, settings.samples)


def sample_and_judge(run, count):
    """Samples of the run's next `count` prompts, spread over the ranks, and seconds waited."""
    settings = run.settings
    numbered = distributed.share(run.curriculum.next(count))
    problems = [problem for _, problem in numbered]
    requests = [request_for(run, number, problem) for number, problem in numbered]
    submissions = [[] for _ in requests]

    def start_programs(index, completions):
        """A prompt's completions are there: their programs run while others still sample."""
        for completion in completions:
            text = run.tokenizer.decode(completion.tokens)
            submission = faults.submit(run.judge, problems[index], text, completion.sample)
            submissions[index].append(submission)

    groups = run.sampler.generate(requests, on_done=start_programs)
    sampled = time.perf_counter()
    started = [submission for group in submissions for submission in group]
    verdicts = faults.collect(run.judge, started, settings.reward_deadline)
    waited = time.perf_counter() - sampled

    completions = [completion for group in groups for completion in group]
    prompts = [np.asarray(request.prompt) for request in requests]
    samples = []
    for completion, verdict in zip(completions, shaped(verdicts, completions, settings)):
        number = completion.request
        tokens, logprobs = completion.tokens, completion.logprobs
        sequence = Sequence(prompts[number], tokens, logprobs, group=requests[number].id)
        samples.append(Sample(problems[number], completion, verdict, sequence))

    # What the sampler expects when it meets a problem again: it starts the longest first.
    for problem, group in zip(problems, groups):
        run.lengths[problem.id] = sum(len(x.tokens) for x in group) // settings.samples
    return samples, waited


def request_for(run, number, problem):
    """What the sampler needs for a problem; its number in the run decides the draws."""
    settings = run.settings
    return Request(
        prompt=run.tokenizer.encode_chat(prompt_messages(settings, run.language, problem)),
        n=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop_ids=run.tokenizer.stop_ids,
        seed=settings.seed,
        id=number,
        expected_tokens=run.lengths.get(problem.id),
    )


def gold_sequences(run, samples):
    """The known right answers to this rank's problems whose samples are all judged, and all wrong.

    They count like samples with the advantage --gold (arXiv 2504.14945 mixes a teacher's in), and
    their ratio starts from the trainer's own log-probs (train.score_again).
    """
    first, spared = {}, set()
    for sample in samples:
        first.setdefault(sample.sequence.group, sample)
        if not sample.verdict.judged or is_right(sample.verdict, run.settings):
            spared.add(sample.sequence.group)
    found = []
    for group, sample in first.items():
        if group not in spared and sample.problem.steps:
            text = solution(sample.problem, run.language)
            tokens = [*run.tokenizer.encode(text), run.tokenizer.stop_ids[0]]
            prompt = sample.sequence.prompt
            found.append(Sequence(prompt, tokens, advantage=run.settings.gold, group=group))
    return found


# ---- advantages ----


def set_advantages(run, samples):
    """Set the advantages of this rank's samples; return the sequences that count in the loss.

    Those are judged ones and, with dynamic sampling, of groups with signal. A group never spans
    ranks; the deviation of the whole batch (advantage = batch) does.
    """
    settings = run.settings
    facts = [(sample.verdict.reward, sample.sequence.group) for sample in samples]
    facts, mine = distributed.gather_and_place(facts)
    rewards = torch.tensor([reward for reward, _ in facts], device=run.device)
    group_ids = torch.tensor([group for _, group in facts], device=run.device)

    if settings.advantage == "distill":
        for sequence in (sample.sequence for sample in samples):
            own = sequence.old_logprobs or sequence.logprobs
            sequence.advantage = grpo.distill_advantages(own, sequence.ref_logprobs)
        return judged_sequences(samples)
    if settings.advantage.startswith("reinforce"):
        values = token_advantages(settings, rewards, group_ids, samples)
    else:
        values = grpo.advantages(rewards, group_ids, settings.advantage, k=settings.pass_k).tolist()
    for sample, value in zip(samples, values[mine]):
        sample.sequence.advantage = value

    counted = judged_sequences(samples)
    if settings.dynamic_sampling:
        kept = groups_with_signal(samples, settings)
        counted = [sequence for sequence in counted if sequence.group in kept]
    return counted


def token_advantages(settings, rewards, group_ids, samples):
    """REINFORCE++ of the samples of all ranks together, with the KL to the reference in the
    reward."""
    lengths = distributed.gather([len(sample.completion.tokens) for sample in samples])
    kl = None
    if settings.kl_coef:
        kl = []
        for sample in samples:
            old = sample.sequence.old_logprobs or sample.sequence.logprobs
            reference = sample.sequence.ref_logprobs
            kl.append([p - q for p, q in zip(old, reference)])
        kl = distributed.gather(kl)
    lengths = torch.tensor(lengths, device=rewards.device)
    baseline = settings.advantage == "reinforce++_baseline"
    return grpo.reinforce_advantages(rewards, group_ids, lengths, baseline, kl, settings.kl_coef)


def judged_sequences(samples):
    """Sequences that the sandbox could judge; the others are masked, never scored 0."""
    return [sample.sequence for sample in samples if sample.verdict.judged]


def groups_with_signal(samples, settings):
    """Numbers of the groups with a right and a wrong answer; what was not judged does not count.

    Shaped rewards do not decide: lengths alone make those of all-wrong groups differ.
    """
    found = {}
    for sample in samples:
        if sample.verdict.judged:
            outcomes = found.setdefault(sample.sequence.group, set())
            outcomes.add(is_right(sample.verdict, settings))
    return {group for group, outcomes in found.items() if len(outcomes) == 2}


def is_right(verdict, settings):
    """An answer outside the form is not paid as right, so with format_gate it is not right here. In
    the random control the coin says what is right."""
    if verdict.coin is not None:
        return verdict.coin
    return verdict.correct and (verdict.parsed.format_ok or not settings.format_gate)
