"""The Qwen2.5 and dense Qwen3 decoder on packed sequences, and its Hugging Face checkpoints.

One decoder serves training and sampling: a layer computes qkv and hands it to `attend`, which is causal attention over the
packed batch here (training, prefill) and paged attention in sampler.py. Fused qkv and gate-up matrices are the source of
truth; they are split and merged only on load and save.
"""

import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.layers import add_rms_norm, apply_rope, rms_norm, rope_tables, swiglu
from kernels.logprob import token_logprobs


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message is one sentence for the user."""


@dataclass
class Config:
    """Shapes of a Qwen2 or Qwen3 checkpoint. `raw` keeps the config.json it came from, so that saving loses nothing."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    model_type: str = "qwen2"  # qwen3: no bias on q, k and v, but an RMSNorm per head on q and k
    raw: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, raw, source="config"):
        """Read the dict of a config.json with `rope_theta` (transformers 4) or `rope_parameters` (transformers 5)."""
        if raw.get("model_type") not in ("qwen2", "qwen3"):
            raise CheckpointError(
                f"{source}: model_type is {raw.get('model_type')!r}; this code runs Qwen2 checkpoints (Qwen2.5, Qwen2.5-Coder) and dense Qwen3"
            )
        if raw["model_type"] == "qwen3" and raw.get("attention_bias"):
            raise CheckpointError(
                f"{source}: attention_bias is not supported; Qwen3's published checkpoints have none"
            )
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or raw.get("use_sliding_window"):
            raise CheckpointError(
                f"{source}: rope type {kind!r} or a sliding window is not supported; use a checkpoint with plain RoPE and full attention"
            )
        try:
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=raw["num_attention_heads"],
                num_key_value_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e4))),
                max_position_embeddings=raw.get("max_position_embeddings", 32768),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                model_type=raw["model_type"],
                raw=dict(raw),
            )
        except KeyError as missing:
            raise CheckpointError(
                f"{source}: {missing} is missing, so this is not a complete Qwen config.json"
            ) from None

    def to_dict(self):
        """The config.json that transformers 4 and 5 and vLLM read: both spellings of the RoPE base."""
        shapes = {k: v for k, v in self.__dict__.items() if k != "raw"}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        fixed = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "hidden_act": "silu",
            "rope_parameters": rope,
        }
        return {**self.raw, **shapes, **fixed}


class Linear(nn.Linear):
    """A matrix, with room for an adapter beside it (lora.py)."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.adapter = None

    def reset_parameters(self):
        """Weights come from load() or random_model(); torch's own start values would only cost time (on the meta device an import of 1.4 s)."""

    def project(self, x, linear):
        out = linear(x, self.weight)
        return out if self.adapter is None or not self.adapter.enabled else out + self.adapter(x)


class Layer(nn.Module):
    """One decoder layer. x, residual [T, D] -> x, residual; the sum of the two is the hidden state."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.eps = c.rms_norm_eps
        self.input_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        self.qkv = Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=c.model_type == "qwen2")
        if c.model_type == "qwen3":
            self.q_norm, self.k_norm = (nn.Parameter(torch.ones(c.head_dim)) for _ in "qk")
        self.o = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.post_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.gate_up = Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x, residual, attend, index, cos, sin, linear=F.linear):
        if residual is None:
            x, residual = rms_norm(x, self.input_norm, self.eps), x
        else:
            x, residual = add_rms_norm(x, residual, self.input_norm, self.eps)
        qkv = self.qkv.project(x, linear)
        if self.qkv.bias is None:
            qkv = self.norm_heads(qkv)
        x = self.o.project(attend(index, qkv, self.qkv.bias, cos, sin), linear)
        x, residual = add_rms_norm(x, residual, self.post_norm, self.eps)
        return self.down.project(swiglu(self.gate_up.project(x, linear)), linear), residual

    def norm_heads(self, qkv):
        """Qwen3: RMSNorm over each head of q and of k, before the rotation. Here, so that no `attend` has to know."""
        head_dim = len(self.q_norm)
        q, k, v = qkv.view(len(qkv), -1, head_dim).split(self.heads, dim=1)
        q, k = (
            rms_norm(x.reshape(-1, head_dim), weight, self.eps).view_as(x)
            for x, weight in ((q, self.q_norm), (k, self.k_norm))
        )
        return torch.cat([q, k, v], dim=1).flatten(1)


class Model(nn.Module):
    """The decoder without padding: every tensor is [tokens, ...], sequences are told apart by cu_seqlens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention, self.linear = causal_attention, F.linear  # exact.py puts others here
        self.embed = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = (
            None
            if config.tie_word_embeddings
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )

    @property
    def head_weight(self):
        return self.embed.weight if self.head is None else self.head

    def forward(self, batch, temperature=1.0):
        """Log-prob and entropy of the completion tokens of a packed batch (batches.Batch), each [N].

        temperature: the distribution is softmax(logits / temperature), as it was sampled from.
        The head is inside the forward, where FSDP has its weight gathered; logits [T, V] never exist.
        """
        hidden = self.hidden(batch.tokens, batch.positions, batch.cu_seqlens, batch.parents)
        rows = hidden[batch.predict]
        return token_logprobs(rows, self.head_weight, batch.targets, temperature)

    def hidden(self, tokens, positions, cu_seqlens, parents=None):
        """Hidden states [T, D] after the final norm.

        tokens, positions: [T] int64. cu_seqlens: [S + 1] int32, borders of the segments.
        parents: [C] int64; the last C segments continue these earlier ones, so that a prompt is
        computed once for all its completions.
        """
        attend = self.attention(self.config, cu_seqlens, parents)
        return self.decode(tokens, positions, attend, self.linear)

    def decode(self, tokens, positions, attend, linear=F.linear):
        """The decoder with attention left open: attend(layer index, qkv without bias, bias, cos, sin) -> [T, H * head_dim].

        `linear(x, weight)` is the matrix product; the sampler gives one whose rows do not depend on the batch (decode.py).
        """
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        x, residual = self.embed(tokens), None
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, residual = checkpoint(
                    layer, x, residual, attend, index, cos, sin, linear, use_reentrant=False
                )
            else:
                x, residual = layer(x, residual, attend, index, cos, sin, linear)
        return add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]


def split_qkv(qkv, config):
    """[T, (H + 2K) * hd] -> q [T, H, hd], k [T, K, hd], v [T, K, hd], as views."""
    heads, kv, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return qkv.view(-1, heads + 2 * kv, hd).split([heads, kv, kv], dim=1)


def causal_attention(config, cu_seqlens, parents=None):
    """The training `attend`: causal within each packed segment; flash varlen on CUDA, scaled-dot-product on CPU. The last len(parents)
    segments also see the whole of their parent segment, which is one of the others."""
    mix = _flash_varlen if cu_seqlens.is_cuda else _padded_sdpa
    lengths = cu_seqlens.diff().long()
    roots = len(lengths) - (0 if parents is None else len(parents))
    whole = mix(lengths[:roots], lengths[:roots])
    if parents is not None:
        seen, rows = seen_by_children(lengths, parents), int(cu_seqlens[roots])
        continued = mix(lengths[roots:], lengths[roots:] + lengths[parents])

    def attend(index, qkv, bias, cos, sin):
        q, k, v = split_qkv(qkv if bias is None else qkv + bias, config)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if parents is None:
            return whole(q, k, v).flatten(1)
        return torch.cat(
            [whole(q[:rows], k[:rows], v[:rows]), continued(q[rows:], k[seen], v[seen])]
        ).flatten(1)

    return attend


def seen_by_children(lengths, parents):
    """Rows of keys that each child segment sees, parent first and then its own, one child after the other."""
    starts = lengths.cumsum(0) - lengths
    first = torch.stack([starts[parents], starts[len(lengths) - len(parents) :]], 1).flatten()
    counts = torch.stack([lengths[parents], lengths[len(lengths) - len(parents) :]], 1).flatten()
    within = torch.arange(int(counts.sum()), device=lengths.device) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    return torch.repeat_interleave(first, counts) + within


def _flash_varlen(queries, keys):
    """Causal attention of packed segments: [S] queries and [S] keys each, of which the queries are the last (flash aligns the mask there)."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped queries as they are; later versions want to be told.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    cu_q, cu_k = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (queries, keys))
    longest_q, longest_k = int(queries.max()), int(keys.max())
    return lambda q, k, v: varlen_attn(
        q, k, v, cu_q, cu_k, longest_q, longest_k, window_size=(-1, 0), **gqa
    )


def _padded_sdpa(queries, keys):
    # One call per layer instead of one per segment: 256 sequences of a tiny model would otherwise be 256 small calls. Keys are padded on
    # the left and queries on the right, so that one mask tells padding and future apart; without a prefix is_causal does, which is faster.
    longest_q, longest_k = int(queries.max()), int(keys.max())
    shared = not torch.equal(queries, keys)
    place_q, place_k = (
        _places(queries, longest_q, 0),
        _places(keys, longest_k, (longest_k - keys) if shared else 0),
    )
    mask = None
    if shared:
        column, row = torch.arange(longest_k), torch.arange(longest_q)[:, None]
        mask = (column >= (longest_k - keys)[:, None, None]) & (
            column <= row + (longest_k - queries)[:, None, None]
        )
        mask = (mask | (row >= queries[:, None, None]))[
            :, None
        ]  # rows of padding look at anything: their result is dropped

    def pad(x, place, longest):
        rows = x.new_zeros(len(queries) * longest, *x.shape[1:]).index_copy(0, place, x)
        return rows.view(len(queries), longest, *x.shape[1:]).transpose(1, 2)

    def mix(q, k, v):
        padded = pad(q, place_q, longest_q), pad(k, place_k, longest_k), pad(v, place_k, longest_k)
        out = F.scaled_dot_product_attention(
            *padded, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(len(queries) * longest_q, *q.shape[1:])[place_q]

    return mix


def _places(lengths, longest, offset):
    """Row of each packed token in a [segments * longest] table."""
    starts = torch.arange(len(lengths)) * longest + offset
    within = torch.arange(int(lengths.sum())) - torch.repeat_interleave(
        lengths.cumsum(0) - lengths, lengths
    )
    return torch.repeat_interleave(starts, lengths) + within


def random_model(config, seed=0, dtype=torch.float32, std=0.02):
    """A model with normal(0, std) matrices, zero biases and unit norms, the same for the same seed on every machine."""
    model = Model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    return model.to(dtype)
