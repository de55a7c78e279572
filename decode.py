"""The device side of sampling: prefill passes and decode steps on tensors, without a look by the host.

On CUDA a step is the kernels of kernels/, captured as one CUDA graph per batch size. On CPU it is oneDNN's matrix products and kernels/native.c, with
every shape chosen so that a row's result depends on that row alone, to the last bit, whatever else is in the batch (measured with 1 and 2 threads):

- matrix products go through oneDNN's packed weights, whose sums have one order for any number of rows but 1 (and which are up to twice as fast as
  F.linear for 2 to 32 rows); F.linear's order changes with the number of rows and of threads;
- batches are filled up to 4, 8 or a multiple of 16 rows: exp, sin or log of the last few elements of a tensor, or of a thread's share of it, those
  that fill no vector register, come from another function than the rest;
- attention reads a prompt's keys and then the row's own, whether or not the prompt is shared.
"""

import torch
import torch.nn.functional as F

from kernels import native, use_triton
from kernels.attention import shared_prefix_attention
from kernels.layers import qkv_rope_write, rope_tables
from kernels.logprob import token_logprobs
from kernels.sampling import TILE, sample_logits, sample_tokens, uniforms_reference
from model import causal_attention
from runtime.exact import attend_to_pages, exact_linear

SIZES = (
    1,
    2,
    4,
    8,
    16,
    32,
)  # rows of the CUDA graphs, then every 64: few graphs to record, at most a third of the rows dead above 64

# One row per running sample: name -> dtype. Tables, stop ids and outputs are two-dimensional and sized by `new_state`.
ROW = {
    "tokens": torch.int64,  # fed next
    "positions": torch.int64,  # of `tokens`
    "start": torch.int64,  # prompt length = position of the first response token
    "last": torch.int64,  # position of the last token that may be drawn
    "group": torch.int64,  # samples of one prompt are neighbours
    "slot": torch.int64,  # number of its run of pages
    "prefix": torch.int32,  # tokens in pages shared with the rest of the group
    "temperature": torch.float32,
    "top_p": torch.float32,
    "top_k": torch.int64,
    "seed": torch.int64,
    "request": torch.int64,
    "sample": torch.int64,
    "alive": torch.bool,
}


def new_state(rows, widths, device):
    """Tensors for `rows` samples; widths: name -> (dtype, columns) of the two-dimensional ones."""
    state = {name: torch.zeros(rows, dtype=dtype, device=device) for name, dtype in ROW.items()}
    return state | {
        name: torch.zeros(rows, width, dtype=dtype, device=device)
        for name, (dtype, width) in widths.items()
    }


class Decoder:
    """Model and page pool as two functions: `prefill` writes prompts to pages, `step` draws the next token of every row."""

    def __init__(self, model, pool, cpu, exact=False):
        self.model, self.config, self.pool, self.cpu, self.exact = (
            model,
            model.config,
            pool,
            cpu,
            exact,
        )
        self.linear = exact_linear if exact else F.linear
        self.packed, self.stamp = {}, None
        # The torch references look at lengths on the host, so only the Triton kernels can be recorded.
        self.graphs = (
            {} if use_triton(model.embed.weight) and self.config.head_dim in (64, 128) else None
        )

    def refresh(self):
        """Pack the weights again if they changed; on CUDA they are read in place."""
        matrices = [
            w
            for layer in self.model.layers
            for w in (layer.qkv.weight, layer.o.weight, layer.gate_up.weight, layer.down.weight)
        ]
        stamp = [(w.data_ptr(), w._version) for w in (*matrices, self.model.head_weight)]
        can_pack = (
            self.cpu
            and torch.backends.mkldnn.is_available()
            and self.model.head_weight.dtype == torch.float32
        )
        if can_pack and stamp != self.stamp:
            self.packed = {
                w.data_ptr(): torch.ops.mkldnn._reorder_linear_weight(w.detach(), 64)
                for w in (*matrices, self.model.head_weight)
            }
            self.stamp, self.linear = stamp, self._packed_linear

    def _packed_linear(self, x, weight, bias=None):
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed[weight.data_ptr()], bias, "none", [], ""
        )

    def _linear_plus(self, x, weight, other):
        """x @ weight.T + other: in one call where the weights are packed, with the same bits as in two."""
        if not self.packed:
            return other + self.linear(x, weight)
        return torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self.packed[weight.data_ptr()], None, "add"
        )

    def _decode_on_cpu(self, tokens, positions, alive, *where):
        """Model.decode in as few calls as can be, with attention over the pool.

        where: first token in the pool and number of tokens of what each row shares, then of its own (kernels/native.py).
        """
        c = self.config
        cos, sin = rope_tables(positions, c.head_dim, c.rope_theta)
        attend = native.attention(
            (c.num_attention_heads, c.num_key_value_heads, c.head_dim), cos, sin, *where, alive
        )
        mixed = torch.zeros(
            len(tokens), c.num_attention_heads * c.head_dim, dtype=self.pool.k[0].dtype
        )
        total = self.model.embed(tokens)
        for layer, cache in zip(self.model.layers, self.pool.joint):
            qkv = self.linear(
                native.rms_norm(total, layer.input_norm, c.rms_norm_eps),
                layer.qkv.weight,
                layer.qkv.bias,
            )
            if layer.qkv.bias is None:
                qkv = layer.norm_heads(qkv)
            attend(qkv, cache.flatten(1, 2), mixed)
            total = self._linear_plus(mixed, layer.o.weight, total)
            gate_up = self.linear(
                native.rms_norm(total, layer.post_norm, c.rms_norm_eps), layer.gate_up.weight
            )
            total = self._linear_plus(native.swiglu(gate_up), layer.down.weight, total)
        return native.rms_norm(total, self.model.norm, c.rms_norm_eps)

    def pad(self, count):
        """Rows to run for `count` living ones."""
        if not self.cpu:
            return next((size for size in SIZES if size >= count), -(-count // 64) * 64)
        return next(
            (size for size in (4, 8) if size >= count), -(-count // 16) * 16
        )  # oneDNN takes longer for 2 rows than for 4: 34 ms a step, not 28

    def prefill(self, prompts, pages):
        """Write the keys and values of `prompts` (lists of ids, longest first) to `pages` (a list of page ids each)."""
        device = self.model.embed.weight.device
        lengths = torch.tensor([len(p) for p in prompts])
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        page_size = self.pool.page_size
        if self.cpu:  # every token is a row, with the prompt up to itself as its own tokens
            own = torch.tensor([taken[0] * page_size for taken in pages]).repeat_interleave(lengths)
            rows = (
                tokens,
                positions,
                torch.ones(len(tokens), dtype=torch.bool),
                own,
                torch.zeros_like(own),
                own,
                positions + 1,
            )
            self._decode_on_cpu(
                *(F.pad(x, (0, -len(tokens) % 16)) for x in rows)
            )  # filler rows are not alive
            return
        table, sequence = _ragged(pages), torch.arange(len(prompts)).repeat_interleave(lengths)
        slots = (table[sequence, positions // page_size] * page_size + positions % page_size).to(
            device
        )
        positions = positions.to(device)
        causal = causal_attention(
            self.config, F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        )
        tables, upto = table.int().to(device)[sequence.to(device)], (positions + 1).int()

        def attend(i, qkv, bias, cos, sin):
            q = qkv_rope_write(
                qkv,
                bias,
                cos,
                sin,
                self.pool.k[i],
                self.pool.v[i],
                slots,
                self.config.num_attention_heads,
            )
            return (
                attend_to_pages(q, self.pool.k[i], self.pool.v[i], tables, upto)
                if self.exact
                else causal(i, qkv, bias, cos, sin)
            )

        self.model.decode(tokens, positions, attend, self.linear)

    def run(self, state, steps, truncated, temperature=None):
        """`steps` steps; on CUDA each is one graph launch. The rows of `state` must be the same tensors at the same addresses every time.

        truncated: some row has top_p or top_k. temperature: of all rows, in the exact mode.
        """
        key = len(state["alive"]), temperature
        if self.graphs is None or truncated:
            for _ in range(steps):
                self.step(state, truncated, temperature)
            return
        if key not in self.graphs:
            self.graphs[key] = self._record(state, temperature)
        for _ in range(steps):
            self.graphs[key].replay()

    def _record(self, state, temperature):
        """Record a step as a CUDA graph. All rows are dead while it warms up (kernels compile, libraries allocate), so nothing changes."""
        alive = state["alive"].clone()
        state["alive"].zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(state, False, temperature)
            self.step(state, False, temperature)
        torch.cuda.current_stream().wait_stream(stream)
        graph, known = torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
        with torch.cuda.graph(
            graph, pool=known.pool() if known else None
        ):  # one memory pool for all: they never run together
            self.step(state, False, temperature)
        state["alive"].copy_(alive)
        return graph

    def step(self, state, truncated, temperature=None):
        """Decode one token of every living row, in place: `alive` turns False on a stop token or at the last position."""
        s, alive, positions = state, state["alive"], state["positions"]
        if self.cpu:
            run, page_size = self.pool.run_pages * self.pool.page_size, self.pool.page_size
            where = (
                s["tables"][:, 0].long() * page_size,
                s["start"] - 1,
                s["slot"] * run,
                positions - s["start"] + 2,
            )
            hidden = self._decode_on_cpu(s["tokens"], positions, alive, *where)
        else:
            hidden = self.model.decode(
                s["tokens"], positions, self._paged_attention(s), self.linear
            )
        tokens, logprobs = self._draw(hidden, s, positions + 1, truncated, temperature)
        column = (positions + 1 - s["start"])[:, None]
        for out, value in (("out_tokens", tokens), ("out_logprobs", logprobs)):
            s[out].scatter_(
                1, column, torch.where(alive[:, None], value[:, None], s[out].gather(1, column))
            )
        goes_on = alive & ~(tokens[:, None] == s["stop_ids"]).any(1) & (positions + 1 < s["last"])
        s["tokens"].copy_(torch.where(goes_on, tokens, s["tokens"]))
        s["positions"].add_(goes_on)
        s["alive"].copy_(goes_on)

    def _paged_attention(self, s):
        page_size, positions = self.pool.page_size, s["positions"]
        page = s["tables"].gather(1, (positions // page_size)[:, None]).squeeze(1)
        slots = torch.where(s["alive"], page * page_size + positions % page_size, -1)
        lengths = torch.where(s["alive"], positions + 1, 0).int()
        heads, scale, pool = self.config.num_attention_heads, self.config.head_dim**-0.5, self.pool

        def attend(i, qkv, bias, cos, sin):
            q = qkv_rope_write(qkv, bias, cos, sin, pool.k[i], pool.v[i], slots, heads)
            if self.exact:
                return attend_to_pages(q, pool.k[i], pool.v[i], s["tables"], lengths)
            return shared_prefix_attention(
                q, pool.k[i], pool.v[i], s["tables"], lengths, s["prefix"], s["group"], scale
            ).flatten(1)

        return attend

    def _draw(self, hidden, s, positions, truncated, temperature):
        key = (s["temperature"], s["seed"], s["request"], s["sample"], positions)
        if truncated:
            return sample_logits(
                self.linear(hidden, self.model.head_weight).float(), *key, s["top_p"], s["top_k"]
            )[:2]
        if self.cpu:
            return draw(self.linear(hidden, self.model.head_weight).float(), *key)
        tokens, logprobs, _ = sample_tokens(
            hidden, self.model.head_weight, *key, one_tile=self.exact
        )
        if self.exact:  # the trainer's own kernel has the last word on the log-prob
            logprobs, _ = token_logprobs(hidden, self.model.head_weight, tokens, temperature or 1.0)
        return tokens, logprobs


def _ragged(lists):
    """Lists of ints -> [len(lists), longest] int64; a short list repeats its last entry."""
    width = max(len(x) for x in lists)
    return torch.tensor([x + x[-1:] * (width - len(x)) for x in lists])


def draw(logits, temperature, *key):
    """kernels.sampling.sample_tokens from given logits [B, V], which it overwrites: (tokens [B], logprobs [B]), as few passes over them as can be.

    The logarithm is taken in float64: in fp32 its last bit would depend on a row's place in the batch.
    """
    greedy = temperature <= 0
    if not bool((greedy | (temperature == 1)).all()):
        logits.div_(torch.where(greedy, 1.0, temperature)[:, None])
    top, best = (
        logits.max(-1) if bool(greedy.any()) else (logits.amax(-1), torch.zeros_like(key[0]))
    )
    below = logits.sub_(top[:, None])
    weights = F.pad(below.exp(), (0, -logits.shape[1] % TILE)).view(len(logits), -1, TILE)
    masses, (u0, u1) = weights.sum(-1), uniforms_reference(*key)
    tile = _first_above(masses, u0)
    inside = _first_above(weights[torch.arange(len(logits)), tile], u1)
    token = torch.where(greedy, best, tile * TILE + inside)
    return token, below.gather(1, token[:, None]).squeeze(1) - masses.sum(-1).double().log().float()


def _first_above(masses, uniform):
    """First index whose cumulative mass exceeds uniform * total, never one of mass 0 (rounding could put the threshold at the very end)."""
    cumulative = masses.cumsum(-1)
    last = (masses > 0).long().mul_(torch.arange(masses.shape[1])).amax(-1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1).minimum(last)
