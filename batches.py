"""Sequences of any length -> packed micro-batches under a token budget. Nothing is padded."""

from dataclasses import dataclass

import torch


@dataclass
class Sequence:
    """One prompt with its completion, and what the loss needs to know of it.

    tokens: completion ids, stop token included. logprobs: the sampler's, one per completion token. group: number of its prompt
    in the step, over all ranks. weight: the factor of every token of this sequence in the step's loss (grpo.token_weights).
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float] | None = None
    advantage: float = 0.0
    group: int = 0
    weight: float = 1.0

    def __len__(self):
        return len(self.prompt) + len(self.tokens)


@dataclass
class Batch:
    """Packed sequences. tokens, positions [T] int64; cu_seqlens [S+1] int32. Per completion token [N]: `predict` (the row of
    the hidden state that predicts it), targets int64, sequence (its number in the batch) and fp32 old_logprobs, advantages, weights."""

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor


def pack(sequences, device="cpu"):
    """list[Sequence] -> Batch. The mask comes from lengths, so the stop token is in the loss whatever its id.

    Two sequences, prompts of 2 and 1 and completions of 2 tokens: tokens [T=7], cu_seqlens [0, 4, 7], predict [1, 2, 4, 5].
    """
    lengths = torch.tensor([len(s) for s in sequences])
    completions = torch.tensor([len(s.tokens) for s in sequences])
    ends = lengths.cumsum(0)
    within = torch.arange(int(completions.sum())) - torch.repeat_interleave(completions.cumsum(0) - completions, completions)
    first = torch.repeat_interleave(ends - completions, completions)
    per_token = lambda values: torch.repeat_interleave(torch.tensor(values, dtype=torch.float32), completions)
    old = [s.logprobs if s.logprobs is not None else [0.0] * len(s.tokens) for s in sequences]
    batch = Batch(
        tokens=torch.tensor([t for s in sequences for t in (*s.prompt, *s.tokens)]),
        positions=torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
        predict=first + within - 1,
        targets=torch.tensor([t for s in sequences for t in s.tokens]),
        sequence=torch.repeat_interleave(torch.arange(len(sequences)), completions),
        old_logprobs=torch.tensor([p for row in old for p in row], dtype=torch.float32),
        advantages=per_token([s.advantage for s in sequences]),
        weights=per_token([s.weight for s in sequences]),
    )
    return Batch(**{name: value.to(device) for name, value in vars(batch).items()})


def micro_batches(sequences, token_budget):
    """Split into lists of at most token_budget tokens (a longer sequence goes alone), similar lengths together.

    The order depends on the sequences alone, so the same work gives the same sums on every run.
    """
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    groups, used = [], token_budget
    for i in order:
        if used + len(sequences[i]) > token_budget:
            groups.append([])
            used = 0
        groups[-1].append(sequences[i])
        used += len(sequences[i])
    return groups


# A micro-batch for a rank that has nothing left while others still work: FSDP's collectives need every rank (peers.md 4.7).
EMPTY = [Sequence(prompt=[0], tokens=[0], weight=0.0)]
