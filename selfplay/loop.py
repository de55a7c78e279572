"""Absolute-Zero self-play (Zhao et al. 2025; for Racket and Julia: Inoue & Tsuruoka): one model proposes puzzles and solves them.

One step, for each of deduction (program, input -> output), abduction (program, output -> input) and induction (pairs -> program):
propose -> check in two processes (proposals.py) -> m answers at training temperature tell how learnable a proposal is -> the new entries go
to the buffers -> solve puzzles from the buffers -> rewards (2), (3), (4) -> advantages per (task, role), TRR++.
"""

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
from sampler import Request
from selfplay import triples
from selfplay.buffers import Buffers, add_seeds
from selfplay.judge import SolveJudge
from selfplay.parse import parse_proposal
from selfplay.prompts import propose_prompt, solve_prompt
from selfplay.proposals import REASONS, TASKS, Entry, Puzzle, Refused, begin, check
from tasks.multipl_e import TestJudge, benchmark_prompt, load_benchmark
from tasks.verdicts import Parsed, Verdict

REWARDS = ("eq3", "eq4", "switch", "blend")
ROLES = ("propose", "solve")
SEED_ROUNDS, IDLE_ROUNDS = (
    40,
    4,
)  # most rounds of --prompts seed proposals, and how many may give nothing new before the model goes on with what there is
STEP = 1 << 24  # request numbers of a step; seeding comes before all steps, in negative numbers


@dataclass(frozen=True)
class Proposal:
    """What a proposer was asked."""

    id: str
    task: str
    prompt: str
    program: str = ""  # induction: the one it is about
    composed: tuple = ()


class Play:
    """The state of self-play: the buffers (the same on all ranks) and what judges it."""

    def __init__(self, settings, language, pool, sampler, tokenizer):
        self.settings, self.language, self.sampler, self.tokenizer = (
            settings,
            language,
            sampler,
            tokenizer,
        )
        self.judge = SolveJudge(pool, language)
        self.buffers = Buffers(settings.buffer_size, language)
        self.waited = 0.0  # seconds of this step for programs that sampling did not hide


def check_settings(s):
    """ValueError with one sentence for what is wrong, before any model is made."""
    if s.propose_reward.partition(":")[0] not in REWARDS:
        raise ValueError(f"unknown --propose_reward {s.propose_reward!r}: use {', '.join(REWARDS)}")
    if not 0 <= s.composite <= 1:
        raise ValueError(f"--composite {s.composite} is no share: use a number from 0 to 1")
    for path in filter(None, s.seeds.split(",")):
        if not Path(path).is_file():
            raise ValueError(
                f"--seeds {path} does not exist: give JSON lines of programs with inputs, or leave it out"
            )


# ---- rewards ----


def equation_3(accuracy):
    """1 - acc between 0 and 1, -0.5 at 0 and 1, -1 for an invalid proposal (accuracy None): 0.25 -> 0.75; nan (not judged) stays nan."""
    if accuracy is None:
        return -1.0
    if accuracy != accuracy:
        return accuracy
    return 1.0 - accuracy if 0 < accuracy < 1 else -0.5


def equation_4(accuracy):
    """0.5 + 2 acc (1 - acc) for a valid proposal, else -1: 0 -> 0.5, 0.25 -> 0.875, 0.5 -> 1."""
    return -1.0 if accuracy is None else 0.5 + 2 * accuracy * (1 - accuracy)


def proposer_reward(kind, accuracy, step, switch_step, solver_accuracy):
    """Reward of a proposal whose solvers are right with rate `accuracy` (None: it was refused).

    switch: (3) up to and with switch_step, then (4), the paper's best (64). blend: (1 - w) (3) + w (4), w the solver's moving accuracy: the
    paper proposes to move smoothly with it and does not try; strict while the solver is weak, paying for validity as it grows.
    """
    if kind == "switch":
        kind = "eq3" if step <= switch_step else "eq4"
    share = {"eq3": 0.0, "eq4": 1.0}.get(kind, solver_accuracy)
    return (1 - share) * equation_3(accuracy) + share * equation_4(accuracy)


def mean_accuracy(verdicts):
    """Share of right answers among those that could be judged, or nan."""
    judged = [v.correct for v in verdicts if v.status != "sandbox_error"]
    return sum(judged) / len(judged) if judged else float("nan")


# ---- prompts of a step ----


def fits(play, prompt):
    return len(play.tokenizer.encode(prompt)) <= play.settings.max_prompt_tokens


def ask(play, task, number, rng):
    """A Proposal to make: K references from the task's buffer, fewer when the prompt gets too long; induction: a program of the others'."""
    s, buffers = play.settings, play.buffers
    id = f"propose/{task}/{number}"
    if task == "induction":
        about = rng.choice(
            [*buffers["deduction"].entries.values(), *buffers["abduction"].entries.values()]
        )
        return Proposal(
            id,
            task,
            propose_prompt(task, play.language, [about], short=s.short_prompt),
            about.program,
        )
    references = buffers[task].draw(rng, s.references)
    composed = (
        tuple(e.program for e in buffers[task].draw(rng, rng.randint(1, 2)))
        if rng.random() < s.composite
        else ()
    )
    while (
        not fits(
            play,
            prompt := propose_prompt(task, play.language, references, composed, s.short_prompt),
        )
        and len(references) > 1
    ):
        references = references[:-1]
    return Proposal(id, task, prompt, composed=composed)


def proposal_list(play, step, tasks=TASKS):
    """--prompts proposals per task, the same on all ranks."""
    rng = random.Random(f"{play.settings.seed}/{step}/propose")
    return [
        ask(play, task, step * STEP + i, rng)
        for task in tasks
        for i in range(play.settings.prompts)
    ]


def solve_list(play, step):
    """--prompts puzzles per task: this step's new entries first."""
    rng = random.Random(f"{play.settings.seed}/{step}/solve")
    picked = [
        (task, e)
        for task in TASKS
        for e in play.buffers[task].newest_first(rng, play.settings.prompts, step)
    ]
    return [
        puzzle(play, task, entry, f"solve/{task}/{step}/{i}")
        for i, (task, entry) in enumerate(picked)
    ]


def puzzle(play, task, entry, id):
    found = Puzzle(id, task, entry)
    answer = (
        entry.program
        if task == "induction"
        else entry.outputs[0]
        if task == "deduction"
        else entry.inputs[0]
    )
    return replace(
        found,
        question=solve_prompt(found, play.language, play.settings.short_prompt),
        answer=answer,
    )


# ---- one step ----


def sample(play, prompts, first_id, start, n=1):
    """n completions of every prompt -> (requests, completions prompt by prompt, what start(prompt number, sample, text) gave for each, in order).

    first_id: request number of the first (draws depend on it, so numbers must not repeat). start is called as soon as a prompt's
    completions are there, so that programs run while others are still being sampled.
    """
    s, stop, started = play.settings, play.tokenizer.stop_ids, [[] for _ in prompts]
    requests = [
        Request(
            play.tokenizer.encode(text),
            n,
            s.max_new_tokens,
            s.temperature,
            stop_ids=stop,
            seed=s.seed,
            id=first_id + i,
        )
        for i, text in enumerate(prompts)
    ]

    def on_done(i, completions):
        started[i] = [start(i, c.sample, play.tokenizer.decode(c.tokens)) for c in completions]

    groups = play.sampler.generate(requests, on_done=on_done)
    return requests, [c for group in groups for c in group], [x for group in started for x in group]


def propose(play, step, wanted):
    """Sample this rank's share of the proposals and check them -> [(Proposal, Request, Completion, Entry or Refused)]."""
    start = len(wanted) * distributed.rank() // distributed.world_size()
    mine, runner = distributed.share(wanted), play.judge.runner

    def first_run(i, _, text):
        candidate = parsed(play, mine[i], text)
        return candidate, begin(runner, candidate)

    requests, completions, started = sample(
        play, [p.prompt for p in mine], step * STEP + start, first_run
    )
    sampled = time.perf_counter()
    entries = check(
        runner,
        [candidate for candidate, _ in started],
        play.settings.reward_deadline,
        [run for _, run in started],
    )
    play.waited += time.perf_counter() - sampled
    entries = [solvable(play, p.task, e) for p, e in zip(mine, entries)]
    return [
        (p, r, c, e if isinstance(e, Refused) else replace(e, step=max(step, 0)))
        for p, r, c, e in zip(mine, requests, completions, entries)
    ]


def parsed(play, proposal, text):
    try:
        return parse_proposal(
            text, proposal.task, play.language, proposal.program, proposal.composed
        )
    except Refused as reason:
        return reason


def solvable(play, task, entry):
    """A puzzle whose prompt is longer than --max_prompt_tokens cannot be given to a solver."""
    long = isinstance(entry, Entry) and not fits(
        play, solve_prompt(Puzzle("", task, entry), play.language, play.settings.short_prompt)
    )
    return Refused("too_long") if long else entry


def learnability(play, step, proposed):
    """Accuracy of --learn_samples answers to every valid proposal of this rank, sampled at the training temperature (greedy ones would
    all be alike, and the accuracy 0 or 1: methods.md 3.3) -> [accuracy, nan (not judged) or None (refused)]."""
    valid = [i for i, (*_, entry) in enumerate(proposed) if isinstance(entry, Entry)]
    puzzles = [puzzle(play, proposed[i][0].task, proposed[i][3], f"learn/{i}") for i in valid]
    start = sum(distributed.gather([len(valid)])[: distributed.rank()])
    *_, verdicts = answers(
        play, puzzles, step * STEP + STEP // 4 + start, play.settings.learn_samples
    )
    m, found = play.settings.learn_samples, [None] * len(proposed)
    for n, i in enumerate(valid):
        found[i] = mean_accuracy(verdicts[n * m : (n + 1) * m])
    return [
        float("nan") if str(e) == "sandbox_error" and isinstance(e, Refused) else a
        for a, (*_, e) in zip(found, proposed)
    ]


def answers(play, puzzles, first_id, n=1):
    """n answers to every puzzle -> (requests, completions, verdicts)."""
    submit = lambda i, number, text: play.judge.submit(puzzles[i], text, number)
    requests, completions, submissions = sample(
        play, [p.question for p in puzzles], first_id, submit, n
    )
    sampled = time.perf_counter()
    verdicts = play.judge.collect(submissions, play.settings.reward_deadline)
    play.waited += time.perf_counter() - sampled
    return requests, completions, verdicts


def store(play, proposed):
    """Put every rank's valid proposals into the buffers, whatever their reward -> {task: how many were new}."""
    found = distributed.gather([(p.task, e) for p, _, _, e in proposed if isinstance(e, Entry)])
    return {task: sum(play.buffers[task].add(e) for t, e in found if t == task) for task in TASKS}


def rollout(run, step):
    """This rank's samples of a step, proposers' and solvers' -> (list[Sample], seconds waited for programs, metrics)."""
    play, run.play.waited = run.play, 0.0
    proposed = propose(play, step, proposal_list(play, step))
    accuracies = learnability(play, step, proposed)
    added = store(play, proposed)
    puzzles = solve_list(play, step)
    start = len(puzzles) * distributed.rank() // distributed.world_size()
    mine = distributed.share(puzzles)
    requests, completions, verdicts = answers(play, mine, step * STEP + STEP // 2 + start)
    proposers = [
        proposer_sample(play, step, *one, accuracy) for one, accuracy in zip(proposed, accuracies)
    ]
    solvers = [
        Sample(p, c, v, Sequence(r.prompt, c.tokens, c.logprobs, group=r.id))
        for p, r, c, v in zip(mine, requests, completions, verdicts)
    ]
    everyone = distributed.gather(
        [(x.problem.task, role_of(x), x.verdict) for x in [*proposers, *solvers]]
    )
    metrics = play_metrics(play, everyone, distributed.gather(accuracies), added)
    correct = mean_accuracy([v for _, role, v in everyone if role == "solve"])
    if correct == correct:
        play.buffers.solver_accuracy += 0.1 * (correct - play.buffers.solver_accuracy)
    samples = [*proposers, *solvers]
    pairs = distributed.gather([(x.completion, x.verdict) for x in samples])
    return samples, play.waited, rollout_metrics(pairs, 1, play.tokenizer.stop_ids) | metrics


def proposer_sample(play, step, proposal, request, completion, entry, accuracy):
    s, refused = play.settings, isinstance(entry, Refused)
    kind, _, switch_step = s.propose_reward.partition(":")
    reward = proposer_reward(
        kind, accuracy, step, int(switch_step or 64), play.buffers.solver_accuracy
    )
    status = str(entry) if refused else "ok"
    value = None if accuracy is None or accuracy != accuracy else f"{accuracy:g}"
    form = Parsed(
        "", "", "", status not in ("format", "no_program", "no_input", "few_inputs", "no_message")
    )
    program = "" if refused else entry.program
    verdict = Verdict(
        proposal.id, reward, {}, not refused, status, value, program, form, False, False
    )
    return Sample(
        proposal,
        completion,
        verdict,
        Sequence(request.prompt, completion.tokens, completion.logprobs, group=request.id),
    )


def role_of(x):
    return "propose" if isinstance(x.problem, Proposal) else "solve"


def set_advantages(run, samples):
    """TRR++: A = (r - mean) / std of its (task, role) over all ranks, statistics over tokens; exactly 0 where all rewards of a (task, role)
    are equal -> the sequences that count: judged ones."""
    facts = [
        (
            x.verdict.reward,
            TASKS.index(x.problem.task) * 2 + ROLES.index(role_of(x)),
            len(x.completion.tokens),
        )
        for x in samples
    ]
    facts, mine = distributed.gather_and_place(facts)
    rewards, rows, lengths = zip(*facts)
    values = grpo.advantages(
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(rows),
        "trr++",
        torch.tensor(lengths),
    ).tolist()
    for x, value in zip(samples, values[mine]):
        x.sequence.advantage = value
    return judged_sequences(samples)


def play_metrics(play, everyone, accuracies, added):
    """Solve rates and rewards apart, refusals by reason, the buffers, and how learnable the proposals were."""
    found, mean = {}, lambda values: sum(values) / len(values) if values else float("nan")
    for task in TASKS:
        for role in ROLES:
            verdicts = [v for t, r, v in everyone if (t, r) == (task, role)]
            name = "valid_frac" if role == "propose" else "accuracy"
            found[f"{role}/{name}/{task}"] = mean_accuracy(verdicts)
            found[f"{role}/reward/{task}"] = mean(
                [v.reward for v in verdicts if v.reward == v.reward]
            )
        found[f"buffer/{task}"] = float(len(play.buffers[task]))
        found[f"buffer/{task}_added"] = float(added[task])
    rows = [
        {v.reward for t, r, v in everyone if (t, r) == (task, role) and v.reward == v.reward}
        for task in TASKS
        for role in ROLES
    ]
    found["frac_reward_zero_std"] = mean(
        [len(rewards) < 2 for rewards in rows]
    )  # of the six (task, role)
    proposals = [v for _, role, v in everyone if role == "propose"]
    found["propose/valid_frac"] = mean_accuracy(proposals)
    found["solve/accuracy"] = mean_accuracy([v for _, role, v in everyone if role == "solve"])
    found["solve/accuracy_moving"] = play.buffers.solver_accuracy
    for reason in REASONS:
        found[f"refused/{reason}"] = float(sum(v.status == reason for v in proposals))
    known = [a for a in accuracies if a is not None and a == a]
    found["learn/accuracy"] = mean(known)
    found["learn/none_right_frac"] = mean([a == 0 for a in known])
    found["learn/all_right_frac"] = mean([a == 1 for a in known])
    for low in (0.0, 0.25, 0.5, 0.75):  # between never and always: what equation (3) pays for
        found[f"learn/from_{low:g}_frac"] = mean(
            [0 < a < 1 and low <= a < low + 0.25 for a in known]
        )
    return found


# ---- seeds ----


def fill(play, checkpoint, report):
    """The buffers of a checkpoint, the same on every rank, or new seeds when there is none."""
    if checkpoint is None:
        return seed(play, report)
    play.buffers.from_text(
        distributed.broadcast(
            (checkpoint / "selfplay.json").read_text("utf-8") if distributed.rank() == 0 else None
        )
    )


def seed(play, report):
    """Fill the empty buffers: the identity function, then the rows of --seeds, or what the model itself proposes from it; no gradient."""
    s, call = play.settings, play.language.call
    identity = Entry(call["identity"], (call["hello"],), (call["hello"],))
    for task in ("deduction", "abduction"):
        play.buffers[task].add(identity)
    for path in filter(None, s.seeds.split(",") if distributed.rank() == 0 else []):
        refused = add_seeds(
            play.buffers, path, play.judge.runner, s.seed_problems, s.reward_deadline
        )
        report(
            f"seeds from {path}: {', '.join(f'{len(b)} {task}' for task, b in play.buffers.items())}; refused: {refused or 'none'}"
        )
    play.buffers.from_text(
        distributed.broadcast(play.buffers.to_text())
    )  # one rank judged the file: a busy machine cannot make them differ
    for tasks in (("deduction", "abduction"), ("induction",)):
        if not s.seeds or any(len(play.buffers[task]) == 0 for task in tasks):
            seed_itself(play, tasks, report)


def seed_itself(play, tasks, report):
    """Rounds of proposals from what is there. Deduction and abduction start from the same programs."""
    count, counts, idle = play.settings.seed_problems, {}, 0
    for round_number in range(SEED_ROUNDS):
        before = len(play.buffers[tasks[0]])
        if before >= count or idle == IDLE_ROUNDS:
            break
        step = -1 - round_number - (SEED_ROUNDS if tasks == ("induction",) else 0)
        proposed = propose(play, step, proposal_list(play, step, tasks))
        for entry in distributed.gather([e for *_, e in proposed]):
            reason = str(entry) if isinstance(entry, Refused) else "ok"
            counts[reason] = counts.get(reason, 0) + 1
            for task in tasks if isinstance(entry, Entry) else ():
                if len(play.buffers[task]) < count:
                    play.buffers[task].add(entry)
        idle = idle + 1 if len(play.buffers[tasks[0]]) == before else 0
    lengths = ", ".join(f"{len(play.buffers[task])} {task}" for task in tasks)
    report(
        f"seeds by the model itself, round {round_number + 1}: {lengths} of {count}; proposals: {dict(sorted(counts.items()))}"
    )
    if len(play.buffers[tasks[0]]) == 0:
        raise SystemExit(
            "the model gave no valid seed: warm-start it (sft.py --task selfplay), or give a file by --seeds"
        )


# ---- evaluation in the loop ----


def load_evaluation(s, language, pool):
    """(problems, judge, prompt of a problem) of --eval_bench: triples (built in), humaneval or mbpp of MultiPL-E with the paper's prompt."""
    check_settings(s)
    if s.eval_bench == "triples":
        return (
            triples.held_out_triples(language, s.eval_problems),
            SolveJudge(pool, language),
            lambda p: solve_prompt(p, language, s.short_prompt),
        )
    rows = load_benchmark(s.eval_bench, language, s.data or None, count=s.eval_problems)
    return (
        rows,
        TestJudge(pool, language, "think"),
        lambda p: benchmark_prompt(p, language, "think"),
    )
