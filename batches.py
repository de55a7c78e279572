"""Sequences of any length -> packed micro-batches under a token budget -> one optimizer step.

Nothing is padded. A step's gradient is the sum over the micro-batches of all ranks, and every loss
already carries the step's one denominator (grpo.token_weights), so it does not matter how the work
is cut.
"""

import itertools
import math
from dataclasses import dataclass, fields

import torch

from runtime import distributed

# ---- sequences and batches ----


@dataclass
class Sequence:
    """One prompt with its completion, and what the loss needs to know of it."""

    prompt: list[int]
    tokens: list[int]  # of the completion, stop token included
    logprobs: list[float] | None = None  # the sampler's, one per completion token
    advantage: float | list[float] = 0.0  # of all tokens, or one for each
    group: int = 0  # number of its prompt, the same on all ranks
    weight: float = 1.0  # factor of its tokens in the step's loss (grpo.token_weights)
    # The trainer's log-probs before the first update, if the ratio starts there and not from the
    # sampler's.
    old_logprobs: list[float] | None = None
    # The reference model's. One float: their mean, which is all that a whole sequence needs.
    ref_logprobs: list[float] | float | None = None

    def __len__(self):
        return len(self.prompt) + len(self.tokens)


# For a rank that has nothing left while others still work: FSDP's collectives need every rank.
FILLER = Sequence(prompt=[0], tokens=[0], weight=0.0)


@dataclass
class Batch:
    """Packed segments of T tokens with N completion tokens of `count` sequences.

    With shared prompts first every distinct prompt once, then all completions; else prompt and
    completion together, one segment a sequence.
    """

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S + 1] int32, borders of the segments
    parents: torch.Tensor | None  # [C] int64: prompt segments that the last C segments continue
    predict: torch.Tensor  # [N] int64, the row of the hidden state that predicts each token
    targets: torch.Tensor  # [N] int64
    sequence: torch.Tensor  # [N] int64, the token's sequence by its number in the batch
    sampler_logprobs: torch.Tensor  # [N] fp32, as all that follow
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    count: int  # sequences
    filler: bool  # stands in for a rank without work

    def to(self, device):
        values = [getattr(self, field.name) for field in fields(self)]
        return Batch(*[x.to(device) if torch.is_tensor(x) else x for x in values])


# ---- packing ----


def micro_batches(sequences, token_budget, share_prompts=False):
    """Lists of sequences of at most token_budget tokens, similar lengths together.

    A longer sequence goes alone. With shared prompts the sequences of a prompt stay together as far
    as the budget allows, and their prompt counts once. The order depends on the sequences alone, so
    the same work gives the same sums on every run.
    """
    longest = {}  # prompt -> tokens of its longest sequence
    for sequence in sequences:
        prompt = tuple(sequence.prompt)
        longest[prompt] = max(longest.get(prompt, 0), len(sequence))

    def place(sequence):
        if share_prompts:
            return longest[tuple(sequence.prompt)], sequence.prompt, len(sequence)
        return len(sequence)

    parts = []
    used, prompt = token_budget, None
    for sequence in sorted(sequences, key=place):
        prompt_is_there = share_prompts and sequence.prompt == prompt
        cost = len(sequence.tokens) if prompt_is_there else len(sequence)
        if used + cost > token_budget:
            parts.append([])
            used, cost = 0, len(sequence)
        parts[-1].append(sequence)
        used += cost
        prompt = sequence.prompt
    return parts


def packed_batches(parts, device, share_prompts=False):
    """Every part packed, as many batches on every rank: one without work left gets fillers."""
    for number in range(distributed.largest(len(parts))):
        if number < len(parts):
            yield pack(parts[number], share_prompts).to(device)
        else:
            yield pack([FILLER], share_prompts).to(device)


def pack(sequences, share_prompts=False):
    """list[Sequence] -> Batch. The mask comes from lengths, so any stop token is in the loss.

    Prompts of 2 and 1 and completions of 2 tokens: tokens [T=7], cu_seqlens [0, 4, 7], predict [1,
    2, 4, 5]. With one prompt of 2 tokens, shared: tokens [T=6], cu_seqlens [0, 2, 4, 6], parents
    [0, 0], predict [1, 2, 1, 4].
    """
    layout = _shared(sequences) if share_prompts else _joined(sequences)
    segments = layout.segments
    lengths = torch.tensor([len(segment) for segment in segments])
    ends = lengths.cumsum(0)
    # Position of a token = its row - its segment's first row + the position of that first row.
    shift = torch.tensor(layout.begins) - (ends - lengths)
    counts = torch.tensor([len(sequence.tokens) for sequence in sequences])

    old = [sequence.old_logprobs or sequence.logprobs for sequence in sequences]
    return Batch(
        tokens=torch.tensor([token for segment in segments for token in segment]),
        positions=torch.arange(int(ends[-1])) + torch.repeat_interleave(shift, lengths),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
        parents=layout.parents,
        predict=torch.tensor(layout.predict),
        targets=torch.tensor([token for sequence in sequences for token in sequence.tokens]),
        sequence=torch.repeat_interleave(torch.arange(len(sequences)), counts),
        sampler_logprobs=_per_token(sequences, [sequence.logprobs for sequence in sequences]),
        old_logprobs=_per_token(sequences, old),
        ref_logprobs=_per_token(sequences, [sequence.ref_logprobs for sequence in sequences]),
        advantages=_per_token(sequences, [sequence.advantage for sequence in sequences]),
        weights=_per_token(sequences, [sequence.weight for sequence in sequences]),
        count=len(sequences),
        filler=sequences[0] is FILLER,
    )


@dataclass
class _Layout:
    """Where tokens stand in a batch."""

    segments: list[list[int]]
    begins: list[int]  # position of each segment's first token
    parents: torch.Tensor | None
    predict: list[int]  # rows that predict the completion tokens


def _joined(sequences):
    """Prompt and completion as one segment."""
    segments = []
    predict = []
    end = 0
    for sequence in sequences:
        segments.append([*sequence.prompt, *sequence.tokens])
        end += len(sequence)
        predict += range(end - len(sequence.tokens) - 1, end - 1)
    return _Layout(segments, [0] * len(sequences), None, predict)


def _shared(sequences):
    """Distinct prompts, then completions; a first token is predicted by its prompt's last row."""
    numbers = {}  # prompt -> its number, in the order of first use
    parents = [numbers.setdefault(tuple(x.prompt), len(numbers)) for x in sequences]
    prompt_ends = list(itertools.accumulate(len(prompt) for prompt in numbers))

    segments = [list(prompt) for prompt in numbers]
    begins = [0] * len(numbers)
    predict = []
    start = prompt_ends[-1]
    for sequence, parent in zip(sequences, parents):
        segments.append(sequence.tokens)
        begins.append(len(sequence.prompt))
        end = start + len(sequence.tokens)
        predict += [prompt_ends[parent] - 1, *range(start, end - 1)]
        start = end
    return _Layout(segments, begins, torch.tensor(parents), predict)


def _per_token(sequences, values):
    """One fp32 value per completion token: a list as it is, a number for all, None for 0."""
    column = []
    for sequence, value in zip(sequences, values):
        if isinstance(value, list):
            column += value
        else:
            column += [value or 0.0] * len(sequence.tokens)
    return torch.tensor(column, dtype=torch.float32)


# ---- gradient and step ----


def backward(loss):
    """Add a micro-batch's gradient; every rank takes part.

    FSDP2 averages gradients over ranks. Our loss carries the global denominator: undo the average.
    FSDP reduces after every micro-batch: putting it off to the last would hold the whole model's
    gradient in fp32 on each rank (30 GB at 7B).
    """
    (loss * distributed.world_size()).backward()


def make_optimizer(model, weight_decay=0.0, beta2=0.99):
    """AdamW (fused), beta1 0.9. Matrices decay, norms and biases do not.

    beta2 0.99 is the first paper's (arXiv 2506.11027).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), eps=1e-8, fused=True)


def learning_rate(step, steps, peak, warmup, schedule):
    """Rate of step 1..steps: linear warm-up, then constant, cosine to 0 or linear to 0.

    warmup: steps of warm-up. schedule: constant, cosine or linear.
    Steps 100, peak 1, warmup 10: step 1 -> 0.1, step 10 -> 1, cosine step 55 -> 0.5.
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak


def take_step(model, optimizer, rate, max_norm):
    """Clip the global gradient norm, step, clear the gradients -> the norm before clipping.

    max_norm 0: no clipping. A norm that is nan or inf skips the step.
    """
    limit = max_norm if max_norm > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = float(distributed.full(norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def score(model, sequences, token_budget, device, temperature=1.0, share_prompts=False):
    """Log-probs of every sequence's completion tokens under `model`: a list each, in order.

    A collective: every rank takes part, whatever it has to score.
    """
    parts = micro_batches(sequences, token_budget, share_prompts)
    found = {}
    for number, batch in enumerate(packed_batches(parts, device, share_prompts)):
        logprobs, _ = model(batch, temperature)
        if batch.filler:
            continue
        part = parts[number]
        rows = logprobs.split([len(sequence.tokens) for sequence in part])
        for sequence, row in zip(part, rows):
            found[id(sequence)] = row.tolist()
    return [found[id(sequence)] for sequence in sequences]
