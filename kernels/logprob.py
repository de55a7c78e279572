"""Log-probability and entropy of target tokens straight from hidden states: the lm_head product, softmax and gather, never holding [T, V].

With x_j = (h . W_j) / temperature and lse = log sum_j exp x_j:  logprob = x_target - lse,  entropy = lse - sum_j p_j x_j, and
dL/dz_j = ( g (delta_j,target - p_j) - e p_j (x_j - lse + entropy) ) / temperature  for upstream gradients g (log-prob) and e (entropy), z = h . W.
"""

import torch

CPU_CHUNK = 1 << 22  # logits per chunk on CPU: 16 MB in fp32, near the last-level cache; 85 rows at a vocabulary of 49,152


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs_reference(hidden, weight, targets, temperature=1.0):
    logp = (_wide(hidden) @ _wide(weight).T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def _chunks(tokens, vocabulary):
    rows = max(1, CPU_CHUNK // vocabulary)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _logits(hidden, weight, temperature):
    logits = _wide(hidden) @ weight.T
    return logits if temperature == 1.0 else logits.div_(temperature)


def _row_stats(logits, targets):
    """(log-prob of the target, entropy, log-sum-exp), each [rows]."""
    lse = logits.logsumexp(-1)
    mean = torch.linalg.vecdot((logits - lse[:, None]).exp_(), logits)
    return logits.gather(1, targets[:, None]).squeeze(1) - lse, lse - mean, lse


def _logit_gradient(logits, targets, lse, entropy, grad_logp, grad_entropy, temperature):
    """dL/dz [rows, V], the formula at the top of this file; overwrites logits."""
    probabilities = (logits - lse[:, None]).exp_()
    coefficient = logits.sub_((lse - entropy)[:, None]).mul_(grad_entropy[:, None]).add_(grad_logp[:, None])
    gradient = probabilities.mul_(coefficient).neg_()
    gradient.scatter_add_(1, targets[:, None], grad_logp[:, None])
    return gradient if temperature == 1.0 else gradient.div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps only lse and entropy; backward recomputes each chunk's logits (8 M V D in all against 6 with the logits kept)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        wide = _wide(weight)
        stats = [_row_stats(_logits(hidden[rows], wide, temperature), targets[rows]) for rows in _chunks(len(hidden), len(weight))]
        logprobs, entropy, lse = (torch.cat(column) for column in zip(*stats))
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        wide = _wide(weight)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(wide)
        for rows in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[rows], wide, ctx.temperature)
            gradient = _logit_gradient(logits, targets[rows], lse[rows], entropy[rows], grad_logp[rows], grad_entropy[rows], ctx.temperature)
            grad_hidden[rows] = gradient @ wide
            if ctx.needs_input_grad[1]:
                grad_weight.addmm_(gradient.T, _wide(hidden[rows]))
        return grad_hidden, grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None


class _FusedLoss(torch.autograd.Function):
    """Loss and its gradient in one pass over the chunks: the logits of a chunk are made once (6 M V D)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, temperature):
        wide = _wide(weight)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(wide)
        stats, total = [], wide.new_zeros(())
        for rows in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[rows], wide, temperature)
            logp, entropy, lse = _row_stats(logits, targets[rows])
            loss, grad_logp, grad_entropy = _loss_gradient(loss_fn, logp, entropy, rows)
            gradient = _logit_gradient(logits, targets[rows], lse, entropy, grad_logp, grad_entropy, temperature)
            grad_hidden[rows] = gradient @ wide
            grad_weight.addmm_(gradient.T, _wide(hidden[rows]))
            stats.append((logp, entropy))
            total += loss
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        logprobs, entropy = (torch.cat(column) for column in zip(*stats))
        ctx.mark_non_differentiable(logprobs, entropy)
        return total, logprobs, entropy

    @staticmethod
    def backward(ctx, grad_loss, _logprobs, _entropy):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


def _loss_gradient(loss_fn, logp, entropy, rows):
    """The loss summed over these rows and its gradients in their log-probs and entropies."""
    logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(logp, entropy, rows).sum()
    gradients = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(logp) if gradient is None else gradient for gradient in gradients)


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
    return loss_fn(logprobs, entropy, slice(0, len(targets))).sum(), logprobs.detach(), entropy.detach()
