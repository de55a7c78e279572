"""Sequences of any length -> packed micro-batches under a token budget. Nothing is padded."""

import math
from dataclasses import dataclass

import torch

from kernels.logprob import token_logprobs
from runtime import distributed


@dataclass
class Sequence:
    """One prompt with its completion, and what the loss needs to know of it.

    tokens: completion ids, stop token included. logprobs: the sampler's, one per completion token; old_logprobs: the trainer's before the
    first update, if the ratio is to start there and not from the sampler's; ref_logprobs: the reference model's, if there is one. group: number of its prompt, the same on all ranks. weight: the factor of every token of this sequence in the step's loss (grpo.token_weights).
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float] | None = None
    advantage: float | list[float] = 0.0  # of all tokens, or one for each
    group: int = 0
    weight: float = 1.0
    old_logprobs: list[float] | None = None
    ref_logprobs: list[float] | float | None = (
        None  # a float: their mean, which is all that a whole sequence needs
    )

    def __len__(self):
        return len(self.prompt) + len(self.tokens)


@dataclass
class Batch:
    """Packed segments: with shared prompts first every distinct prompt once, then all completions; else prompt and completion as one.

    tokens, positions [T] int64; cu_seqlens [S+1] int32; parents [C] int64: the prompt segments that the last C segments continue (None: nothing is
    shared). Per completion token [N]: `predict` (the row of the hidden state that predicts it), targets int64, sequence (its number in the
    batch) and fp32 sampler_logprobs, old_logprobs, ref_logprobs, advantages, weights.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    parents: torch.Tensor | None
    predict: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    sampler_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor


def pack(sequences, device="cpu", share_prompts=False):
    """list[Sequence] -> Batch. The mask comes from lengths, so the stop token is in the loss whatever its id.

    Two sequences, prompts of 2 and 1 and completions of 2 tokens: tokens [T=7], cu_seqlens [0, 4, 7], predict [1, 2, 4, 5]. With the
    same prompt of 2 tokens, shared: tokens [T=6], cu_seqlens [0, 2, 4, 6], parents [0, 0], predict [1, 2, 1, 4].
    """
    segments, begins, parents, predict = (_shared if share_prompts else _joined)(sequences)
    lengths, counts = (
        torch.tensor([len(x) for x in segments]),
        torch.tensor([len(s.tokens) for s in sequences]),
    )
    ends = lengths.cumsum(0)
    per_token = lambda values: torch.repeat_interleave(
        torch.tensor(values, dtype=torch.float32), counts
    )
    row = lambda value, n: (
        value if isinstance(value, list) else [value or 0.0] * n
    )  # one number stands for every token
    known = lambda value: torch.tensor(
        [p for s in sequences for p in row(value(s), len(s.tokens))], dtype=torch.float32
    )
    batch = dict(
        tokens=torch.tensor([t for x in segments for t in x]),
        positions=torch.arange(int(ends[-1]))
        - torch.repeat_interleave(ends - lengths - torch.tensor(begins), lengths),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
        parents=parents,
        predict=predict(ends),
        targets=torch.tensor([t for s in sequences for t in s.tokens]),
        sequence=torch.repeat_interleave(torch.arange(len(sequences)), counts),
        sampler_logprobs=known(lambda s: s.logprobs),
        old_logprobs=known(lambda s: s.old_logprobs or s.logprobs),
        ref_logprobs=known(lambda s: s.ref_logprobs),
        advantages=known(lambda s: s.advantage),
        weights=per_token([s.weight for s in sequences]),
    )
    return Batch(
        **{name: None if value is None else value.to(device) for name, value in batch.items()}
    )


def _joined(sequences):
    """Segments prompt + completion -> (segments, first position of each, no parents, predicting rows from the segments' ends)."""
    rows = lambda ends: torch.cat(
        [torch.arange(end - len(s.tokens) - 1, end - 1) for s, end in zip(sequences, ends.tolist())]
    )
    return [[*s.prompt, *s.tokens] for s in sequences], [0] * len(sequences), None, rows


def _shared(sequences):
    """Distinct prompts, then completions that continue them; a completion's first token is predicted by its prompt's last row."""
    prompts = {}
    parents = [prompts.setdefault(tuple(s.prompt), len(prompts)) for s in sequences]
    segments = [*map(list, prompts), *(s.tokens for s in sequences)]

    def rows(ends):
        ends = ends.tolist()
        first = [ends[p] - 1 for p in parents]
        return torch.cat(
            [
                torch.tensor([f, *range(end - len(s.tokens), end - 1)])
                for s, f, end in zip(sequences, first, ends[len(prompts) :])
            ]
        )

    return (
        segments,
        [0] * len(prompts) + [len(s.prompt) for s in sequences],
        torch.tensor(parents),
        rows,
    )


def micro_batches(sequences, token_budget, share_prompts=False):
    """Split into lists of at most token_budget tokens (a longer sequence goes alone), similar lengths together.

    With shared prompts the sequences of a prompt stay together as far as the budget allows, and their prompt counts once.
    The order depends on the sequences alone, so the same work gives the same sums on every run.
    """
    longest = {}
    for s in sequences if share_prompts else []:
        longest[tuple(s.prompt)] = max(longest.get(tuple(s.prompt), 0), len(s))
    place = (lambda s: (longest[tuple(s.prompt)], s.prompt, len(s))) if share_prompts else len
    groups, used, prompt = [], token_budget, None
    for i in sorted(range(len(sequences)), key=lambda i: (place(sequences[i]), i)):
        s = sequences[i]
        cost = len(s.tokens) if share_prompts and s.prompt == prompt else len(s)
        if used + cost > token_budget:
            groups.append([])
            used, cost = 0, len(s)
        groups[-1].append(s)
        used, prompt = used + cost, s.prompt
    return groups


# A micro-batch for a rank that has nothing left while others still work: FSDP's collectives need every rank (peers.md 4.7).
EMPTY = [Sequence(prompt=[0], tokens=[0], weight=0.0)]


def make_optimizer(model, weight_decay=0.0, beta2=0.99):
    """AdamW (fused), beta1 0.9. Matrices decay, norms and biases do not. beta2 0.99 is the first paper's (arXiv 2506.11027)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": p, "weight_decay": decay}
        for p, decay in ((matrices, weight_decay), (vectors, 0.0))
        if p
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), eps=1e-8, fused=True)


def learning_rate(step, steps, peak, warmup, schedule):
    """Rate of step 1..steps: linear warm-up over `warmup` steps, then constant, cosine to 0 or linear to 0.

    steps 100, peak 1, warmup 10: step 1 -> 0.1, step 10 -> 1, cosine step 55 -> 0.5.
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak


def accumulate(model, sequences, loss_of, token_budget, device, share_prompts=False):
    """Sum the gradient of loss_of(batch) over all micro-batches of all ranks -> list of what loss_of returned besides the loss.

    loss_of(batch) -> (loss, anything). The loss must already carry the global denominator (batch.weights). Ranks may hold
    different amounts of work, none included: the number of passes is agreed, and an idle rank runs an empty one.
    """
    return accumulate_parts(
        model, micro_batches(sequences, token_budget, share_prompts), loss_of, device, share_prompts
    )


def accumulate_parts(model, parts, loss_of, device, share_prompts=False):
    """accumulate() over micro-batches (lists of sequences) that the caller made."""
    passes = distributed.largest(len(parts))
    results = []
    for i in range(passes):
        # FSDP reduces after every pass: putting it off to the last would hold the whole model's gradient in fp32 on each rank (30 GB at 7B).
        loss, extra = loss_of(pack(parts[i] if i < len(parts) else EMPTY, device, share_prompts))
        # FSDP2 averages gradients over ranks; our loss already carries the global denominator, so undo the average.
        (loss * distributed.world_size()).backward()
        if i < len(parts):
            results.append((float(loss.detach()), extra))
    return results


def take_step(model, optimizer, rate, max_norm):
    """Clip the global gradient norm, step, clear the gradients -> the norm before clipping; nan or inf skips the step."""
    norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), max_norm if max_norm > 0 else float("inf")
    )
    norm = float(distributed.full(norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def score(model, sequences, token_budget, device, temperature=1.0, share_prompts=False):
    """Log-probs of every sequence's completion tokens under `model` -> list of lists, in order. A collective, like accumulate."""
    groups, found = micro_batches(sequences, token_budget, share_prompts), {}
    for i in range(distributed.largest(len(groups))):
        part = groups[i] if i < len(groups) else EMPTY
        batch = pack(part, device, share_prompts)
        head = lambda hidden, weight: token_logprobs(
            hidden[batch.predict], weight, batch.targets, temperature
        )[0]
        logprobs = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.parents, head)
        for q, row in zip(part, logprobs.split([len(q.tokens) for q in part])):
            found[id(q)] = row.tolist()
    return [found[id(q)] for q in sequences]
