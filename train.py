"""Reinforcement learning of a small Qwen2.5 model on a language, judged by its interpreter.

    python train.py --lang prolog                             one process; no GPU: the built-in run
    torchrun --nproc_per_node=8 train.py --lang prolog        eight GPUs: GSM8K, Qwen2.5-Coder-1.5B
    python train.py --recipe recipes/tiny.toml --steps 20     a recipe, with flags on top
    python train.py --resume runs/NAME                        continue from the last checkpoint

One step: prompts -> samples (sampler.py) -> programs, which run while others still sample
(rewards.py, sandbox/) -> advantages and loss (grpo.py) -> one or more updates -> the new weights go
to the sampler. runs/NAME/ holds what the run leaves (runtime/logs.py).
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict

import torch

import forecast
import gepo
import grpo
from batches import backward, learning_rate, micro_batches, packed_batches, score, take_step
from bench.report import report_page
from build import build, new_folder, restarted_run
from eval import before_and_after, evaluate
from metrics import loss_metrics, progress, timings
from runtime import checkpoint, distributed, hugging_face, lora
from runtime.logs import RunLog, add_start, write_config
from sandbox import Pool
from sandbox.languages import load_language
from settings import parse_settings

LOGGED_SAMPLES = 8  # of a step, in samples.jsonl
MOST_SKIPPED = 3  # steps in a row whose gradient is not finite

# ---- one step ----


def train_step(run, step):
    """One whole step: (metrics, times, rows for samples.jsonl)."""
    timer = Timer()

    with timer("generate"):
        samples, waited, metrics = run.task.rollout(run, step)
    if run.device.type == "cpu":  # its packed weights and pages make room for the update
        run.sampler.release()

    golds = []
    if run.settings.gold:
        golds = run.task.gold_sequences(run, samples)
        metrics["gold/sequences"] = sum(distributed.gather([len(golds)]))
    with timer("logprob"):
        score_again(run, [sample.sequence for sample in samples] + golds)

    with timer("advantages"):
        sequences = run.task.set_advantages(run, samples) + golds

    with timer("update"):
        metrics |= update(run, step, sequences)

    with timer("weights"):
        refresh_sampler(run)

    # Of the programs' time only what sampling did not hide.
    timer.seconds["generate"] -= waited
    timer.seconds["reward"] = waited
    rows = [sample_row(run, sample) for sample in samples[:LOGGED_SAMPLES]]
    return metrics, timings(run, metrics, timer.seconds), rows


class Timer:
    """Seconds of a step's phases by name."""

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, phase):
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started


def score_again(run, sequences):
    """Log-probs that the ratio or the KL starts from: the trainer's own, the reference model's."""
    settings = run.settings
    how = (settings.token_budget, run.device, settings.temperature, settings.share_prompts)
    if settings.old_logprobs == "trainer":
        for sequence, row in zip(sequences, score(run.model, sequences, *how)):
            sequence.old_logprobs = row
            sequence.logprobs = sequence.logprobs or row  # nobody has sampled what is known
    if settings.kl_coef or settings.teacher:
        with lora.disabled(run.reference or run.model) as reference:
            rows = score(reference, sequences, *how)
        for sequence, row in zip(sequences, rows):
            sequence.ref_logprobs = row


def update(run, step, sequences):
    """All optimizer steps of one rollout; returns their metrics.

    Sequences without advantage have no gradient and are not computed (unless KL or entropy give
    them one), but their tokens stay in the denominator. When no rank has any signal, the weights
    stay as they are. With --gepo every update with signal also takes its share of the step's groups
    of IR, at weight settings.gepo beside RL's 1.
    """
    settings = run.settings
    groups = gepo.step_groups(run.groups, settings, step) if settings.gepo else []
    passes = settings.epochs * settings.minibatches
    updates_before = run.updates
    rate = 0.0
    norm = 0.0
    skipped = 0
    measured = []  # metrics.measure of every micro-batch
    same_weights = 0  # how many of them before the first update: the sampler's weights
    preference_metrics = gepo.not_taken(settings)

    for number in range(passes):
        # Every minibatches-th group of the whole step, so that the cut does not depend on the
        # ranks.
        turn = number % settings.minibatches
        part = [x for x in sequences if x.group % settings.minibatches == turn]
        set_weights(part, settings)
        active = [x for x in part if needs_gradient(x, settings)]
        preferences = gepo.in_turn(groups[number::passes], part, settings)
        if distributed.largest(len(active)) == 0 and not preferences:
            continue

        parts = micro_batches(active, settings.token_budget, settings.share_prompts)
        for batch in packed_batches(parts, run.device, settings.share_prompts):
            loss, sums = grpo.policy_loss(run.model, batch, settings)
            backward(loss)
            if not batch.filler:
                measured.append(sums)
        if run.updates == updates_before:
            same_weights = len(measured)
        if preferences:
            preference_metrics = gepo.add_gradient(run.model, preferences, settings, run.device)

        rate = learning_rate(step, settings.steps, settings.lr, settings.warmup, settings.schedule)
        norm = take_step(run.model, run.optimizer, rate, settings.max_norm)
        skipped += not math.isfinite(norm)
        run.updates += 1

    metrics = {"learning_rate": rate, "grad_norm": norm, "skipped_updates": float(skipped)}
    return metrics | loss_metrics(measured, same_weights) | preference_metrics


def set_weights(sequences, settings):
    """Give each sequence its factor in the loss: the denominator counts all ranks' sequences."""
    lengths, mine = distributed.gather_and_place([len(x.tokens) for x in sequences])
    if not lengths:
        return
    weights = grpo.token_weights(settings.loss, lengths, settings.max_new_tokens)
    for sequence, weight in zip(sequences, weights[mine]):
        sequence.weight = weight


def needs_gradient(sequence, settings):
    if settings.kl_coef or settings.entropy_coef:
        return True
    if isinstance(sequence.advantage, list):
        return any(sequence.advantage)
    return sequence.advantage != 0.0


def refresh_sampler(run):
    """Give the sampler the new weights, one tensor at a time (never two full fp32 copies).

    One process samples with the trainer's own tensors, and only the version changes.
    """
    if run.sampler.model is not run.model:
        targets = dict(run.sampler.model.named_parameters())
        with torch.no_grad():
            for name, whole in lora.merged(run.model):
                targets[name].copy_(whole)
    run.sampler.load()


# ---- what a step reports ----


def sample_row(run, sample):
    """One line of samples.jsonl."""
    advantage = sample.sequence.advantage
    if isinstance(advantage, list):  # REINFORCE++: the mean over its tokens
        advantage = sum(advantage) / len(advantage)
    return {
        "problem": sample.problem.id,
        "sample": sample.completion.sample,
        "reward": sample.verdict.reward,
        "advantage": advantage,
        "correct": sample.verdict.correct,
        "status": sample.verdict.status,
        "value": sample.verdict.value,
        "text": run.tokenizer.decode(sample.completion.tokens),
    }


# ---- evaluation and checkpoints in the loop ----


def evaluate_and_log(run, step, log):
    """Evaluate on held-out problems, which are only reported: (metrics, every row).

    metrics and rows are of --eval_samples at --eval_temperature; with --eval_greedy the greedy
    ones' metrics stand beside them, as greedy/pass@1, and their rows in greedy/step_N.jsonl.
    """
    greedy = {}
    if run.settings.eval_greedy and run.settings.eval_temperature:
        greedy, rows = evaluate_problems(run, run.held_out, run.judge, run.ask, greedy=True)
        log.evaluation(step, rows, "greedy")
    metrics, rows = evaluate_problems(run, run.held_out, run.judge, run.ask)
    metrics |= named("greedy", greedy)
    if run.settings.gepo:
        metrics |= gepo.held_out_metrics(run.groups, run.model, run.settings, run.device)
    log.evaluation(step, rows)
    return metrics, rows


def choose_best(run, step, log):
    """Evaluate on the validation problems, which alone decide what the best checkpoint is."""
    chosen = run.validation
    metrics, rows = evaluate_problems(run, chosen.problems, chosen.judge, chosen.ask)
    log.evaluation(step, rows, "validation")
    if metrics["pass@1"] > run.best[0]:
        run.best = (metrics["pass@1"], step)
    return named("validation", metrics)


def evaluate_problems(run, problems, judge, ask, greedy=False):
    """(metrics, every row) of the policy on problems, spread over the ranks."""
    settings = run.settings
    return evaluate(
        run.sampler,
        run.tokenizer,
        judge,
        problems,
        prompt=ask,
        n=1 if greedy else settings.eval_samples,
        temperature=0.0 if greedy else settings.eval_temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed + 1,
    )


def named(kind, metrics):
    return {f"{kind}/{name}": value for name, value in metrics.items()}


def save_checkpoint(run, step, log, unlogged=None):
    """unlogged: the step's (metrics, times), when its evaluation is still to come."""
    state = {
        "updates": run.updates,
        "drawn": run.curriculum.drawn,
        "rates": run.curriculum.rates,
        "best": run.best,
        "wandb_id": log.wandb_id,
        "seed": run.settings.seed,
        "unlogged": unlogged,
    }
    checkpoint.save(
        run.folder / "checkpoints",
        step,
        run.model,
        run.optimizer,
        state,
        tokenizer_from=run.tokenizer_folder,
        keep=run.settings.keep,
        best=run.best[1],
        texts={"selfplay.json": run.play.buffers.to_text()} if run.play else {},
        base=hugging_face.lasting_name(run.settings.model, run.tokenizer_folder),
    )


# ---- a run ----


def loop(run, log, state, report):
    """The steps after the one of `state`, with logging, evaluation and checkpoints.

    Returns (evaluation before training, evaluation after), each (metrics, rows) or None.
    """
    settings = run.settings
    before = after = None
    if state["step"] == 0:
        before = evaluate_and_log(run, 0, log)
        if settings.gepo:
            known = named("eval", before[0])
            log.step(0, {name: known[name] for name in known if "gepo" in name}, {})
        report(
            f"before  pass@1 {before[0]['pass@1']:.3f} on {len(run.held_out)} held-out problems "
            f"({settings.eval_samples} samples each, temperature {settings.eval_temperature})"
        )
    elif state["unlogged"]:  # its checkpoint was written before its evaluation
        after = finish_step(run, log, state["step"], *state["unlogged"], report)

    skipped_in_a_row = 0
    for step in range(state["step"] + 1, settings.steps + 1):
        metrics, times, rows = train_step(run, step)
        log.samples(step, rows)
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped_updates"] else 0
        if skipped_in_a_row:
            say_skipped(step, metrics, skipped_in_a_row, report)

        # Saved first: what interrupts an evaluation costs no step.
        is_last = step == settings.steps
        evaluates = is_last or (settings.eval_every > 0 and step % settings.eval_every == 0)
        saves = is_last or step % settings.save_every == 0
        if saves and evaluates:
            save_checkpoint(run, step, log, unlogged=(metrics, times))
        if evaluates:
            after = finish_step(run, log, step, metrics, times, report)
        else:
            log_step(run, log, step, metrics, times, report)
        if (saves and not evaluates) or (step == run.best[1] and not saves):
            save_checkpoint(run, step, log)
    return before, after


def say_skipped(step, metrics, steps_in_a_row, report):
    """A gradient that is nan or infinite changes nothing; a run of such steps is not a run."""
    report(
        f"step {step}: {metrics['skipped_updates']:.0f} updates skipped, the gradient's norm is "
        f"{metrics['grad_norm']}; the weights stay as they were"
    )
    if steps_in_a_row == MOST_SKIPPED:
        raise ValueError(
            f"{MOST_SKIPPED} steps in a row had a gradient that is not finite: lower --lr or "
            "--max_norm, or look at the starting checkpoint; continue from an earlier checkpoint"
        )


def finish_step(run, log, step, metrics, times, report):
    """Evaluate after a step and log it; returns the held-out evaluation (metrics, rows)."""
    started = time.perf_counter()
    evaluation = evaluate_and_log(run, step, log)
    metrics = metrics | named("eval", evaluation[0])
    if run.validation:
        metrics |= choose_best(run, step, log)
    times["time/eval"] = time.perf_counter() - started
    log_step(run, log, step, metrics, times, report)
    return evaluation


def log_step(run, log, step, metrics, times, report):
    log.step(step, metrics, times)
    report(progress(step, run.settings.steps, metrics, times))


def start(settings, resume, origin, pool, language, device):
    """Set up a new or resumed run and go through its steps."""
    started = time.perf_counter()
    first_rank = distributed.rank() == 0

    def report(text):
        if first_rank:
            print(text, flush=True)

    folder = resume or new_folder(settings)
    report(
        f"settings from {origin.sentence}; task {settings.task}, language {settings.lang}, model "
        f"{settings.model}, {distributed.world_size()} x {device.type}, sandbox {pool.level}"
    )
    run = build(settings, folder, language, pool, device, report)

    # A new run, or what the newest whole checkpoint says of an old one.
    found = None
    if resume and first_rank:
        found = checkpoint.newest(folder / "checkpoints")
    found = distributed.broadcast(found)
    state = {"step": 0, "wandb_id": None, "unlogged": None}
    if found:
        state = checkpoint.restore(found, run.model, run.optimizer)
        run.updates, run.best = state["updates"], tuple(state["best"])
        run.curriculum.drawn, run.curriculum.rates = state["drawn"], state.get("rates", {})
    refresh_sampler(run)
    forecast.announce(run, report)
    if run.play:
        run.task.fill(run.play, found, report)

    config = asdict(settings)
    if distributed.first_on_node():
        write_config(folder, config, distributed.rank())
    if first_rank:
        add_start(folder, config, origin)
    log = RunLog(folder, config, first_rank, settings.wandb, state["wandb_id"])
    if resume:
        # The row of a step whose evaluation is repeated is written again.
        log.cut(samples=state["step"], metrics=state["step"] - bool(state["unlogged"]))
    try:
        before, after = loop(run, log, state, report)
    finally:
        log.close()
    if first_rank:
        if before and after:
            before_and_after(before, after)
        report(f"\n{time.perf_counter() - started:.0f} s in all. {report_page(folder)}")


def main(arguments=None):
    settings, resume, origin = parse_settings(arguments, __doc__)
    languages = [load_language(name) for name in settings.lang.split(",")]
    if len(languages) > 1 and settings.task != "translate":
        raise SystemExit(
            f"--lang {settings.lang}: only --task translate draws from several languages; name one"
        )
    # The launchers start before CUDA does: the trainer itself never forks.
    with Pool(require=settings.sandbox) as pool:
        device = distributed.setup()
        missing = [sentence for language in languages if (sentence := language.missing())]
        distributed.stop_together("\n".join(missing))
        if distributed.restarted() and not resume:
            resume = distributed.broadcast(restarted_run(settings))
        start(settings, resume, origin, pool, languages[0], device)
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(
            "\nstopped: the last checkpoint is whole; "
            "continue with python train.py --resume runs/NAME"
        )
    except (ValueError, OSError) as problem:
        sys.exit(f"train.py: {problem}")
    except RuntimeError as problem:
        if "closed by peer" not in str(problem):
            raise
        sys.exit("train.py: another rank has stopped; its own message says why")
