"""Sequences of any length -> packed micro-batches under a token budget -> one optimizer step.

Nothing is padded. A step's gradient is the sum over the micro-batches of all ranks, and every loss
already carries the step's one denominator (grpo.token_weights), so it does not matter how the work
is cut.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

from model import Segments, make_segments, ranges, to_device
from runtime import distributed

# ---- sequences and batches ----


@dataclass
class Sequence:
    """One prompt with its completion, and what the loss needs to know of it.

    Token ids may be given as lists; they are kept as int64 arrays.
    """

    prompt: np.ndarray
    tokens: np.ndarray  # of the completion, stop token included
    logprobs: list[float] | None = None  # the sampler's, one per completion token
    advantage: float | list[float] = 0.0  # of all tokens, or one for each
    group: int = 0  # number of its prompt, the same on all ranks
    weight: float = 1.0  # factor of its tokens in the step's loss (grpo.token_weights)
    # The trainer's log-probs before the first update, if the ratio starts there and not from the
    # sampler's.
    old_logprobs: list[float] | None = None
    # The reference model's. One float: their mean, which is all that a whole sequence needs.
    ref_logprobs: list[float] | float | None = None

    def __post_init__(self):
        self.prompt = np.asarray(self.prompt, dtype=np.int64)
        self.tokens = np.asarray(self.tokens, dtype=np.int64)

    def __len__(self):
        return len(self.prompt) + len(self.tokens)

    @property
    def prompt_key(self):
        """Equal for equal prompts and in their order, as bytes that are fast to compare."""
        return self.prompt.astype(">u4").tobytes()


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
    segments: Segments
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
        moved = []
        for field in fields(self):
            value = getattr(self, field.name)
            moved.append(to_device(value, device) if torch.is_tensor(value) else value)
        batch = Batch(*moved)
        batch.segments = self.segments.to(device)
        return batch


# ---- packing ----


def micro_batches(sequences, token_budget, share_prompts=False):
    """Lists of sequences of at most token_budget tokens, similar lengths together.

    A longer sequence goes alone. With shared prompts the sequences of a prompt stay together as far
    as the budget allows, and their prompt counts once. The order depends on the sequences alone, so
    the same work gives the same sums on every run.
    """
    keys = {id(sequence): sequence.prompt_key for sequence in sequences}
    longest = {}  # prompt -> tokens of its longest sequence
    for sequence in sequences:
        prompt = keys[id(sequence)]
        longest[prompt] = max(longest.get(prompt, 0), len(sequence))

    def place(sequence):
        prompt = keys[id(sequence)]
        return (longest[prompt], prompt, len(sequence)) if share_prompts else len(sequence)

    parts = []
    used, prompt = token_budget, None
    for sequence in sorted(sequences, key=place):
        prompt_is_there = share_prompts and keys[id(sequence)] == prompt
        cost = len(sequence.tokens) if prompt_is_there else len(sequence)
        if used + cost > token_budget:
            parts.append([])
            used, cost = 0, len(sequence)
        parts[-1].append(sequence)
        used += cost
        prompt = keys[id(sequence)]
    return parts


def packed_batches(parts, device, share_prompts=False):
    """Every part packed, as many batches on every rank: one without work left gets fillers.

    A part is packed when it is asked for. On a GPU that is while the one before it still runs, as
    long as nobody has asked the device for a number.
    """
    for number in range(distributed.largest(len(parts))):
        part = parts[number] if number < len(parts) else [FILLER]
        yield pack(part, share_prompts).to(device)


def pack(sequences, share_prompts=False):
    """list[Sequence] -> Batch. The mask comes from lengths, so any stop token is in the loss.

    Prompts of 2 and 1 and completions of 2 tokens: segments of 4 and 3, predict [1, 2, 4, 5]. With
    one prompt of 2 tokens, shared: segments of 2, 2 and 2, predict [1, 2, 1, 4].
    """
    counts = np.array([len(sequence.tokens) for sequence in sequences])
    prompts = [sequence.prompt for sequence in sequences]
    completions = [sequence.tokens for sequence in sequences]

    if share_prompts:
        # Distinct prompts in the order of first use, then the completions.
        numbers = {}
        for sequence in sequences:
            numbers.setdefault(sequence.prompt_key, (len(numbers), sequence.prompt))
        parents = np.array([numbers[sequence.prompt_key][0] for sequence in sequences])
        roots = [prompt for _, prompt in numbers.values()]
        pieces = [*roots, *completions]
        lengths = np.array([len(piece) for piece in pieces])
        ends = lengths.cumsum()
        first = ends[len(roots) :] - counts
        # Position of a segment's first token; the row that predicts a sequence's first token.
        begins = np.concatenate([np.zeros(len(roots), dtype=np.int64), lengths[parents]])
        before = ends[parents] - 1
    else:
        parents = None
        pieces = [piece for pair in zip(prompts, completions) for piece in pair]
        lengths = counts + [len(prompt) for prompt in prompts]
        ends = lengths.cumsum()
        first = ends - counts
        begins = np.zeros_like(lengths)
        before = first - 1

    # A token is predicted by the row before its own, a first one by its prompt's last.
    predict = ranges(first - 1, counts)
    predict[counts.cumsum() - counts] = before

    old = [sequence.old_logprobs or sequence.logprobs for sequence in sequences]
    return Batch(
        tokens=torch.from_numpy(np.concatenate(pieces)),
        positions=torch.from_numpy(ranges(begins, lengths)),
        segments=make_segments(lengths, parents),
        predict=torch.from_numpy(predict),
        targets=torch.from_numpy(np.concatenate(completions)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(sequences)), counts)),
        sampler_logprobs=_per_token([x.logprobs for x in sequences], counts),
        old_logprobs=_per_token(old, counts),
        ref_logprobs=_per_token([x.ref_logprobs for x in sequences], counts),
        advantages=_per_token([x.advantage for x in sequences], counts),
        weights=_per_token([x.weight for x in sequences], counts),
        count=len(sequences),
        filler=sequences[0] is FILLER,
    )


def _per_token(values, counts):
    """One fp32 value per completion token: a list as it is, a number for all, None for 0."""
    columns = []
    for value, count in zip(values, counts):
        column = value if isinstance(value, list) else np.full(count, value or 0.0)
        columns.append(np.asarray(column, dtype=np.float32))
    return torch.from_numpy(np.concatenate(columns))


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
    trained = [distributed.master(p) for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), eps=1e-8, fused=True)


def learning_rate(step, steps, peak, warmup, schedule):
    """Rate of step 1..steps: linear warm-up, then constant, or cosine or linear to 0 at steps + 1.

    warmup: steps of warm-up. schedule: constant, cosine or linear. No step has the rate 0.
    Steps 99, peak 1, warmup 10: step 1 -> 0.1, step 10 -> 1, cosine step 55 -> 0.5.
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps + 1 - warmup)
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
    masters = [distributed.master(p) for p in model.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(masters, limit)
    norm = float(distributed.full(norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        distributed.publish(model)
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def score(model, sequences, token_budget, device, temperature=1.0, share_prompts=False):
    """Log-probs of every sequence's completion tokens under `model`: a list each, in order.

    A collective: every rank takes part, whatever it has to score.
    """
    parts = micro_batches(sequences, token_budget, share_prompts)
    batches = packed_batches(parts, device, share_prompts)
    logprobs = [model(batch, temperature)[0] for batch in batches]
    if not parts:
        return []

    # Read once, at the end; a filler's come after all others.
    column = torch.cat(logprobs).tolist()
    found = {}
    start = 0
    for part in parts:
        for sequence in part:
            end = start + len(sequence.tokens)
            found[id(sequence)] = column[start:end]
            start = end
    return [found[id(sequence)] for sequence in sequences]
