"""The device side of sampling: prefill passes and decode steps, without a look by the host.

On CUDA a step is the kernels of kernels/, captured as one CUDA graph per batch size. On CPU it is
oneDNN's matrix products and kernels/native.c, with every shape chosen so that a row's result
depends on that row alone, to the last bit, whatever else is in the batch (measured with 1 and 2
threads):

- matrix products go through oneDNN's packed weights, whose sums have one order for any number of
  rows but 1 (and which are up to twice as fast as F.linear for 2 to 32 rows); F.linear's order
  changes with the number of rows and of threads;
- batches are filled up to 4, 8 or a multiple of 16 rows: exp, sin or log of the last few elements
  of a tensor, or of a thread's share of it, those that fill no vector register, come from another
  function than the rest;
- attention reads a prompt's keys and then the row's own, whether or not the prompt is shared.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import native, use_triton
from kernels.attention import paged_attention
from kernels.layers import qkv_rope_write, rope_tables
from kernels.logprob import token_logprobs
from kernels.sampling import TILE, sample_logits, sample_tokens, uniforms_reference
from model import CausalAttention, make_segments
from runtime.exact import attend_to_pages, exact_linear

# Rows of the CUDA graphs, then every 64: few graphs to record, at most a third of the rows dead
# above 64.
SIZES = (1, 2, 4, 8, 16, 32)
# Rows of a batch on CPU, then every 16. oneDNN takes longer for 2 rows than for 4: 34 ms a step of
# the 135M model, not 28.
CPU_SIZES = (4, 8)

# One row per running sample: column -> dtype.
COLUMNS = {
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
# The two-dimensional ones; new_state() is told how wide they are.
WIDE_COLUMNS = {
    "stop_ids": torch.int64,  # filled up with -1
    "tables": torch.int32,  # pages: the prompt's and, on CUDA, the row's own
    "out_tokens": torch.int64,  # what was drawn, from the first response token on
    "out_logprobs": torch.float32,
}


def new_state(rows, widths, device):
    """Tensors for `rows` samples: column -> [rows] or [rows, width]; widths: column -> width."""
    state = {}
    for name, dtype in COLUMNS.items():
        state[name] = torch.zeros(rows, dtype=dtype, device=device)
    for name, dtype in WIDE_COLUMNS.items():
        state[name] = torch.zeros(rows, widths[name], dtype=dtype, device=device)
    return state


class Spans(NamedTuple):
    """The two stretches of the pool that a row reads on CPU: what it shares, then its own.

    First token in the pool and number of tokens, int64 [rows] each (kernels/native.py).
    """

    shared: torch.Tensor
    shared_length: torch.Tensor
    own: torch.Tensor
    own_length: torch.Tensor


class Decoder:
    """Model and page pool as two functions.

    `prefill` writes prompts to pages, `run` draws the next tokens of every row.
    """

    def __init__(self, model, pool, cpu, exact=False):
        self.model = model
        self.config = model.config
        self.pool = pool
        self.cpu = cpu
        self.exact = exact
        self.plain_linear = exact_linear if exact else F.linear

        # CPU: address of a weight -> its packed copy, and of which weights these are.
        self.packed = {}
        self.stamp = None

        # (rows, temperature) -> CUDA graph of a step, or None where a step cannot be recorded: the
        # torch references look at lengths on the host, the Triton kernels do not.
        uses_kernels = use_triton(model.embed.weight)
        has_kernel = self.config.head_dim in (64, 128)
        self.graphs = {} if uses_kernels and has_kernel else None

    def pad(self, count):
        """Rows to run for `count` living ones."""
        sizes = CPU_SIZES if self.cpu else SIZES
        step = 16 if self.cpu else 64
        for size in sizes:
            if size >= count:
                return size
        return -(-count // step) * step

    def refresh(self):
        """Pack the weights again if they changed; on CUDA they are read in place."""
        head = self.model.head_weight
        has_onednn = torch.backends.mkldnn.is_available()
        if not self.cpu or not has_onednn or head.dtype != torch.float32:
            return

        weights = [head]
        for layer in self.model.layers:
            weights += [layer.qkv.weight, layer.o.weight]
            weights += [layer.gate_up.weight, layer.down.weight]
        stamp = [(weight.data_ptr(), weight._version) for weight in weights]
        if stamp == self.stamp:
            return

        self.packed = {}
        for weight in weights:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
            self.packed[weight.data_ptr()] = packed
        self.stamp = stamp

    def linear(self, x, weight, bias=None):
        """x @ weight.T + bias, from the packed copy of the weight where there is one."""
        packed = self.packed.get(weight.data_ptr())
        if packed is None:
            given = (x, weight) if bias is None else (x, weight, bias)
            return self.plain_linear(*given)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def _linear_plus(self, x, weight, other):
        """x @ weight.T + other: one call where weights are packed, with the same bits as two."""
        if not self.packed:
            return other + self.linear(x, weight)
        packed = self.packed[weight.data_ptr()]
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, None, "add")

    def prefill(self, prompts, pages):
        """Write the keys and values of prompts to their pages.

        prompts: lists of ids, longest first. pages: a list of page ids each.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        if self.cpu:
            self._prefill_on_cpu(tokens, positions, lengths, pages)
        else:
            self._prefill_packed(tokens, positions, lengths, pages)

    def _prefill_on_cpu(self, tokens, positions, lengths, pages):
        """Every token is a row, with the prompt up to itself as its own tokens."""
        first_pages = torch.tensor([taken[0] for taken in pages])
        first = first_pages * self.pool.page_size
        own = first.repeat_interleave(lengths)
        alive = torch.ones_like(tokens, dtype=torch.bool)
        nothing = torch.zeros_like(own)

        # Up to a multiple of 16 rows; those that fill up are not alive.
        missing = -len(tokens) % 16
        columns = (tokens, positions, alive, own, nothing, own, positions + 1)
        tokens, positions, alive, *spans = [F.pad(x, (0, missing)) for x in columns]
        self._decode_on_cpu(tokens, positions, alive, Spans(*spans))

    def _prefill_packed(self, tokens, positions, lengths, pages):
        """One packed pass: pages are written on the way, attention is the training's."""
        device = self.model.embed.weight.device
        page_size = self.pool.page_size
        page_table = _ragged(pages)
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        page = page_table[sequence, positions // page_size]
        slots = (page * page_size + positions % page_size).to(device)
        positions = positions.to(device)

        # The exact mode: every token is a query of the decode kernel, over what it wrote.
        tables = page_table.int().to(device)
        tables = tables[sequence.to(device)]
        seen = (positions + 1).int()
        causal = CausalAttention(self.config, make_segments(lengths).to(device))

        def attend(index, qkv, bias, cos, sin):
            q = self._write(index, qkv, bias, cos, sin, slots)
            if self.exact:
                k_pages, v_pages = self.pool.layer(index)
                return attend_to_pages(q, k_pages, v_pages, tables, seen)
            return causal(index, qkv, bias, cos, sin)

        tokens = tokens.to(device)
        self.model.decode(tokens, positions, attend, self.linear)

    def _write(self, index, qkv, bias, cos, sin, slots):
        """Rotate q and k and write k and v of layer `index` to the pool -> q."""
        heads = self.config.num_attention_heads
        k_pages, v_pages = self.pool.layer(index)
        return qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, heads)

    def run(self, state, steps, truncated, temperature=None):
        """`steps` steps; on CUDA each is one graph launch.

        state: column -> tensor; the same tensors at the same addresses for a number of rows.
        truncated: some row has top_p or top_k.
        temperature: of all rows, in the exact mode.
        """
        if self.graphs is None or truncated:
            for _ in range(steps):
                self.step(state, truncated, temperature)
            return

        key = len(state["alive"]), temperature
        if key not in self.graphs:
            self.graphs[key] = self._record(state, temperature)
        for _ in range(steps):
            self.graphs[key].replay()

    def forget_graphs(self):
        """Rows have new addresses."""
        if self.graphs is not None:
            self.graphs = {}

    def _record(self, state, temperature):
        """Record a step as a CUDA graph.

        All rows are dead while it warms up (kernels compile, libraries allocate), so nothing
        changes.
        """
        alive = state["alive"].clone()
        state["alive"].zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(state, False, temperature)
            self.step(state, False, temperature)
        torch.cuda.current_stream().wait_stream(stream)

        # One memory pool for all graphs: they never run together.
        known = next(iter(self.graphs.values()), None)
        memory = known.pool() if known else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self.step(state, False, temperature)
        state["alive"].copy_(alive)
        return graph

    def step(self, state, truncated, temperature=None):
        """Decode one token of every living row, in place.

        `alive` turns False on a stop token or at the last position.
        """
        alive = state["alive"]
        positions = state["positions"]
        fed = state["tokens"]
        if self.cpu:
            hidden = self._decode_on_cpu(fed, positions, alive, self._spans(state))
        else:
            attend = self._paged_attention(state)
            hidden = self.model.decode(fed, positions, attend, self.linear)
        tokens, logprobs = self._draw(hidden, state, truncated, temperature)

        column = positions + 1 - state["start"]
        _write_column(state["out_tokens"], column, tokens, alive)
        _write_column(state["out_logprobs"], column, logprobs, alive)

        stopped = (tokens[:, None] == state["stop_ids"]).any(1)
        has_room = positions + 1 < state["last"]
        goes_on = alive & ~stopped & has_room
        fed.copy_(torch.where(goes_on, tokens, fed))
        positions.add_(goes_on)
        alive.copy_(goes_on)

    def _spans(self, state):
        """The prompt, but its last token, lies in one piece; the run begins with the last token."""
        page_size = self.pool.page_size
        run = self.pool.size.run_pages * page_size
        first_page = state["tables"][:, 0].long()
        return Spans(
            shared=first_page * page_size,
            shared_length=state["start"] - 1,
            own=state["slot"] * run,
            own_length=state["positions"] - state["start"] + 2,
        )

    def _paged_attention(self, state):
        """The `attend` of a decode step: what dead rows would write is dropped."""
        alive = state["alive"]
        positions = state["positions"]
        tables = state["tables"]
        page_size = self.pool.page_size
        column = positions // page_size
        page = tables.gather(1, column[:, None]).squeeze(1)
        slots = page * page_size + positions % page_size
        slots = torch.where(alive, slots, -1)
        lengths = torch.where(alive, positions + 1, 0).int()
        scale = self.config.head_dim**-0.5

        def attend(index, qkv, bias, cos, sin):
            q = self._write(index, qkv, bias, cos, sin, slots)
            k_pages, v_pages = self.pool.layer(index)
            if self.exact:
                return attend_to_pages(q, k_pages, v_pages, tables, lengths)
            return paged_attention(q, k_pages, v_pages, tables, lengths, scale).flatten(1)

        return attend

    def _decode_on_cpu(self, tokens, positions, alive, spans):
        """Model.decode in as few calls as can be, with attention over the pool."""
        config = self.config
        eps = config.rms_norm_eps
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        attend = native.attention(heads, cos, sin, *spans, alive)

        total = self.model.embed(tokens)
        width = config.num_attention_heads * config.head_dim
        mixed = total.new_zeros(len(tokens), width)  # stays 0 where a row is not alive
        for layer, cache in zip(self.model.layers, self.pool.joint):
            normed = native.rms_norm(total, layer.input_norm, eps)
            qkv = self.linear(normed, layer.qkv.weight, layer.qkv.bias)
            if layer.qkv.bias is None:  # Qwen3
                qkv = layer.norm_heads(qkv)
            attend(qkv, cache.flatten(1, 2), mixed)
            total = self._linear_plus(mixed, layer.o.weight, total)

            normed = native.rms_norm(total, layer.post_norm, eps)
            gate_up = self.linear(normed, layer.gate_up.weight)
            inner = native.swiglu(gate_up)
            total = self._linear_plus(inner, layer.down.weight, total)
        return native.rms_norm(total, self.model.norm, eps)

    def _draw(self, hidden, state, truncated, temperature):
        """hidden [rows, D] -> drawn tokens [rows] and their log-probs [rows]."""
        head = self.model.head_weight
        position = state["positions"] + 1
        identity = (state["seed"], state["request"], state["sample"], position)
        key = (state["temperature"], *identity)
        if truncated:
            logits = self.linear(hidden, head).float()
            limits = (state["top_p"], state["top_k"])
            return sample_logits(logits, *key, *limits)
        if self.cpu:
            logits = self.linear(hidden, head).float()
            return draw(logits, *key)

        tokens, logprobs = sample_tokens(hidden, head, *key, one_tile=self.exact)
        if self.exact:  # the trainer's own kernel has the last word on the log-prob
            logprobs, _ = token_logprobs(hidden, head, tokens, temperature or 1.0)
        return tokens, logprobs


def _write_column(table, column, values, alive):
    """table[row, column[row]] = values[row] where a row is alive; dead rows keep what they have."""
    column = column[:, None]
    kept = table.gather(1, column).squeeze(1)
    written = torch.where(alive, values, kept)
    table.scatter_(1, column, written[:, None])


def _ragged(lists):
    """Lists of ints -> [len(lists), longest] int64; a short list repeats its last entry."""
    width = max(len(values) for values in lists)
    rows = []
    for values in lists:
        missing = width - len(values)
        rows.append(values + values[-1:] * missing)
    return torch.tensor(rows)


def draw(logits, temperature, *key):
    """kernels.sampling.sample_tokens from given logits, in as few passes over them as can be.

    logits: [B, V], overwritten. key: seed, request id, sample and position, int64 [B] each.
    Returns tokens [B] and log-probs [B]. The logarithm is taken in float64: in fp32 its last bit
    would depend on a row's place in the batch.
    """
    greedy = temperature <= 0
    divisor = torch.where(greedy, 1.0, temperature)
    if bool((divisor != 1).any()):
        logits.div_(divisor[:, None])
    if bool(greedy.any()):
        top, best = logits.max(-1)
    else:
        top = logits.amax(-1)
        best = None

    # A tile by its mass, then a token within the tile.
    below = logits.sub_(top[:, None])
    rows, vocabulary = logits.shape
    weights = F.pad(below.exp(), (0, -vocabulary % TILE))
    weights = weights.view(rows, -1, TILE)
    masses = weights.sum(-1)
    tile_uniform, token_uniform = uniforms_reference(*key)
    tile = _first_above(masses, tile_uniform)
    weights = weights[torch.arange(rows), tile]
    token = tile * TILE + _first_above(weights, token_uniform)
    if best is not None:
        token = torch.where(greedy, best, token)

    total = masses.sum(-1).double()
    log_total = total.log().float()
    drawn = below.gather(1, token[:, None]).squeeze(1)
    return token, drawn - log_total


def _first_above(masses, uniform):
    """First index whose cumulative mass exceeds uniform * total.

    Never one of mass 0: rounding could put the threshold at the very end.
    """
    cumulative = masses.cumsum(-1)
    index = torch.arange(masses.shape[1])
    last = torch.where(masses > 0, index, 0).amax(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    below = (cumulative <= threshold).sum(-1)
    return below.minimum(last)
