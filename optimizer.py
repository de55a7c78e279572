"""AdamW on fp32 master weights, the learning-rate schedule, and gradient accumulation over micro-batches and ranks."""

import math

import torch

import distributed
from batches import EMPTY, micro_batches, pack
from kernels.logprob import token_logprobs


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
