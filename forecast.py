"""What a run will take, said before its first step: memory, seconds, and what to make smaller.

The seconds come from a short measurement with the real weights: a few tokens of as many samples as
run together, and two or more small micro-batches. It draws from no random state and leaves nothing
behind: a run gives the same bytes with and without it.
"""

import time
from dataclasses import dataclass

import grpo
from batches import Sequence, backward, micro_batches, pack
from runtime import distributed
from sampler import Request

# Seconds after which a measurement is not repeated with four times the work: what the first call
# of anything takes longer is little beside it.
LONG_ENOUGH = 0.3
# Tokens of the first micro-batches: one that nobody times, and the next larger.
COLD_TOKENS = 32
WARM_TOKENS = 160
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

    def seconds(self, parts, share_prompts):
        """Of a step's micro-batches (batches.micro_batches), where all groups have a signal."""
        tokens = sum(len(pack(part, share_prompts).tokens) for part in parts)
        return len(parts) * self.batch + tokens * self.token


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
    """Sampling of `rows` samples of a prompt together."""

    def measure(prompt, rows):
        """The statistics of the shortest call that is long enough; its first step is cold."""
        tokens = 2 * sampler.chunk
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
    few = measure(prompt[-FEW_ROWS:], min(rows, FEW_ROWS))  # its prompt costs next to nothing

    points = []
    for stats in (few, whole):
        seconds = stats["decode_seconds"] / stats["steps"]
        points.append((stats["row_steps"] / stats["steps"], seconds))
    read = max(1, whole["prefill_tokens"])
    return Sampling(whole["prefill_seconds"] / read, *line_through(*points))


def measure_training(run, prompt):
    """Training of micro-batches that look like this run's. A collective.

    The gradients are kept from one to the next, as in a step, and thrown away at the end.
    """
    time_batch(run, prompt, COLD_TOKENS)
    points = [time_batch(run, prompt, COLD_TOKENS)]
    wanted = WARM_TOKENS
    slowest = 0.0
    while slowest < LONG_ENOUGH and wanted <= max(WARM_TOKENS, run.settings.token_budget):
        points.append(time_batch(run, prompt, wanted))
        slowest = distributed.largest(round(1000 * points[-1][1])) / 1000
        wanted *= 4
    run.optimizer.zero_grad(set_to_none=True)
    return Training(*line_through(*points[-2:]))


def time_batch(run, prompt, tokens):
    """(tokens, seconds) of the gradient of a micro-batch of about so many tokens."""
    settings = run.settings
    batch = pack(some_sequences(prompt, tokens, settings), settings.share_prompts).to(run.device)
    started = time.perf_counter()
    loss, sums = grpo.policy_loss(run.model, batch, settings)
    backward(loss)
    float(sums["loss"])  # waits for a GPU
    return len(batch.tokens), time.perf_counter() - started


def some_sequences(prompt, tokens, settings):
    """Whole groups of about so many tokens, or one whose prompt and samples are cut alike.

    A token of a completion costs 1.4 times a prompt's in a 0.5B model: its head is a quarter of it.
    A prompt of 100 tokens and 4 samples of 25, 200 in all: for 450 tokens two groups, for 100 one
    of 50 and 4 x 12.
    """
    new = quarter(settings)
    prompts = 1 if settings.share_prompts else settings.samples
    group = prompts * len(prompt) + settings.samples * new
    share = min(1.0, tokens / group)
    kept = prompt[: max(1, round(share * len(prompt)))]
    count = settings.samples * max(1, tokens // group)
    return step_sequences(kept, count, settings.samples, max(1, round(share * new)))


def step_sequences(prompt, count, samples, new_tokens):
    """`count` sequences of groups of `samples`, whose prompts are as long and differ in the end."""
    completion = prompt[:1] * new_tokens
    zeros = [0.0] * new_tokens
    found = []
    for number in range(count):
        group = number // samples
        own = [*prompt[:-1], group % 256]  # every vocabulary has as many tokens: the bytes
        found.append(Sequence(own, completion, zeros, advantage=1.0, group=group))
    return found


# ---- the line ----


def announce(run, report):
    """Say what is coming. A collective."""
    settings = run.settings
    if not settings.steps:
        return
    prompt = typical_prompt(run)
    ranks = distributed.world_size()
    prompts, drawn, trained = (-(-count // ranks) for count in step_counts(settings))
    rows = min(drawn, run.sampler.slots)
    longest = settings.max_new_tokens
    sampling = measure_sampling(run.sampler, prompt, rows, longest, settings.temperature)
    training = measure_training(run, prompt)

    def step_seconds(new_tokens):
        read = prompts * len(prompt)
        seconds = sampling.seconds(read, drawn * new_tokens, longest, run.sampler.slots)

        # What is cut into micro-batches computes some prompts more than once.
        group = max(1, trained // prompts)
        sequences = step_sequences(prompt, trained, group, new_tokens)
        parts = micro_batches(sequences, settings.token_budget, settings.share_prompts)
        seconds += passes(settings) * training.seconds(parts, settings.share_prompts)
        if run.groups:
            share = -(-settings.gepo_batch // ranks)
            seconds += preference_seconds(run.groups.train[:share], training, settings)
        return seconds

    def evaluation_seconds(new_tokens):
        count = -(-len(run.held_out) // ranks)
        greedy = 1 if settings.eval_greedy and settings.eval_temperature else 0
        read = count * len(prompt) * (1 + greedy)
        samples = count * (settings.eval_samples + greedy) * new_tokens
        seconds = sampling.seconds(read, samples, longest, run.sampler.slots)
        if run.groups:  # a forward alone
            share = -(-len(run.groups.held_out) // ranks)
            seconds += preference_seconds(run.groups.held_out[:share], training, settings) / 3
        return seconds

    few = quarter(settings)
    times = [step_seconds(few), step_seconds(longest)]
    evaluation = [evaluation_seconds(few), evaluation_seconds(longest)]
    report(
        f"what comes: memory {run.need}; a step about {span(times)}, with samples of {few} to "
        f"{longest} tokens; {settings.steps} steps {span([settings.steps * x for x in times])}, "
        f"an evaluation of {len(run.held_out)} held-out problems {span(evaluation)}. "
        "Less time: --max_new_tokens, --prompts, --samples, --eval_problems. "
        f"Less memory: {run.need.smaller}"
    )


def preference_seconds(groups, training, settings):
    """Seconds of forward and backward over GEPO's groups, a micro-batch each."""
    parts = [group.members for group in groups]
    return training.seconds(parts, settings.share_prompts)


def announce_evaluation(sampler, prompts, settings, report):
    """Say how long an evaluation will take.

    prompts: token ids of this rank's. settings: eval.EvalSettings.
    """
    if not prompts:
        return
    rows = min(len(prompts) * settings.samples, sampler.slots)
    longest = settings.max_new_tokens
    prompt = middle(prompts)
    sampling = measure_sampling(sampler, prompt, rows, longest, settings.temperature)

    read = sum(map(len, prompts))
    few = quarter(settings)
    times = []
    for new_tokens in (few, longest):
        drawn = len(prompts) * settings.samples * new_tokens
        times.append(sampling.seconds(read, drawn, longest, sampler.slots))
    report(
        f"what comes: {len(prompts)} problems, {settings.samples} completions each of {few} to "
        f"{longest} tokens: sampling about {span(times)}. Less time: --problems, --max_new_tokens, "
        "--samples"
    )


def typical_prompt(run):
    """Token ids of a held-out problem's prompt, of middle length."""
    prompts = []
    for problem in run.held_out[:PROMPTS]:
        asked = run.ask(problem)
        encode = run.tokenizer.encode if isinstance(asked, str) else run.tokenizer.encode_chat
        prompts.append(encode(asked))
    return middle(prompts)


def middle(prompts):
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
            return f"{two_digits(low / size)} to {two_digits(high / size)} {unit}"


def two_digits(x):
    """'0.83', '2.4', '112': never '1.1e+02'."""
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"
