"""Log-probability and entropy of target tokens straight from hidden states.

The lm_head product, the softmax and the gather, without ever holding logits [T, V]. With
z = h . W, x_j = z_j / temperature and lse = log sum_j exp x_j:

    logprob = x_target - lse        entropy = lse - sum_j p_j x_j
    dL/dz_j = ( g (delta_j,target - p_j) - e p_j (x_j - lse + entropy) ) / temperature

for upstream gradients g (of the log-prob) and e (of the entropy).

Tokens go by in chunks. On CUDA the forward leaves no logits at all and the backward makes one chunk
of dL/dz in 16 bits, whose two products are cuBLAS's (kernels in head.py); elsewhere the same steps
run in torch. Forward and backward take 8 M V D operations for M tokens: the backward makes the
logits again. A loss inside the head would take 6, but then the head calls the loss: on an H200 it
saved 11 % of the head, some 3 % of an update.
"""

from __future__ import annotations

import torch

from kernels import head, wide
from kernels.linear import add_weight_gradient, product

# Logits of one chunk. On CPU 64 MB in fp32, 341 tokens at a vocabulary of 49,152 (time is flat from
# 2^22 to 2^26). On CUDA 1.24 GB of bf16 gradient: smaller chunks would read and write the weight's
# gradient too often.
CPU_CHUNK = 1 << 24
CUDA_CHUNK = 4096 * 151_936


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target token and entropy of its distribution, each [T].

    hidden: [T, D]. weight: [V, D], the head, tied or not. targets: [T] int64 in 0..V-1.
    temperature: logits are divided by it.

    fp32 (float64 for float64 input), differentiable in hidden and weight through both outputs.
    Holds one bounded chunk of logits, forward and backward.
    Uniform logits over V = 4: log-prob and -entropy are -1.386.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature)


# ---- chunks of tokens, on Triton or on torch ----


def _chunks(tokens, vocabulary, cuda):
    """As few slices of tokens as the chunk size allows, of equal length."""
    count = -(-tokens * vocabulary // (CUDA_CHUNK if cuda else CPU_CHUNK)) or 1
    rows = -(-tokens // count) or 1
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _product(hidden, weight):
    """Logits [rows, V] in fp32.

    From 16-bit factors too: rounded to bf16 they would move a log-prob by 4e-3 at a logit of 30.
    """
    if hidden.dtype == wide(hidden).dtype:
        return product(hidden, weight)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


def _add_product(total, gradient, hidden):
    """total [V, D] += gradient.T @ hidden with an fp32 accumulator."""
    if gradient.dtype == total.dtype:
        add_weight_gradient(total, gradient, hidden)
    else:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)


class _ChunkedLogprobs(torch.autograd.Function):
    """The forward keeps lse and entropy alone; the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        fused = head.fits(hidden)
        h, w = (hidden, weight) if fused else (wide(hidden), wide(weight))
        logprobs, entropy, lse = wide(hidden).new_empty(3, len(hidden))

        for rows in _chunks(len(hidden), len(weight), hidden.is_cuda):
            if fused:
                stats = head.stats(h[rows], w, targets[rows], temperature)
            else:
                stats = logit_stats_reference(_product(h[rows], w), targets[rows], temperature)
            logprobs[rows], entropy[rows], lse[rows] = stats

        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        fused = head.fits(hidden)
        h, w = (hidden, weight) if fused else (wide(hidden), wide(weight))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not when the head is frozen (LoRA)
            grad_weight = torch.zeros_like(weight, dtype=wide(weight[:0]).dtype)

        for rows in _chunks(len(hidden), len(weight), hidden.is_cuda):
            known = (targets[rows], lse[rows], entropy[rows], grad_logp[rows], grad_entropy[rows])
            if fused:
                gradient = head.gradient(h[rows], w, *known, ctx.temperature)
            else:
                logits = _product(h[rows], w).div_(ctx.temperature)
                gradient = logit_gradient_reference(logits, *known, ctx.temperature)
            grad_hidden[rows] = product(gradient, w.T)
            if grad_weight is not None:
                _add_product(grad_weight, gradient, h[rows])
            del gradient  # else two chunks of it live at once

        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


# ---- torch references ----


def token_logprobs_reference(hidden, weight, targets, temperature=1.0):
    logp = (wide(hidden) @ wide(weight).T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def logit_stats_reference(logits, targets, temperature):
    """Log-prob of the target, entropy and log-sum-exp, each [rows], of logits [rows, V].

    Divides the logits by temperature in place.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    lse = logits.logsumexp(-1)
    logp = logits - lse[:, None]
    # -sum p log p, not lse - sum p x: there a rounding of lse is multiplied by x (1e-4 at x = 45),
    # here by the entropy.
    entropy = -torch.linalg.vecdot(logp.exp(), logp)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy, lse


def logit_gradient_reference(logits, targets, lse, entropy, grad_logp, grad_entropy, temperature):
    """dL/dz [rows, V], the formula at the top, from logits already divided by temperature.

    Overwrites the logits.
    """
    probabilities = (logits - lse[:, None]).exp_()
    distance = logits.sub_((lse - entropy)[:, None])
    coefficient = distance.mul_(grad_entropy[:, None]).add_(grad_logp[:, None])
    gradient = probabilities.mul_(coefficient).neg_()
    gradient.scatter_add_(1, targets[:, None], grad_logp[:, None])
    if temperature != 1.0:
        gradient.div_(temperature)
    return gradient
