"""The opt-in exact mode (--exact): sampler and trainer do the same arithmetic for a token.

So on-policy log-probs are equal to the last bit on a GPU. What makes a token's numbers depend on
its batch, and what this mode does instead, in the trainer's forward, in prefill and in decode:

- matrix products: cuBLAS picks tile and split by shape -> one Triton tile for every shape
  (kernels/linear.py);
- attention: training's flash kernel cuts the keys differently -> every token is a query of the
  paged decode kernel, which reads its keys in splits of 256 from the first on and merges them in
  order;
- the head: the draw's tile depends on the batch -> one tile, and log-probs always from
  kernels.logprob.token_logprobs;
- compilation: Triton makes other code for 1 row, for multiples of 16 and for the rest -> none of
  these kernels is specialised on what follows the batch (kernels.jit).

Norms, rotation and SwiGLU are row by row already. The gradient is that of the ordinary operations:
only values of the forward are compared.
"""

import numpy as np
import torch

from kernels.attention import paged_attention
from kernels.layers import qkv_rope_write
from kernels.linear import fixed_linear
from model import CausalAttention, ranges, to_device

# Queries per call of the decode kernel: its partial results take 12 KB a token at 1k tokens of
# context and 12 heads of 128.
QUERIES = 2048


def make_exact(model):
    """Let `model` compute its forward in the exact mode.

    ValueError for a model that the kernels do not take: torch would run in their place.
    """
    config = model.config
    head_dim = config.head_dim
    widths = (config.hidden_size, config.num_attention_heads * head_dim, config.intermediate_size)
    if any(width % 64 for width in widths) or head_dim not in (16, 32, 64, 128):
        raise ValueError(
            f"the exact mode takes widths that are multiples of 64 and heads of 16, 32, 64 or 128; "
            f"this model has widths of {widths} and heads of {head_dim}: leave out --exact"
        )
    model.attention = ExactAttention
    model.linear = exact_linear


def page_size(config):
    """Tokens per page, 16 KB of keys in 16 bits; the trainer's pages must be the sampler's."""
    return 8192 // config.head_dim


def exact_linear(x, weight):
    """x [T, D], weight [N, D] -> [T, N]."""
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return fixed_linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        for_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
        return gradient @ weight, for_weight


class ExactAttention:
    """model.CausalAttention in the decode kernel's arithmetic.

    Keys and values of the packed batch go to pages, then every token is a query. A segment that
    continues a prompt gets the prompt's keys in pages of its own.
    """

    def __init__(self, config, segments):
        self.config = config
        self.plain = CausalAttention(config, segments)

        # Which of the packed tokens are written, segment by segment, and which of these are asked,
        # so that every token is, once: the last `lengths` of each segment's keys.
        keys, lengths = segments.keys, segments.lengths
        starts = keys.cumsum() - keys
        query = ranges(starts + keys - lengths, lengths)

        # Where each row is in its segment, and in the pages.
        position = ranges(np.zeros_like(keys), keys)
        size = page_size(config)
        pages = -(-keys // size)
        first = pages.cumsum() - pages  # page of each segment's first token
        page = np.repeat(first, keys) + position // size
        slots = page * size + position % size

        # What each query reads: its segment's pages up to itself.
        tables = np.repeat(first, lengths)[:, None] + np.arange(pages.max())
        seen = position[query] + 1

        def on_device(array):
            return to_device(torch.from_numpy(array), segments.query_ends.device)

        self.rows = segments.seen
        self.query = None if segments.seen is None else on_device(query)
        self.slots = on_device(slots)
        self.tables = on_device(tables.astype(np.int32))
        self.seen = on_device(seen.astype(np.int32))

        # The pages of one layer at a time.
        self.shape = (int(pages.sum()), config.num_key_value_heads, size, config.head_dim)
        self.k_pages = None
        self.v_pages = None

    def __call__(self, index, qkv, bias, cos, sin):
        """qkv [T, (H + 2K) * hd] of any layer -> [T, H * hd]."""
        return _Attention.apply(self, index, qkv, bias, cos, sin)

    def through_pages(self, qkv, bias, cos, sin):
        """The values of the forward; no gradient."""
        if self.k_pages is None:
            self.k_pages = qkv.new_empty(self.shape)
            self.v_pages = qkv.new_empty(self.shape)
        pages = (self.k_pages, self.v_pages)
        heads = self.config.num_attention_heads
        if self.rows is not None:
            qkv, cos, sin = qkv[self.rows], cos[self.rows], sin[self.rows]
        q = qkv_rope_write(qkv, bias, cos, sin, *pages, self.slots, heads)
        if self.rows is not None:
            q = q[self.query]
        return attend_to_pages(q, *pages, self.tables, self.seen)


class _Attention(torch.autograd.Function):
    """ExactAttention.through_pages, with the gradient of the ordinary attention."""

    @staticmethod
    def forward(ctx, attention, index, qkv, bias, cos, sin):
        ctx.attention = attention
        ctx.index = index
        ctx.save_for_backward(qkv, bias, cos, sin)
        return attention.through_pages(qkv, bias, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        qkv, bias, cos, sin = ctx.saved_tensors
        qkv = qkv.detach().requires_grad_()
        inputs = [qkv]
        if bias is not None:
            bias = bias.detach().requires_grad_()
            inputs.append(bias)
        with torch.enable_grad():
            out = ctx.attention.plain(ctx.index, qkv, bias, cos, sin)
            found = torch.autograd.grad(out, inputs, gradient)
        for_bias = None if bias is None else found[1]
        return None, None, found[0], for_bias, None, None


def attend_to_pages(q, k_pages, v_pages, tables, lengths):
    """Every token as a query of the decode kernel.

    q [T, H, hd], tables [T, pages] and lengths [T] (itself included) -> [T, H * hd].
    """
    scale = q.shape[2] ** -0.5
    mixed = []
    for start in range(0, len(q), QUERIES):
        rows = slice(start, start + QUERIES)
        part = paged_attention(q[rows], k_pages, v_pages, tables[rows], lengths[rows], scale)
        mixed.append(part)
    return torch.cat(mixed).flatten(1)
