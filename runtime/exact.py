"""The opt-in exact mode (--exact): sampler and trainer do the same arithmetic for a token, so on-policy log-probs are equal to the last bit on a GPU.

What makes a token's numbers depend on its batch, and what this mode does instead, in the trainer's forward, in prefill and in decode steps:

- matrix products: cuBLAS picks tile and split by shape -> one Triton tile for every shape (kernels/linear.py);
- attention: training's flash kernel, and the shared prefix in decode, cut the keys differently -> every token is a query of the paged decode kernel,
  which reads its keys in splits of 256 from the first on and merges them in order;
- the head: the draw's tile depends on the batch and the fused loss uses cuBLAS -> one tile, and log-probs always from kernels.logprob.token_logprobs.

Norms, rotation and SwiGLU are row by row already. The gradient is that of the ordinary operations: only values of the forward are compared.
"""

import torch

from kernels.attention import paged_attention
from kernels.layers import qkv_rope_write
from kernels.linear import fixed_linear
from model import causal_attention, seen_by_children

QUERIES = 2048  # per call of the decode kernel: its partial results take 12 KB a token at 1k tokens of context and 12 heads of 128


def make_exact(model):
    """Let `model` compute its forward in the exact mode."""
    model.attention, model.linear = exact_attention, exact_linear


def page_size(config):
    """Tokens per page, the decode kernel's tile; the trainer's pages must be the sampler's."""
    return 8192 // config.head_dim


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return fixed_linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x if ctx.needs_input_grad[1] else None


def exact_linear(x, weight):
    """x [T, D], weight [N, D] -> [T, N]."""
    return _Linear.apply(x, weight)


class _Attention(torch.autograd.Function):
    """exact(qkv, bias), with the gradient of plain(qkv, bias)."""

    @staticmethod
    def forward(ctx, exact, plain, qkv, bias):
        ctx.plain = plain
        ctx.save_for_backward(qkv, bias)
        return exact(qkv, bias)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            found = torch.autograd.grad(
                ctx.plain(*inputs), [t for t in inputs if t is not None], gradient
            )
        return None, None, found[0], found[1] if len(found) > 1 else None


def exact_attention(config, cu_seqlens, parents=None):
    """model.causal_attention in the decode kernel's arithmetic: keys and values of the packed batch go to pages, then every token is a query."""
    plain, size, device = (
        causal_attention(config, cu_seqlens, parents),
        page_size(config),
        cu_seqlens.device,
    )
    lengths, rows = cu_seqlens.diff().long(), torch.arange(int(cu_seqlens[-1]), device=device)
    query = rows  # which of `rows` are asked: every token once
    if (
        parents is not None
    ):  # a segment that continues a prompt gets the prompt's keys in pages of its own
        roots = len(lengths) - len(parents)
        before, seen = rows[: cu_seqlens[roots]], seen_by_children(lengths, parents)
        rows, query = (
            torch.cat([before, seen]),
            torch.cat([before, len(before) + (seen >= len(before)).nonzero().squeeze(1)]),
        )
        lengths = torch.cat([lengths[:roots], lengths[roots:] + lengths[parents]])
    segment = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    position = torch.arange(len(rows), device=device) - (lengths.cumsum(0) - lengths)[segment]
    pages = -(-lengths // size)
    first = pages.cumsum(0) - pages  # page of each segment's first token
    slots = (first[segment] + position // size) * size + position % size
    tables = (first[:, None] + torch.arange(int(pages.max()), device=device)).int()
    buffers = {}

    def attend(index, qkv, bias, cos, sin):
        if not buffers:
            shape = (int(pages.sum()), config.num_key_value_heads, size, config.head_dim)
            buffers.update(
                k=torch.empty(shape, dtype=qkv.dtype, device=qkv.device),
                v=torch.empty(shape, dtype=qkv.dtype, device=qkv.device),
            )

        def exact(qkv, bias):
            q = qkv_rope_write(
                qkv[rows],
                bias,
                cos[rows],
                sin[rows],
                buffers["k"],
                buffers["v"],
                slots,
                config.num_attention_heads,
            )
            return attend_to_pages(
                q[query],
                buffers["k"],
                buffers["v"],
                tables[segment[query]],
                (position[query] + 1).int(),
            )

        return _Attention.apply(
            exact, lambda qkv, bias: plain(index, qkv, bias, cos, sin), qkv, bias
        )

    return attend


def attend_to_pages(q, k_pages, v_pages, tables, lengths):
    """Every token as a query of the decode kernel: q [T, H, hd], tables [T, pages] and lengths [T] (itself included) -> [T, H * hd]."""
    parts = [slice(start, start + QUERIES) for start in range(0, len(q), QUERIES)]
    scale = q.shape[2] ** -0.5
    return torch.cat(
        [
            paged_attention(q[rows], k_pages, v_pages, tables[rows], lengths[rows], scale)
            for rows in parts
        ]
    ).flatten(1)
