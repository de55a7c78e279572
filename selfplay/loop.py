"""Absolute-Zero self-play (Zhao et al. 2025; for Racket and Julia: Inoue & Tsuruoka).

One model proposes puzzles and solves them. One step, for each of deduction (program, input ->
output), abduction (program, output -> input) and induction (pairs -> program):

    propose              programs and inputs, after references from the buffers, and run them
                         in two processes each (proposals.py)
    estimate_accuracy    m answers at training temperature tell how learnable a proposal is
    store                the new entries go into the buffers
    answer               puzzles from the buffers, this step's entries first
    proposer_sample      the proposer's reward, equation (3) or (4); the solver's (2) is the judge's
    set_advantages       per (task, role), TRR++
"""

import itertools
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import grpo
from batches import Sequence
from metrics import rollout_metrics
from rollout import Sample, judged_sequences
from runtime import distributed
from sampler import Completion, Request
from selfplay import triples
from selfplay.buffers import Buffers, add_seeds
from selfplay.judge import SolveJudge
from selfplay.metrics import Scored, mean, play_metrics, right_or_wrong, verdicts_of
from selfplay.parse import parse_proposal
from selfplay.prompts import propose_prompt, solve_prompt
from selfplay.proposals import begin, check, reason_of, still_true
from selfplay.puzzles import (
    OUT_OF_FORM,
    PROPOSE_REASONS,
    ROLES,
    SOLVE_REASONS,
    TASKS,
    Candidate,
    Entry,
    Puzzle,
    Refused,
)
from selfplay.rewards import REFUSED, proposer_reward, read_penalties, read_setting
from settings import Settings
from tasks import faults
from tasks.multipl_e import TestJudge, load_benchmark
from tasks.requests import benchmark_prompt
from tasks.verdicts import ANSWER_END, Parsed, Verdict

# Draws depend on the number of a request, so no two requests of a run share one. A step has the
# numbers from step * STEP on: its proposals, then the answers that say how learnable they are, then
# the solver's. Seeding comes before all steps, in negative numbers.
STEP = 1 << 24
LEARN = STEP // 4
SOLVE = STEP // 2

GROUPS = list(itertools.product(TASKS, ROLES))  # each has its own mean and deviation of rewards
VALIDATION_SEED = 1  # of triples; those that are reported have 0
SEED_ROUNDS = 40  # most rounds of --prompts seed proposals
IDLE_ROUNDS = 4  # of these in a row may give nothing new; then the model starts with what there is
# Self-play has its own rewards, and one answer for each question.
OF_OTHER_TASKS = ("reward", "syntax_mix", "overlong_buffer", "dynamic_sampling")
SMOOTHING = 0.1  # weight of a step in the moving average of the solver's accuracy


class Play:
    """The state of self-play: the buffers (the same on all ranks) and what judges it."""

    def __init__(self, settings, language, pool, sampler, tokenizer):
        self.settings = settings
        self.language = language
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.solve_penalties, self.propose_penalties = penalties_of(settings)
        self.judge = SolveJudge(pool, language, self.solve_penalties)
        self.buffers = Buffers(settings.buffer_size, language)
        self.waited = 0.0  # seconds of this step for programs that sampling did not hide


@dataclass(frozen=True)
class Proposal:
    """What a proposer is asked; the problem of its sample."""

    id: str
    task: str  # one of TASKS
    prompt: str
    program: str = ""  # induction: the one it is about
    composed: tuple = ()  # programs that the new one must call
    references: tuple = ()  # the Entries that it shows to differ from


@dataclass(frozen=True)
class Sampled:
    """One completion, and what was started for it as soon as it was there."""

    completion: Completion
    sequence: Sequence
    started: object


@dataclass
class Proposed:
    """A proposal with its completion, and what came of it."""

    proposal: Proposal
    completion: Completion
    sequence: Sequence
    entry: Entry | None  # None: refused, or the sandbox could not say
    reason: str  # "ok", or the key of REASONS why there is no entry
    copied: bool = False  # it is one of the references that it was shown, valid or not
    accuracy: float | None = None  # of answers to the entry, as far as they could be judged

    @property
    def judged(self):
        """False when the sandbox could say nothing: of the proposal, or of any answer to it."""
        if self.entry is None:
            return self.reason != "sandbox_error"
        return self.accuracy is not None


# ---- before the first step ----


def check_settings(settings):
    """ValueError with one sentence for what is wrong, before any model is made."""
    read_setting(settings.propose_reward)
    penalties_of(settings)
    for name in OF_OTHER_TASKS:
        value = getattr(settings, name)
        if value != getattr(Settings, name):
            raise ValueError(f"--{name} {value}: self-play does not use it; leave it out")
    if not 0 <= settings.composite <= 1:
        raise ValueError(
            f"--composite {settings.composite} is not a share: use a number from 0 to 1"
        )
    for path in seed_files(settings):
        if not Path(path).is_file():
            raise ValueError(
                f"--seeds {path} does not exist: "
                "give JSON lines of programs with inputs, or leave it out"
            )


def penalties_of(settings):
    """({reason: reward} of answers, the same of proposals)."""
    return (
        read_penalties("solve_penalties", settings.solve_penalties, SOLVE_REASONS),
        read_penalties("propose_penalties", settings.propose_penalties, PROPOSE_REASONS),
    )


def load_evaluation(settings, language, pool):
    """What is evaluated in the loop: (problems, judge, prompt of a problem) of --eval_bench.

    triples (built in), or humaneval or mbpp of MultiPL-E with the paper's prompt.
    """
    check_settings(settings)
    bench = settings.eval_bench
    if bench == "triples":
        puzzles = triples.held_out_triples(language, settings.eval_problems)

        def ask_puzzle(puzzle):
            return solve_prompt(puzzle, language, settings.short_prompt)

        return puzzles, SolveJudge(pool, language), ask_puzzle

    rows = load_benchmark(bench, language, settings.data or None, count=settings.eval_problems)

    def ask_row(row):
        return benchmark_prompt(row, language, "think")

    return rows, TestJudge(pool, language, "think"), ask_row


def load_validation(settings, language, pool):
    """What chooses the best checkpoint: (problems, judge, prompt of a problem).

    Always triples: of another seed than those that are reported, and none of them.
    """
    reported = triples.held_out_triples(language, settings.eval_problems)
    known = {(puzzle.entry.program, puzzle.entry.inputs) for puzzle in reported}
    wanted = settings.validation_problems
    drawn = triples.held_out_triples(language, 4 * wanted, VALIDATION_SEED)
    puzzles = [
        puzzle for puzzle in drawn if (puzzle.entry.program, puzzle.entry.inputs) not in known
    ]

    def ask_puzzle(puzzle):
        return solve_prompt(puzzle, language, settings.short_prompt)

    return puzzles[:wanted], SolveJudge(pool, language), ask_puzzle


def fill(play, checkpoint, report):
    """The buffers of a checkpoint, the same on every rank, or new seeds when there is none."""
    if checkpoint is None:
        seed(play, report)
        return
    text = None
    if distributed.rank() == 0:
        text = (checkpoint / "selfplay.json").read_text("utf-8")
    play.buffers.from_text(distributed.broadcast(text))


def seed(play, report):
    """Fill the empty buffers; no gradient.

    They hold the identity function, then the rows of --seeds, or what the model proposes from it.
    """
    settings = play.settings
    call = play.language.call
    hello = (call["hello"],)
    identity = Entry(call["identity"], inputs=hello, outputs=hello)
    for task in ("deduction", "abduction"):
        play.buffers[task].add(identity)

    # One rank judges the files: a busy machine cannot make the ranks differ.
    if distributed.rank() == 0:
        for path in seed_files(settings):
            seed_from(path, play, report)
    play.buffers.from_text(distributed.broadcast(play.buffers.to_text()))

    for tasks in (("deduction", "abduction"), ("induction",)):
        has_all = all(len(play.buffers[task]) > 0 for task in tasks)
        if not settings.seeds or not has_all:
            seed_itself(play, tasks, report)


def seed_files(settings):
    return [path for path in settings.seeds.split(",") if path]


def seed_from(path, play, report):
    settings = play.settings
    runner = play.judge.runner
    refused = add_seeds(
        play.buffers, path, runner, settings.seed_problems, settings.reward_deadline
    )
    sizes = ", ".join(f"{len(buffer)} {task}" for task, buffer in play.buffers.items())
    report(f"seeds from {path}: {sizes}; refused: {refused or 'none'}")


def seed_itself(play, tasks, report):
    """Rounds of proposals from what is there.

    tasks: those that share the proposals; deduction and abduction start from the same programs.
    """
    wanted = play.settings.seed_problems
    buffer = play.buffers[tasks[0]]
    counts = {}  # {"ok" or a reason: proposals}
    idle = 0
    for round_number in range(SEED_ROUNDS):
        before = len(buffer)
        if before >= wanted or idle == IDLE_ROUNDS:
            break

        step = -1 - round_number
        if tasks == ("induction",):
            step -= SEED_ROUNDS
        proposed = propose(play, step, proposals_of(play, step, tasks))
        candidates = [Candidate(one.entry, one.reason) for one in proposed]
        for candidate in distributed.gather(candidates):
            counts[candidate.reason] = counts.get(candidate.reason, 0) + 1
            if candidate.entry is None:
                continue
            for task in tasks:
                if len(play.buffers[task]) < wanted:
                    play.buffers[task].add(candidate.entry)
        idle = idle + 1 if len(buffer) == before else 0

    sizes = ", ".join(f"{len(play.buffers[task])} {task}" for task in tasks)
    report(
        f"seeds by the model itself, round {round_number + 1}: {sizes} of {wanted}; "
        f"proposals: {dict(sorted(counts.items()))}"
    )
    if len(buffer) == 0:
        raise SystemExit(
            "the model gave no valid seed: warm-start it (sft.py --task selfplay), "
            "or give a file by --seeds"
        )


# ---- one step ----


def rollout(run, step):
    """This rank's samples of a step, proposers' and solvers'.

    Returns (list[Sample], seconds waited for programs, metrics).
    """
    play = run.play
    play.waited = 0.0

    # Propose.
    proposed = propose(play, step, proposals_of(play, step))
    estimate_accuracy(play, step, proposed)
    added = store(play, proposed)

    # Solve.
    picked, forgotten = forget_changed(play, step, draw_entries(play, step))
    puzzles = distributed.share(puzzles_of(play, step, picked))
    solvers = answer(play, puzzles, step * STEP + SOLVE)

    # Reward and log.
    proposers = [proposer_sample(play, step, one) for one in proposed]
    samples = [*proposers, *solvers]
    pairs = distributed.gather([(sample.completion, sample.verdict) for sample in samples])
    metrics = rollout_metrics(pairs, 1)

    scored = []
    for sample in samples:
        scored.append(Scored(sample.problem.task, role_of(sample), sample.verdict))
    scored = distributed.gather(scored)
    accuracies = [one.accuracy for one in proposed if one.accuracy is not None]
    metrics |= play_metrics(play.buffers, scored, distributed.gather(accuracies), added)
    metrics["buffer/forgotten"] = float(forgotten)
    metrics["propose/copy_frac"] = mean(distributed.gather([one.copied for one in proposed]))

    # The next step's rewards know how good the solver is now.
    right = right_or_wrong(verdicts_of(scored, "solve"))
    if right:
        moving = play.buffers.solver_accuracy
        play.buffers.solver_accuracy = moving + SMOOTHING * (mean(right) - moving)
    return samples, play.waited, metrics


def set_advantages(run, samples):
    """TRR++: A = (r - mean) / std of its (task, role) over all ranks, statistics over tokens.

    Exactly 0 where all rewards of a (task, role) are equal. The solver's are weighed by lambda of
    equation (1), --solve_weight: whitening would undo a factor of its rewards. Returns the
    sequences that count in the loss: judged ones.
    """
    solve_weight = run.settings.solve_weight
    facts = []
    for sample in samples:
        group = GROUPS.index((sample.problem.task, role_of(sample)))
        facts.append((sample.verdict.reward, group, len(sample.completion.tokens)))
    facts, mine = distributed.gather_and_place(facts)

    rewards, groups, lengths = (torch.tensor(column, device=run.device) for column in zip(*facts))
    values = grpo.advantages(rewards, groups, "trr++", lengths).tolist()
    for sample, value in zip(samples, values[mine]):
        weight = solve_weight if role_of(sample) == "solve" else 1.0
        sample.sequence.advantage = weight * value
    return judged_sequences(samples)


def role_of(sample):
    return "propose" if isinstance(sample.problem, Proposal) else "solve"


# ---- what is asked ----


def proposals_of(play, step, tasks=TASKS):
    """--prompts proposals per task, the same on all ranks."""
    rng = random.Random(f"{play.settings.seed}/{step}/propose")
    proposals = []
    for task in tasks:
        for i in range(play.settings.prompts):
            proposals.append(ask(play, task, step * STEP + i, rng))
    return proposals


def ask(play, task, number, rng):
    """A Proposal to make: induction about an earlier program of the others, else a new program.

    A new one is to differ from --references entries of the task's buffer, fewer when the prompt
    gets too long; a share --composite must build on one or two earlier programs.
    """
    settings = play.settings
    buffers = play.buffers
    id = f"propose/{task}/{number}"

    if task == "induction":
        about = rng.choice([*buffers["deduction"], *buffers["abduction"]])
        prompt = propose_prompt(task, play.language, [about], short=settings.short_prompt)
        return Proposal(id, task, prompt, program=about.program)

    references = buffers[task].draw(rng, settings.references)
    composed = ()
    if rng.random() < settings.composite:
        earlier = buffers[task].draw(rng, rng.randint(1, 2))
        composed = tuple(entry.program for entry in earlier)
    while True:
        prompt = propose_prompt(task, play.language, references, composed, settings.short_prompt)
        if len(references) <= 1 or fits(play, prompt):
            return Proposal(id, task, prompt, composed=composed, references=tuple(references))
        references = references[:-1]


def draw_entries(play, step):
    """[(task, Entry)] for the solver, --prompts per task: this step's new entries first."""
    rng = random.Random(f"{play.settings.seed}/{step}/solve")
    picked = []
    for task in TASKS:
        for entry in play.buffers[task].newest_first(rng, play.settings.prompts, step):
            picked.append((task, entry))
    return picked


def forget_changed(play, step, picked):
    """Run the earlier entries of a draw again; out of it and of the buffers with those that changed.

    Returns (the draw without them, how many they are), the same on all ranks.
    """
    earlier = list(dict.fromkeys(pair for pair in picked if pair[1].step != step))
    mine = distributed.share(earlier)
    entries = [entry for _, entry in mine]
    started = time.perf_counter()
    still = still_true(play.judge.runner, entries, step, play.settings.reward_deadline)
    play.waited += time.perf_counter() - started

    changed = set(distributed.gather([pair for pair, is_same in zip(mine, still) if not is_same]))
    for task, entry in changed:
        play.buffers[task].remove(entry)
    return [pair for pair in picked if pair not in changed], len(changed)


def puzzles_of(play, step, picked):
    """A puzzle of each (task, Entry)."""
    puzzles = []
    for i, (task, entry) in enumerate(picked):
        puzzles.append(puzzle_of(play, task, entry, f"solve/{task}/{step}/{i}"))
    return puzzles


def puzzle_of(play, task, entry, id):
    """The Puzzle of a task that an entry makes, with its prompt and one right answer."""
    answers = {
        "deduction": entry.outputs[0],
        "abduction": entry.inputs[0],
        "induction": entry.program,
    }
    puzzle = Puzzle(id, task, entry, answer=answers[task])
    question = solve_prompt(puzzle, play.language, play.settings.short_prompt)
    return replace(puzzle, question=question)


def fits(play, prompt):
    return len(play.tokenizer.encode(prompt)) <= play.settings.max_prompt_tokens


# ---- what is sampled ----


def propose(play, step, proposals):
    """Sample this rank's share of the proposals and check them -> [Proposed]."""
    runner = play.judge.runner
    mine = distributed.share(proposals)
    copied = set()  # places of the proposals that are one of their references

    def first_run(i, _, text):
        asked = mine[i]
        try:
            entry = parse_proposal(text, asked.task, play.language, asked.program, asked.composed)
            buffer = play.buffers[asked.task]
            if buffer.key(entry) in map(buffer.key, asked.references):
                copied.add(i)
            if play.settings.refuse_copies and (i in copied or entry in buffer):
                raise Refused("duplicate")
            return begin(runner, Candidate(entry))
        except Exception as error:
            return begin(runner, Candidate(reason=reason_of(error, asked.id)))

    prompts = [proposal.prompt for proposal in mine]
    sampled = sample_prompts(play, prompts, step * STEP, first_run)

    started = time.perf_counter()
    trials = [one.started for one in sampled]
    candidates = check(runner, trials, play.settings.reward_deadline)
    play.waited += time.perf_counter() - started

    proposed = []
    for i, (proposal, one, candidate) in enumerate(zip(mine, sampled, candidates)):
        entry, reason = candidate.entry, candidate.reason
        if entry is not None:
            entry = replace(entry, step=max(step, 0))
            puzzle = puzzle_of(play, proposal.task, entry, "")
            if not fits(play, puzzle.question):  # no solver could be given it
                entry, reason = None, "too_long"
        outcome = Proposed(proposal, one.completion, one.sequence, entry, reason, i in copied)
        proposed.append(outcome)
    return proposed


def estimate_accuracy(play, step, proposed):
    """Set the accuracy of --learn_samples answers to every valid proposal of this rank.

    They are sampled at the training temperature: greedy ones would all be alike, and the accuracy
    0 or 1.
    """
    valid = [one for one in proposed if one.entry is not None]
    puzzles = []
    for i, one in enumerate(valid):
        puzzles.append(puzzle_of(play, one.proposal.task, one.entry, f"learn/{i}"))

    n = play.settings.learn_samples
    answers = answer(play, puzzles, step * STEP + LEARN, n)
    for i, one in enumerate(valid):
        mine = answers[i * n : (i + 1) * n]
        right = right_or_wrong([sample.verdict for sample in mine])
        one.accuracy = mean(right) if right else None


def store(play, proposed):
    """Put every rank's valid proposals into the buffers, whatever their reward.

    Returns {task: how many were new}.
    """
    valid = []
    for one in proposed:
        if one.entry is not None:
            valid.append((one.proposal.task, one.entry))

    added = dict.fromkeys(TASKS, 0)
    for task, entry in distributed.gather(valid):
        added[task] += play.buffers[task].add(entry)
    return added


def answer(play, puzzles, first_number, n=1):
    """n answers to every puzzle, judged -> list[Sample], puzzle by puzzle."""

    def submit(i, number, text):
        return faults.submit(play.judge, puzzles[i], text, number)

    prompts = [puzzle.question for puzzle in puzzles]
    sampled = sample_prompts(play, prompts, first_number, submit, n)

    started = time.perf_counter()
    submissions = [one.started for one in sampled]
    verdicts = faults.collect(play.judge, submissions, play.settings.reward_deadline)
    play.waited += time.perf_counter() - started

    samples = []
    for one, submission, verdict in zip(sampled, submissions, verdicts):
        samples.append(Sample(submission.problem, one.completion, verdict, one.sequence))
    return samples


def sample_prompts(play, prompts, first_number, start, n=1):
    """n completions of each of this rank's prompts -> [Sampled], prompt by prompt. A collective.

    first_number: request number of the first prompt of rank 0.
    start(prompt's place, sample number, text): called as soon as a prompt's completions are there,
        so that programs run while others are still being sampled.
    """
    settings = play.settings
    tokenizer = play.tokenizer
    counts = distributed.gather([len(prompts)])
    first_number += sum(counts[: distributed.rank()])

    requests = []
    for i, prompt in enumerate(prompts):
        request = Request(
            tokenizer.encode(prompt),
            n=n,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop_ids=tokenizer.stop_ids,
            stop_strings=(ANSWER_END,),
            seed=settings.seed,
            id=first_number + i,
        )
        requests.append(request)

    groups = [[] for _ in requests]

    def on_done(i, completions):
        request = requests[i]
        for one in completions:
            sequence = Sequence(request.prompt, one.tokens, one.logprobs, group=request.id)
            text = tokenizer.decode(one.tokens)
            groups[i].append(Sampled(one, sequence, start(i, one.sample, text)))

    play.sampler.generate(requests, on_done=on_done, decode=tokenizer.decode)
    return sum(groups, [])


def proposer_sample(play, step, proposed):
    """The Sample of a proposal: its reward is how learnable it is."""
    entry = proposed.entry
    accuracy = proposed.accuracy
    if not proposed.judged:
        reward = math.nan
    elif entry is None:
        reward = play.propose_penalties.get(proposed.reason, REFUSED)
    else:
        setting = play.settings.propose_reward
        reward = proposer_reward(setting, accuracy, step, play.buffers.solver_accuracy)

    verdict = Verdict(
        problem=proposed.proposal.id,
        reward=reward,
        components={},
        correct=entry is not None,
        status=proposed.reason,
        value=None if accuracy is None else f"{accuracy:g}",
        program="" if entry is None else entry.program,
        parsed=Parsed("", "", "", format_ok=proposed.reason not in OUT_OF_FORM),
        constant=False,
        leaked=False,
    )
    return Sample(proposed.proposal, proposed.completion, verdict, proposed.sequence)
