"""Reinforcement learning of a small Qwen2.5 model on a programming language, judged by the real interpreter.

    python train.py --lang prolog                                        one process; without a GPU: the built-in small run
    torchrun --nproc_per_node=8 train.py --lang prolog                   eight GPUs: GSM8K, Qwen2.5-Coder-1.5B-Instruct
    python train.py --recipe recipes/tiny.toml --lang lisp --steps 20    a recipe, with flags on top
    python train.py --resume runs/NAME                                   go on from the last checkpoint

One step: prompts -> samples (sampler.py) -> programs run while others still sample (rewards.py, sandbox/) -> advantages and
loss (grpo.py) -> one or more updates -> the new weights go to the sampler. runs/NAME/ holds what the run leaves (logs.py).
"""

import runtime.cpu  # noqa: F401 (before torch)

# isort: split

import resource
import sys
import time
from dataclasses import asdict
from functools import partial

import torch

import gepo
import grpo
from batches import accumulate, learning_rate, score, take_step
from build import build, new_folder, restarted_run
from eval import evaluate, print_gained
from kernels.logprob import fused_policy_loss
from metrics import loss_metrics, progress, rollout_metrics
from rollout import rollout, set_advantages
from runtime import checkpoint, distributed, lora
from runtime.logs import RunLog, write_config
from sandbox import Pool
from sandbox.languages import load_language
from selfplay import loop as selfplay
from settings import parse_settings


def update(run, step, sequences):
    """All optimizer steps of one rollout -> metrics. Sequences without advantage have no gradient and are not computed (unless KL or entropy
    give them one), but their tokens stay in the denominator. When no rank has any signal, the weights stay as they are. With --gepo every
    update also takes its share of the step's groups of IR, at weight s.gepo beside RL's 1."""
    s, first_update, rate, norm, collected, on_policy, off_policy = (
        run.settings,
        run.updates,
        0.0,
        0.0,
        [],
        [],
        {},
    )
    groups = gepo.step_groups(run.groups, s, step) if s.gepo else []
    for pass_number in range(s.epochs * s.minibatches):
        # Every minibatches-th group of the whole step, so that the cut does not depend on the number of ranks.
        part = [q for q in sequences if q.group % s.minibatches == pass_number % s.minibatches]
        lengths, mine = distributed.gather_and_place([len(q.tokens) for q in part])
        weights = grpo.token_weights(s.loss, lengths, s.max_new_tokens) if lengths else []
        for sequence, weight in zip(part, weights[mine]):
            sequence.weight = weight
        active = [q for q in part if has_signal(q) or s.kl_coef or s.entropy_coef]
        preferences = groups[pass_number :: s.epochs * s.minibatches]
        if distributed.largest(len(active)) == 0 and not preferences:
            continue
        results = accumulate(
            run.model,
            active,
            lambda batch: loss_of(run, batch),
            s.token_budget,
            run.device,
            s.share_prompts,
        )
        collected += results
        if run.updates == first_update:  # the sampler still has the same weights
            on_policy = results
        if preferences:
            off_policy = gepo.add_gradient(run.model, preferences, s, run.device)
        rate = learning_rate(step, s.steps, s.lr, s.warmup, s.schedule)
        norm = take_step(run.model, run.optimizer, rate, s.max_norm)
        run.updates += 1
    return {
        "learning_rate": rate,
        "grad_norm": norm,
        **loss_metrics(collected, on_policy),
        **off_policy,
    }


def has_signal(sequence):
    return (
        any(sequence.advantage)
        if isinstance(sequence.advantage, list)
        else sequence.advantage != 0.0
    )


def loss_of(run, batch):
    """Loss of one micro-batch, and the sums behind its metrics. The loss itself is grpo.token_loss: edit it there."""
    s = run.settings

    def token_loss(logprobs, entropy, rows):
        return batch.weights[rows] * grpo.token_loss(s, logprobs, entropy, batch, rows)

    def head(hidden, weight):
        return fused_policy_loss(
            hidden[batch.predict],
            weight,
            batch.targets,
            token_loss,
            s.temperature,
            per_token=s.loss != "gspo" and not s.exact,
        )

    loss, logprobs, entropy = run.model(
        batch.tokens, batch.positions, batch.cu_seqlens, batch.parents, head
    )
    sums, gap = grpo.measure(s, logprobs, entropy, batch)
    return loss, ({**sums, "computed": len(batch.tokens)}, gap)


def train_step(run, step):
    """One whole step -> (metrics, seconds by phase, rows for samples.jsonl)."""
    s, started = run.settings, time.perf_counter()
    samples, waited, played = selfplay.play_step(run, step) if run.play else (*rollout(run), {})
    after_rollout = time.perf_counter()
    kl_in_reward = s.kl_coef and s.advantage.startswith(
        "reinforce"
    )  # then the reference speaks first
    if kl_in_reward:
        score_again(run, [x.sequence for x in samples])
    counted = (selfplay.set_advantages if run.play else set_advantages)(run, samples)
    metrics = (
        rollout_metrics(
            distributed.gather([(x.completion, x.verdict) for x in samples]),
            1 if run.play else s.samples,
            run.tokenizer.stop_ids,
        )
        | played
    )
    if not kl_in_reward:
        score_again(run, counted)
    after_scores = time.perf_counter()
    metrics.update(update(run, step, counted))
    after_update = time.perf_counter()
    refresh_sampler(run)
    now = time.perf_counter()
    marks = {
        "generate": after_rollout - started - waited,
        "reward": waited,
        "logprob": after_scores - after_rollout,
    }
    marks |= {"update": after_update - after_scores, "weights": now - after_update}
    return (
        metrics,
        timings(run, metrics, marks, now - started),
        [sample_row(run, x) for x in samples[: s.logged_samples]],
    )


def timings(run, metrics, seconds, total):
    """times.jsonl's row: seconds and shares of the phases (reward: only what sampling did not hide), rates, MFU and peak memory."""
    each = (
        4 if run.settings.lora_rank else 6
    )  # flops per parameter and token: without the weights' gradients 4; attention is not counted
    trained = metrics.get("num_train_tokens", 0.0) / distributed.world_size()
    parameters = sum(
        p.numel() for name, p in run.model.named_parameters() if ".adapter." not in name
    )
    times = {f"time/{name}": value for name, value in seconds.items()} | {"time/step": total}
    times |= {f"share/{name}": value / total for name, value in seconds.items()}
    times["perf/gen_tokens_per_s"] = metrics["num_tokens"] / seconds["generate"]
    times["perf/train_tokens_per_s"] = trained * distributed.world_size() / seconds["update"]
    times["perf/mfu"] = each * parameters * trained / seconds["update"] / run.peak_flops
    peak = (
        torch.cuda.max_memory_allocated()
        if run.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    )
    return times | {
        "perf/peak_mem_gb": peak / 1e9,
        "perf/sampler_mem_gb": run.sampler.held_bytes() / 1e9,
    }  # keys and values, kept through the update


def sample_row(run, x):
    """One line of samples.jsonl."""
    c, v, advantage = x.completion, x.verdict, x.sequence.advantage
    if isinstance(advantage, list):  # REINFORCE++: its mean over the tokens
        advantage = sum(advantage) / len(advantage)
    facts = {
        "problem": x.problem.id,
        "sample": c.sample,
        "reward": v.reward,
        "advantage": advantage,
        "status": v.status,
        "value": v.value,
    }
    return {**facts, "text": run.tokenizer.decode(c.tokens)}


def score_again(run, sequences):
    """Log-probs of the trainer and of the reference model, once per rollout, where the ratio or the KL term starts from them."""
    s = run.settings
    if s.old_logprobs == "trainer":
        for q, row in zip(
            sequences,
            score(run.model, sequences, s.token_budget, run.device, s.temperature, s.share_prompts),
        ):
            q.old_logprobs = row
    if s.kl_coef:
        with lora.disabled(run.reference or run.model) as reference:
            rows = score(
                reference, sequences, s.token_budget, run.device, s.temperature, s.share_prompts
            )
        for q, row in zip(sequences, rows):
            q.ref_logprobs = row


def refresh_sampler(run):
    """Give the sampler the new weights, one tensor at a time (never two full fp32 copies). On one CPU process it reads the
    trainer's own tensors, and only the version changes."""
    if run.sampler.model is not run.model:
        targets = dict(run.sampler.model.named_parameters())
        with torch.no_grad():
            for name, whole in lora.merged(run.model):
                targets[name].copy_(whole)
    run.sampler.load()


def held_out_pass(run):
    """Evaluate on held-out problems, spread over the ranks -> (metrics, every row)."""
    s = run.settings
    metrics, rows = evaluate(
        run.sampler,
        run.tokenizer,
        run.judge,
        run.held_out,
        prompt=run.ask,
        n=s.eval_samples,
        temperature=s.eval_temperature,
        max_new_tokens=s.max_new_tokens,
        seed=s.seed + 1,
    )
    if s.gepo:
        metrics.update(gepo.held_out_metrics(run.groups, run.model, s, run.device))
    return metrics, rows


def before_and_after(folder, first, last, started):
    """The newcomer's summary: what changed on the same held-out problems, and three programs that changed for the better."""
    (m0, rows0), (m1, rows1) = first, last
    print(f"\nheld-out problems        before      after\n{'-' * 42}")
    for key in (
        "pass@1",
        "pass@4",
        "completions/format_frac",
        "sandbox/wrong_frac",
        "sandbox/error_frac",
        "mean_tokens",
        "gepo/rank_accuracy",
        "gepo/winner_std",
    ):
        if key.startswith("gepo") and key not in m0:
            continue
        print(f"{key:<23} {m0.get(key, 0.0):>7.3f}   {m1.get(key, 0.0):>8.3f}")
    print_gained(rows0, rows1)
    print(
        f"\n{time.perf_counter() - started:.0f} s in all. Written to {folder}: metrics.jsonl, samples.jsonl, eval/, checkpoints/, source/"
    )


def save_checkpoint(run, step, log):
    state = {
        "updates": run.updates,
        "drawn": run.drawn,
        "best": run.best,
        "wandb_id": log.wandb_id,
        "seed": run.settings.seed,
    }
    texts = {"selfplay.json": run.play.buffers.to_text()} if run.play else {}
    checkpoint.save(
        run.folder / "checkpoints",
        step,
        run.model,
        run.optimizer,
        state,
        run.tokenizer_folder,
        run.settings.keep,
        run.best[1],
        texts,
    )


def evaluate_and_log(run, step, log):
    metrics, rows = held_out_pass(run)
    log.evaluation(step, rows)
    return {f"eval/{k}": v for k, v in metrics.items()}, (metrics, rows)


def loop(run, log, first_step, report):
    """Steps first_step..steps with logging, evaluation and checkpoints -> (evaluation before, evaluation after)."""
    s = run.settings
    first = last = None
    if first_step == 1:
        before, first = evaluate_and_log(run, 0, log)
        if s.gepo:
            log.step(0, {k: v for k, v in before.items() if "gepo" in k}, {})
        report(
            f"before  pass@1 {first[0]['pass@1']:.3f} on {len(run.held_out)} held-out problems ({s.eval_samples} samples each, temperature {s.eval_temperature})"
        )
    for step in range(first_step, s.steps + 1):
        metrics, times, rows = train_step(run, step)
        if step == s.steps or (s.eval_every and step % s.eval_every == 0):
            started = time.perf_counter()
            evaluated, last = evaluate_and_log(run, step, log)
            metrics.update(evaluated)
            times["time/eval"] = time.perf_counter() - started
            run.best = max(run.best, (last[0]["pass@1"], step), key=lambda pair: pair[0])
        log.step(step, metrics, times)
        log.samples(step, rows)
        report(progress(step, s.steps, metrics, times))
        if step in (s.steps, run.best[1]) or step % s.save_every == 0:
            save_checkpoint(run, step, log)
    return first, last


def start(s, resume, why, pool, language, device):
    """Set up a new or resumed run and go through its steps."""
    started = time.perf_counter()
    report = partial(print, flush=True) if distributed.rank() == 0 else lambda *_: None
    folder = resume or new_folder(s)
    report(
        f"settings from {why}; task {s.task}, language {s.lang}, model {s.model}, {distributed.world_size()} x {device.type}, sandbox {pool.level}"
    )
    run = build(s, folder, language, pool, device, report)
    found = distributed.broadcast(
        checkpoint.newest(folder / "checkpoints") if resume and distributed.rank() == 0 else None
    )
    state = (
        checkpoint.restore(found, run.model, run.optimizer)
        if found
        else {"step": 0, "updates": 0, "drawn": 0, "best": run.best, "wandb_id": None}
    )
    run.updates, run.drawn, run.best = state["updates"], state["drawn"], tuple(state["best"])
    refresh_sampler(run)
    if run.play:
        selfplay.fill(run.play, found, report)
    if distributed.first_on_node():
        write_config(folder, asdict(s), distributed.rank())
    log = RunLog(
        folder,
        asdict(s),
        distributed.rank() == 0,
        state["step"] if resume else None,
        s.wandb,
        state["wandb_id"],
    )
    try:
        first, last = loop(run, log, state["step"] + 1, report)
    finally:
        log.close()
    if first and last and distributed.rank() == 0:
        before_and_after(folder, first, last, started)


def main(arguments=None):
    s, resume, why = parse_settings(arguments, __doc__)
    languages = [load_language(name) for name in s.lang.split(",")]
    if len(languages) > 1 and s.task != "translate":
        raise SystemExit(
            f"--lang {s.lang}: only --task translate draws from several languages; name one"
        )
    with Pool(
        require=s.sandbox
    ) as pool:  # the launchers start before CUDA does: the trainer itself never forks
        device = distributed.setup()
        distributed.stop_together("\n".join(filter(None, (x.missing() for x in languages))))
        if distributed.restarted() and not resume:
            resume = distributed.broadcast(restarted_run(s))
        start(s, resume, why, pool, languages[0], device)
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(
            "\nstopped: the last checkpoint is whole; go on with python train.py --resume runs/NAME"
        )
    except (ValueError, OSError) as problem:
        sys.exit(f"train.py: {problem}")
    except RuntimeError as problem:
        if "closed by peer" not in str(problem):
            raise
        sys.exit("train.py: another rank has stopped; its own message says why")
