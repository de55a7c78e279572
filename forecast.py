"""What a run will take, said before its first step: memory, seconds, and what to make smaller.

The seconds come from a short measurement with the real weights: a few tokens of as many samples as
run together, and two or more small micro-batches. It draws from no random state and leaves nothing
behind: a run gives the same bytes with and without it.
"""

import time
from dataclasses import dataclass

import grpo
from batches import Sequence, backward, pack
from eval import prompt_ids
from runtime import distributed
from sampler import Request

# Seconds after which a measurement is not repeated with four times the work: what the first call
# of anything takes longer is little beside it.
LONG_ENOUGH = 0.3
FEW_ROWS = 4  # the fewest that cost a decode step on a CPU what they are (decode.py)
PROMPTS = 9  # of which the middle one by length is typical

# ---- rates ----


@dataclass
class Sampling:
    """Seconds of the sampler: a token of a prompt, a decode step, and a row in it."""

    prompt_token: float
    step: float
    row: float

    def seconds(self, prompt_tokens, drawn, longest, slots):
        """prompt_tokens, drawn: tokens in all. longest: of a sample, which goes on alone.

        0.1 s a step and 0.01 a row, 4 samples of 50 tokens together and one of 200: 20 + 4.
        """
        steps = max(longest, drawn / slots)
        return prompt_tokens * self.prompt_token + steps * self.step + drawn * self.row


@dataclass
class Training:
    """Seconds of forward and backward: a micro-batch of any size, and a token in it."""

    batch: float
    token: float


def line_through(small, large):
    """(seconds at 0, seconds for 1 more) of two points (count, seconds), never below 0.

    (4, 0.2) and (8, 0.3) -> (0.1, 0.025).
    """
    (few, seconds_few), (many, seconds_many) = small, large
    slope = seconds_many / many
    if many > few:
        slope = (seconds_many - seconds_few) / (many - few)
    slope = min(max(slope, 0.0), seconds_many / many)
    return seconds_many - slope * many, slope


# ---- measuring ----


def measure_sampling(sampler, prompt, rows, new_tokens, temperature):
    """Sampling of `rows` samples together; the sampler holds nothing afterwards."""

    def measure(prompt, rows):
        """The statistics of the shortest call that is long enough."""
        tokens = sampler.look_every
        while True:
            tokens = min(tokens, new_tokens)
            request = Request(prompt, n=rows, max_new_tokens=tokens, temperature=temperature)
            sampler.generate([request])
            if sampler.stats["decode_seconds"] > LONG_ENOUGH or tokens == new_tokens:
                return sampler.stats
            tokens *= 4

    if not sampler.cpu:  # kernels are compiled and graphs recorded
        sampler.generate([Request(prompt, n=rows, temperature=temperature, max_new_tokens=1)])
    whole = measure(prompt, rows)
    few = min(rows, FEW_ROWS)
    alone = measure(prompt[-FEW_ROWS:], few)  # its prompt costs next to nothing
    sampler.release()

    read = max(1, whole["prefill_tokens"])
    rate = whole["prefill_seconds"] / read
    points = []
    for rows, stats in ((few, alone), (whole["row_steps"] / whole["steps"], whole)):
        points.append((rows, stats["decode_seconds"] / stats["steps"]))
    return Sampling(rate, *line_through(*points))


def measure_training(run, prompt):
    """Training of micro-batches that look like this run's. A collective."""
    settings = run.settings
    if run.device.type == "cuda":  # kernels are compiled
        time_batch(run, some_sequences(prompt, settings, 64))
    points = [time_batch(run, some_sequences(prompt, settings, 64))]
    wanted = 192
    while True:
        points.append(time_batch(run, some_sequences(prompt, settings, wanted)))
        slowest = distributed.largest(round(1000 * points[-1][1])) / 1000
        wanted *= 4
        if slowest > LONG_ENOUGH or wanted > settings.token_budget:
            return Training(*line_through(*points[-2:]))


def time_batch(run, sequences):
    """(tokens, seconds) of the gradient of one micro-batch, which is thrown away."""
    batch = pack(sequences, run.settings.share_prompts).to(run.device)
    started = time.perf_counter()
    loss, sums = grpo.policy_loss(run.model, batch, run.settings)
    backward(loss)
    float(sums["loss"])  # waits for a GPU
    run.optimizer.zero_grad(set_to_none=True)
    return len(batch.tokens), time.perf_counter() - started


def some_sequences(prompt, settings, tokens):
    """Sequences of `tokens` tokens or a few more in all, as a step has them.

    Where not even one fits, its prompt and its completion are cut alike.
    """
    new = quarter(settings)
    share = min(1.0, tokens / (len(prompt) + new))
    kept = prompt[: max(1, round(share * len(prompt)))]
    completion = prompt[:1] * max(1, round(share * new))

    found = []
    total = 0
    while total < tokens:
        group = len(found) // settings.samples
        own = kept[group % len(kept) :]  # another prompt for each group
        fresh = len(found) % settings.samples == 0 or not settings.share_prompts
        found.append(Sequence(own, completion, [0.0] * len(completion), 1.0, group))
        total += len(completion) + fresh * len(own)
    return found


# ---- the line ----


def announce(run, need, report):
    """Say what is coming. need: memory.Need. A collective."""
    settings = run.settings
    if not settings.steps:
        return
    prompt = typical_prompt(run)
    ranks = distributed.world_size()
    prompts, drawn, trained = (-(-count // ranks) for count in step_counts(settings))
    rows = min(drawn, settings.slots)
    longest = settings.max_new_tokens
    sampling = measure_sampling(run.sampler, prompt, rows, longest, settings.temperature)
    training = measure_training(run, prompt)

    def step_seconds(new_tokens):
        read = prompts * len(prompt)
        seconds = sampling.seconds(read, drawn * new_tokens, longest, settings.slots)

        computed = trained * (len(prompt) + new_tokens)
        if settings.share_prompts:
            computed = min(computed, read + trained * new_tokens)
        batches = max(settings.minibatches, -(-computed // settings.token_budget))
        one_pass = batches * training.batch + computed * training.token
        return seconds + passes(settings) * one_pass

    def evaluation_seconds(new_tokens):
        count = -(-len(run.held_out) // ranks)
        samples = count * settings.eval_samples * new_tokens
        return sampling.seconds(count * len(prompt), samples, longest, settings.slots)

    few = quarter(settings)
    times = [step_seconds(few), step_seconds(longest)]
    evaluation = [evaluation_seconds(few), evaluation_seconds(longest)]
    report(
        f"what comes: memory {need}; a step about {span(times)}, with samples of {few} to "
        f"{longest} tokens; {settings.steps} steps {span([settings.steps * x for x in times])}, "
        f"an evaluation of {len(run.held_out)} held-out problems {span(evaluation)}. "
        f"Less time: --max_new_tokens, --prompts, --samples, --eval_problems. "
        f"Less memory: {need.smaller}"
    )


def typical_prompt(run):
    """Token ids of a held-out problem's prompt, of middle length."""
    prompts = [prompt_ids(run.tokenizer, run.ask(problem)) for problem in run.held_out[:PROMPTS]]
    return sorted(prompts, key=len)[len(prompts) // 2]


def quarter(settings):
    """What a short sample may have, where nobody knows yet."""
    return max(1, settings.max_new_tokens // 4)


def step_counts(settings):
    """(prompts, samples drawn, samples trained on) of a step of all ranks."""
    if settings.task != "selfplay":
        samples = settings.prompts * settings.samples
        return settings.prompts, samples, samples
    # Proposals and answers of three tasks; every proposal is answered to see how hard it is.
    proposals = 3 * settings.prompts
    return 3 * proposals, proposals * (2 + settings.learn_samples), 2 * proposals


def passes(settings):
    """Forward and backward over a step's tokens; a forward alone is a third of it or less."""
    scores = (settings.old_logprobs == "trainer") + bool(settings.kl_coef)
    return settings.epochs + scores / (4 if settings.gradient_checkpointing else 3)


def span(seconds):
    """'4 to 12 min', in the unit of the longer one."""
    low, high = seconds
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if high >= 2 * size or unit == "s":
            return f"{low / size:.2g} to {high / size:.2g} {unit}"
