"""Log-probability and entropy of target tokens straight from hidden states: the lm_head product, softmax and gather, never holding [T, V].

With x_j = (h . W_j) / temperature and lse = log sum_j exp x_j:  logprob = x_target - lse,  entropy = lse - sum_j p_j x_j, and
dL/dz_j = ( g (delta_j,target - p_j) - e p_j (x_j - lse + entropy) ) / temperature  for upstream gradients g (log-prob) and e (entropy), z = h . W.

Tokens go by in chunks. On CUDA the forward leaves no logits at all and the backward makes one chunk of dL/dz in 16 bits, whose two products are
cuBLAS's (kernels in head.py); elsewhere the same steps run in torch. M V D below: multiply-adds x 2 of one product with the head.
"""

from __future__ import annotations

import torch

from kernels import head, wide

CPU_CHUNK = (
    1 << 24
)  # logits per chunk on CPU: 64 MB in fp32, 341 tokens at a vocabulary of 49,152 (time is flat from 2^22 to 2^26)
CUDA_CHUNK = (
    4096 * 151_936
)  # on CUDA: 1.24 GB of bf16 gradient; smaller chunks would read and write the weight's gradient too often

# torch references


def token_logprobs_reference(hidden, weight, targets, temperature=1.0):
    logp = (wide(hidden) @ wide(weight).T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def logit_stats_reference(logits, targets, temperature):
    """(log-prob of the target, entropy, log-sum-exp), each [rows], of logits [rows, V]; divides the logits by temperature in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    lse = logits.logsumexp(-1)
    logp = logits - lse[:, None]
    # -sum p log p, not lse - sum p x: there a rounding of lse is multiplied by x (1e-4 at x = 45), here by the entropy.
    return logp.gather(1, targets[:, None]).squeeze(1), -torch.linalg.vecdot(logp.exp(), logp), lse


def logit_gradient_reference(logits, targets, lse, entropy, grad_logp, grad_entropy, temperature):
    """dL/dz [rows, V], the formula at the top of this file, from logits already divided by temperature, which it overwrites."""
    probabilities = (logits - lse[:, None]).exp_()
    coefficient = (
        logits.sub_((lse - entropy)[:, None]).mul_(grad_entropy[:, None]).add_(grad_logp[:, None])
    )
    gradient = probabilities.mul_(coefficient).neg_()
    gradient.scatter_add_(1, targets[:, None], grad_logp[:, None])
    return gradient if temperature == 1.0 else gradient.div_(temperature)


# Chunks of tokens, on Triton or on torch


def _chunks(tokens, vocabulary, cuda):
    """As few slices of tokens as the chunk size allows, of equal length."""
    count = -(-tokens * vocabulary // (CUDA_CHUNK if cuda else CPU_CHUNK)) or 1
    rows = -(-tokens // count) or 1
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _product(hidden, weight):
    """Logits [rows, V] in fp32 from 16-bit factors: rounded to bf16 they would move a log-prob by 4e-3 at a logit of 30."""
    return (
        hidden @ weight.T
        if hidden.dtype == wide(hidden).dtype
        else torch.mm(hidden, weight.T, out_dtype=torch.float32)
    )


def _accumulate(total, gradient, hidden):
    """total [V, D] += gradient.T @ hidden with an fp32 accumulator."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)


def _zeros_for(weight):
    return torch.zeros(weight.shape, dtype=wide(weight[:0]).dtype, device=weight.device)


def _joined(parts, hidden):
    """Columns of per-chunk results, each concatenated; three empty ones for no tokens at all."""
    if not parts:
        return tuple(hidden.new_zeros(0, dtype=wide(hidden).dtype) for _ in range(3))
    return tuple(torch.cat(column) for column in zip(*parts))


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps only lse and entropy; backward recomputes each chunk's logits: 8 M V D in all."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        fits, parts = head.fits(hidden), []
        h, w = (hidden, weight) if fits else (wide(hidden), wide(weight))
        for rows in _chunks(len(hidden), len(weight), hidden.is_cuda):
            if fits:
                parts.append(head.stats(h[rows], w, targets[rows], temperature))
            else:
                parts.append(
                    logit_stats_reference(_product(h[rows], w), targets[rows], temperature)
                )
        logprobs, entropy, lse = _joined(parts, hidden)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        fits = head.fits(hidden)
        h, w = (hidden, weight) if fits else (wide(hidden), wide(weight))
        grad_hidden, grad_weight = torch.empty_like(hidden), _zeros_for(weight)
        for rows in _chunks(len(hidden), len(weight), hidden.is_cuda):
            numbers = (
                targets[rows],
                lse[rows],
                entropy[rows],
                grad_logp[rows],
                grad_entropy[rows],
                ctx.temperature,
            )
            if fits:
                gradient = head.gradient(h[rows], w, *numbers)
            else:
                gradient = logit_gradient_reference(
                    _product(h[rows], w).div_(ctx.temperature), *numbers
                )
            grad_hidden[rows] = gradient @ w
            if ctx.needs_input_grad[1]:
                _accumulate(grad_weight, gradient, h[rows])
            del gradient  # else two chunks of it live at once
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _FusedLoss(torch.autograd.Function):
    """Loss and its gradient in one pass over the chunks: the logits of a chunk are made once and serve twice, 6 M V D in all."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, temperature):
        fits, parts = head.fits(hidden), []
        h, w = (hidden, weight) if fits else (wide(hidden), wide(weight))
        stats = head.logit_stats if fits else logit_stats_reference
        grad_hidden, grad_weight = torch.empty_like(hidden), _zeros_for(weight)
        total = grad_weight.new_zeros(())
        for rows in _chunks(len(hidden), len(weight), hidden.is_cuda):
            logits = _product(h[rows], w)
            logp, entropy, lse = stats(logits, targets[rows], temperature)
            loss, grad_logp, grad_entropy = _loss_gradient(loss_fn, logp, entropy, rows)
            numbers = (targets[rows], lse, entropy, grad_logp, grad_entropy, temperature)
            gradient = (
                head.logit_gradient(logits, *numbers, h.dtype)
                if fits
                else logit_gradient_reference(logits, *numbers)
            )
            grad_hidden[rows] = gradient @ w
            if ctx.needs_input_grad[1]:  # not when the head is frozen (LoRA)
                _accumulate(grad_weight, gradient, h[rows])
            parts.append((logp, entropy, lse))
            total += loss
            del logits, gradient
        logprobs, entropy, _lse = _joined(parts, hidden)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(logprobs, entropy)
        return total, logprobs, entropy

    @staticmethod
    def backward(ctx, grad_loss, _logprobs, _entropy):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss,
            grad_weight * grad_loss if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


def _loss_gradient(loss_fn, logp, entropy, rows):
    """The loss summed over these rows and its gradients in their log-probs and entropies."""
    logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(logp, entropy, rows).sum()
    gradients = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss.detach(), *(
        torch.zeros_like(logp) if gradient is None else gradient for gradient in gradients
    )


# Public functions


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """Log-probability of each target token and entropy of its distribution, (logprobs [T], entropy [T]) in fp32 (float64 for float64 input).

    hidden [T, D], weight [V, D] (the head, tied or not), targets [T] int64 in 0..V-1; logits are divided by temperature. Differentiable in hidden and
    weight, through both outputs. Holds one bounded chunk of logits, forward and backward. Uniform logits over V = 4: log-prob and -entropy are -1.386.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature)


def fused_policy_loss(hidden, weight, targets, loss_fn, temperature=1.0, per_token=True):
    """(loss, logprobs [T], entropy [T]): loss = sum of loss_fn(logprobs[rows], entropy[rows], rows), its gradient already made in the forward.

    loss_fn(logprobs, entropy, rows) returns the loss of each token of `rows` (a slice of 0..T), normaliser included: a plain torch function that indexes its
    advantages and old log-probs by rows. With per_token=True it is called once per chunk (6 M V D instead of 8); token i's loss must then depend on
    token i alone. A loss that couples tokens (GSPO's sequence ratio) needs per_token=False: called once with all rows. Only `loss` has a gradient.
    """
    if per_token and torch.is_grad_enabled():
        return _FusedLoss.apply(hidden, weight, targets, loss_fn, temperature)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature)
    return (
        loss_fn(logprobs, entropy, slice(0, len(targets))).sum(),
        logprobs.detach(),
        entropy.detach(),
    )
