"""The Qwen2.5 and dense Qwen3 decoder on packed sequences.

One decoder serves training and sampling: a layer computes qkv and hands it to `attend`, which is
causal attention over the packed batch here (training, prefill) and paged attention in decode.py.
Fused qkv and gate-up matrices are the source of truth; they are split and merged only on load and
save (runtime/hugging_face.py).
"""

import inspect
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import native
from kernels.layers import add_rms_norm, rms_norm, rotated_qkv, swiglu
from kernels.linear import fast_linear
from kernels.logprob import token_logprobs
from kernels.native_layers import attend_segments
from kernels.rope import rope_tables


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message is one sentence for the user."""


@dataclass
class Config:
    """Shapes of a Qwen2 or Qwen3 checkpoint.

    `raw` keeps the config.json it came from, so that saving loses nothing.
    """

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
        """Read the dict of a config.json; `source` is what an error names.

        The RoPE base is `rope_theta` in transformers 4 and in `rope_parameters` in transformers 5.
        """
        model_type = raw.get("model_type")
        if model_type not in ("qwen2", "qwen3"):
            raise CheckpointError(
                f"{source}: model_type is {model_type!r}; this code runs Qwen2 checkpoints "
                "(Qwen2.5, Qwen2.5-Coder) and dense Qwen3"
            )
        if model_type == "qwen3" and raw.get("attention_bias"):
            raise CheckpointError(
                f"{source}: attention_bias is not supported; "
                "Qwen3's published checkpoints have none"
            )
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or raw.get("use_sliding_window"):
            raise CheckpointError(
                f"{source}: rope type {kind!r} or a sliding window is not supported; "
                "use a checkpoint with plain RoPE and full attention"
            )
        if set(raw.get("layer_types") or ["full_attention"]) != {"full_attention"}:
            raise CheckpointError(
                f"{source}: layer_types has layers without full attention, which are not supported"
            )
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise CheckpointError(
                f"{source}: hidden_act is {raw['hidden_act']!r}; Qwen2 and Qwen3 have silu"
            )

        try:
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=raw["num_attention_heads"],
                num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
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
        """The config.json for transformers 4 and 5 and vLLM: both spellings of the RoPE base."""
        shapes = {name: value for name, value in vars(self).items() if name != "raw"}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        fixed = {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "hidden_act": "silu",
            "rope_parameters": rope,
        }
        return self.raw | shapes | fixed


class Linear(nn.Linear):
    """A matrix, with room for an adapter beside it (runtime/lora.py)."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.adapter = None

    def reset_parameters(self):
        """Weights come from load_model() or random_model().

        torch's own start values would only cost time (on the meta device an import of 1.4 s).
        """

    def project(self, x, linear):
        """x [T, in] -> [T, out] without the bias; linear(x, weight) is the matrix product."""
        out = linear(x, self.weight)
        if self.adapter is not None and self.adapter.enabled:
            out = out + self.adapter(x)
        return out


class Layer(nn.Module):
    """One decoder layer: x, residual [T, D] -> x, residual, whose sum is the hidden state."""

    def __init__(self, config):
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        kv_heads = config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.heads = (config.num_attention_heads, kv_heads, kv_heads)
        is_qwen3 = config.model_type == "qwen3"

        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = Linear(hidden, sum(self.heads) * head_dim, bias=not is_qwen3)
        if is_qwen3:
            self.q_norm = nn.Parameter(torch.ones(head_dim))
            self.k_norm = nn.Parameter(torch.ones(head_dim))
        self.o = Linear(config.num_attention_heads * head_dim, hidden, bias=False)
        self.post_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, x, residual, attend, index, cos, sin, linear):
        if residual is None:
            x, residual = rms_norm(x, self.input_norm, self.eps), x
        else:
            x, residual = add_rms_norm(x, residual, self.input_norm, self.eps)

        qkv = self.qkv.project(x, linear)
        if self.qkv.bias is None:
            qkv = self.norm_heads(qkv)
        mixed = attend(index, qkv, self.qkv.bias, cos, sin)
        x = self.o.project(mixed, linear)

        x, residual = add_rms_norm(x, residual, self.post_norm, self.eps)
        gate_up = self.gate_up.project(x, linear)
        return self.down.project(swiglu(gate_up), linear), residual

    def norm_heads(self, qkv):
        """Qwen3: RMSNorm over each head of q and of k, before the rotation.

        Here, so that no `attend` has to know.
        """
        head_dim = len(self.q_norm)
        by_head = qkv.view(len(qkv), -1, head_dim)
        q, k, v = by_head.split(self.heads, dim=1)
        q_rows = rms_norm(q.reshape(-1, head_dim), self.q_norm, self.eps)
        k_rows = rms_norm(k.reshape(-1, head_dim), self.k_norm, self.eps)
        normed = [q_rows.view_as(q), k_rows.view_as(k), v]
        return torch.cat(normed, dim=1).flatten(1)


class Model(nn.Module):
    """The decoder without padding: every tensor is [tokens, ...].

    Sequences are told apart by cu_seqlens.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        # runtime/exact.py puts others here.
        self.attention = CausalAttention
        self.linear = fast_linear

        shape = (config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = None if config.tie_word_embeddings else nn.Parameter(torch.empty(shape))

    @property
    def head_weight(self):
        return self.embed.weight if self.head is None else self.head

    def forward(self, batch, temperature=1.0):
        """Log-prob and entropy, each [N], of the completion tokens of a packed batches.Batch.

        temperature: the distribution is softmax(logits / temperature), as it was sampled from.
        The head is inside the forward, where FSDP has its weight gathered; logits [T, V] never
        exist.
        """
        hidden = self.hidden(batch.tokens, batch.positions, batch.segments)
        rows = hidden[batch.predict]
        return token_logprobs(rows, self.head_weight, batch.targets, temperature)

    def hidden(self, tokens, positions, segments):
        """Hidden states [T, D] after the final norm; tokens, positions: [T] int64."""
        attend = self.attention(self.config, segments)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        return self.decode(tokens, rope, attend, self.linear)

    def decode(self, tokens, rope, attend, linear):
        """The decoder with attention left open -> hidden states [T, D] after the final norm.

        rope: cosines and sines of the tokens' positions (kernels.rope.rope_tables).
        attend: (layer index, qkv without bias, bias, cos, sin) -> [T, H * head_dim].
        linear: (x, weight) -> their product; the sampler gives one whose rows do not depend on the
            batch (decode.py).
        """
        config = self.config
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        x = self.embed(tokens)
        residual = None
        for index, layer in enumerate(self.layers):
            inputs = (x, residual, attend, index, *rope, linear)
            if recompute:
                x, residual = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, residual = layer(*inputs)
        hidden, _ = add_rms_norm(x, residual, self.norm, config.rms_norm_eps)
        return hidden


@dataclass
class Segments:
    """How a packed batch is cut: which tokens see which.

    Each token sees those before it in its segment. The last len(parents) segments also see the
    whole of their parent segment, which is one of the others, so that a prompt is computed once
    for all its completions. Lengths are known on the host, so that nobody has to ask the device.
    """

    lengths: np.ndarray  # [S] tokens of each segment
    parents: np.ndarray | None  # [C]
    keys: np.ndarray  # [S] tokens that the segment's last token sees
    query_ends: torch.Tensor  # [S + 1] int32, borders of the segments
    key_ends: torch.Tensor  # [S + 1] int32
    # Rows of keys and values in the order in which segments see them; None: as they come.
    seen: torch.Tensor | None

    def to(self, device):
        moved = [to_device(x, device) for x in (self.query_ends, self.key_ends, self.seen)]
        return Segments(self.lengths, self.parents, self.keys, *moved)


def make_segments(lengths, parents=None):
    """Segments on the host.

    Lengths 3, 2 and a child of length 1 whose parent is segment 1: keys 3, 2, 3; seen 0 1 2, 3 4,
    3 4 5.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if parents is None:
        return Segments(lengths, None, lengths, _ends(lengths), _ends(lengths), None)

    parents = np.asarray(parents, dtype=np.int64)
    roots = len(lengths) - len(parents)
    keys = lengths.copy()
    keys[roots:] += lengths[parents]

    # The roots as they are, then for each child its parent's rows and its own.
    starts = lengths.cumsum() - lengths
    children = np.arange(roots, len(lengths))
    pieces = np.stack([parents, children], 1).reshape(-1)
    root_rows = np.arange(lengths[:roots].sum())
    seen = np.concatenate([root_rows, ranges(starts[pieces], lengths[pieces])])
    return Segments(lengths, parents, keys, _ends(lengths), _ends(keys), torch.from_numpy(seen))


def _ends(lengths):
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))


def ranges(first, counts):
    """first[i] .. first[i] + counts[i] - 1 for every i, one after the other: int64 on the host."""
    before = counts.cumsum() - counts
    return np.arange(counts.sum()) + np.repeat(first - before, counts)


def to_device(x, device):
    """A tensor of the host (or None) on the device; to a GPU from pinned memory, nothing waits."""
    if x is None or torch.device(device).type != "cuda":
        return x
    return x.pin_memory().to(device, non_blocking=True)


class CausalAttention:
    """The training `attend`: causal within the segments of a packed batch."""

    def __init__(self, config, segments):
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.segments = segments
        self.mix = None

    def __call__(self, index, qkv, bias, cos, sin):
        """qkv [T, (H + 2K) * hd] of any layer -> [T, H * hd]."""
        q, k, v = rotated_qkv(qkv, bias, cos, sin, *self.heads)
        if self.mix is None:
            self.mix = attention_of(self.segments, q)
        return self.mix(q, k, v).flatten(1)


def attention_of(segments, q):
    """Attention of packed segments for queries such as q: called with q, k, v [T, heads, hd]."""
    if q.is_cuda:
        return FlashSegments(segments)
    if native.usable(q, q.shape[2]):
        return NativeSegments(segments)
    return PaddedSegments(segments)


class FlashSegments:
    """Attention of packed segments on CUDA, in one call; called with q, k, v [T, heads, hd].

    The queries are the last ones of what their segment sees: flash aligns the mask there.
    """

    def __init__(self, segments):
        self.seen = segments.seen
        longest = (int(segments.lengths.max()), int(segments.keys.max()))
        self.packing = (segments.query_ends, segments.key_ends, *longest)

        # Only CUDA needs it, and it is a recent part of torch.
        from torch.nn.attention.varlen import varlen_attn

        self.attend = varlen_attn
        self.options = {"window_size": (-1, 0)}  # causal
        # torch 2.11 takes grouped queries as they are; later versions want to be told.
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            self.options["enable_gqa"] = True

    def __call__(self, q, k, v):
        if self.seen is not None:
            k, v = k[self.seen], v[self.seen]
        return self.attend(q, k, v, *self.packing, **self.options)


class NativeSegments:
    """FlashSegments on a CPU, in C."""

    def __init__(self, segments):
        lengths = segments.lengths
        parents = np.full(len(lengths), -1)
        if segments.parents is not None:
            parents[len(lengths) - len(segments.parents) :] = segments.parents
        cut = np.stack([lengths.cumsum() - lengths, lengths, parents])
        self.cut = torch.from_numpy(cut)

    def __call__(self, q, k, v):
        return attend_segments(q, k, v, self.cut)


class PaddedSegments:
    """FlashSegments on a CPU in torch, in one or two calls per layer instead of one per segment.

    256 sequences of a tiny model would otherwise be 256 small calls. Segments that others continue
    and those that continue them are two tables, so that neither is padded to the other's length.
    """

    def __init__(self, segments):
        lengths, keys = segments.lengths, segments.keys
        if segments.parents is None:
            self.roots = PaddedTable(lengths, keys)
            self.children = None
            return
        count = len(lengths) - len(segments.parents)
        self.rows = int(lengths[:count].sum())
        self.seen = segments.seen[self.rows :]
        self.roots = PaddedTable(lengths[:count], keys[:count])
        self.children = PaddedTable(lengths[count:], keys[count:])

    def __call__(self, q, k, v):
        if self.children is None:
            return self.roots(q, k, v)
        rows, seen = self.rows, self.seen
        roots = self.roots(q[:rows], k[:rows], v[:rows])
        return torch.cat([roots, self.children(q[rows:], k[seen], v[seen])])


class PaddedTable:
    """Causal attention of segments of unequal length in one call; queries, keys: [S] of each.

    Keys are padded on the left and queries on the right, so that one mask tells padding and future
    apart; where the queries are all of the segment, both are padded on the right and is_causal
    does, which is faster.
    """

    def __init__(self, queries, keys):
        self.segments = len(queries)
        self.longest_q = int(queries.max())
        self.longest_k = int(keys.max())
        first_q = np.arange(self.segments) * self.longest_q
        first_k = np.arange(self.segments) * self.longest_k

        self.mask = None
        if not np.array_equal(queries, keys):
            padding = self.longest_k - keys
            first_k = first_k + padding
            # [segments, heads, rows of queries, columns of keys]
            row = np.arange(self.longest_q).reshape(1, 1, -1, 1)
            column = np.arange(self.longest_k).reshape(1, 1, 1, -1)
            queries_there = queries.reshape(-1, 1, 1, 1)
            last_seen = row + self.longest_k - queries_there
            seen = (column >= padding.reshape(-1, 1, 1, 1)) & (column <= last_seen)
            # Rows of padding look at anything: their result is dropped.
            self.mask = torch.from_numpy(seen | (row >= queries_there))

        # Row of each packed token in a [segments * longest] table.
        self.place_q = torch.from_numpy(ranges(first_q, queries))
        self.place_k = torch.from_numpy(ranges(first_k, keys))

    def __call__(self, q, k, v):
        out = F.scaled_dot_product_attention(
            self._padded(q, self.place_q, self.longest_q),
            self._padded(k, self.place_k, self.longest_k),
            self._padded(v, self.place_k, self.longest_k),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        rows = out.transpose(1, 2).flatten(0, 1)
        return rows[self.place_q]

    def _padded(self, x, place, longest):
        """[T, heads, hd] -> [segments, heads, longest, hd]."""
        rows = x.new_zeros(self.segments * longest, *x.shape[1:])
        rows = rows.index_copy(0, place, x)
        return rows.unflatten(0, (self.segments, longest)).transpose(1, 2)


def random_model(config, seed=0, dtype=torch.float32, std=0.02):
    """A model with normal(0, std) matrices, zero biases and unit norms.

    The same for the same seed on every machine.
    """
    model = Model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    return model.to(dtype)
