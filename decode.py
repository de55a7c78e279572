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

from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from kernels import native, rows, use_triton
from kernels.attention import paged_attention
from kernels.layers import qkv_rope_write
from kernels.logprob import token_logprobs
from kernels.rope import rope_tables
from kernels.rows import Rows
from kernels.sampling import TILE, sample_logits
from model import CausalAttention, make_segments
from runtime.exact import attend_to_pages, exact_linear

# Rows of the CUDA graphs, then every 64: few graphs to record, at most a third of the rows dead
# above 64.
SIZES = (1, 2, 4, 8, 16, 32)
# Rows of a batch on CPU, then every 16. oneDNN takes longer for 2 rows than for 4: 34 ms a step of
# the 135M model, not 28.
CPU_SIZES = (4, 8)


class Fetch:
    """Tensors on their way to the host, behind the work that the device has been given so far."""

    def __init__(self, *tensors):
        # To pinned memory where non_blocking and from a GPU; a copy on a CPU as well.
        self.copies = [x.to("cpu", non_blocking=True, copy=True) for x in tensors]
        self.event = None
        if tensors[0].is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def is_here(self):
        return self.event is None or self.event.query()

    def wait(self):
        """The tensors' values -> numpy arrays."""
        if self.event:
            self.event.synchronize()
        return [copy.numpy() for copy in self.copies]


def upload(array, device):
    """A numpy array as a tensor of the device; to a GPU from pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Decoder:
    """Model and page pool as functions.

    `prefill` writes prompts to pages, `join` says what a slot is to decode and `place` which slots
    run, `run` draws their next tokens, `look` and `outputs` tell the host about them.
    """

    def __init__(self, model, pool, cpu, exact=False):
        self.model = model
        self.config = model.config
        self.pool = pool
        self.cpu = cpu
        self.exact = exact
        self.plain_linear = exact_linear if exact else F.linear
        size = pool.size
        self.device = pool.device
        self.rows = Rows(size.runs, size.stops, size.table, size.response, self.device)
        self.cos, self.sin = rope_of_positions(size.positions, self.config, self.device)

        # CPU: address of a weight -> its packed copy, and of which weights these are.
        self.packed = {}
        self.stamp = None

        # (rows, temperature) -> CUDA graph of a step, or None where steps cannot be recorded.
        self.graphs = {} if can_record(model) else None

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
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.fromiter(chain.from_iterable(prompts), np.int64, lengths.sum())
        starts = lengths.cumsum() - lengths
        positions = np.arange(len(tokens)) - starts.repeat(lengths)
        if self.cpu:
            self._prefill_on_cpu(tokens, positions, lengths, pages)
        else:
            self._prefill_packed(tokens, positions, lengths, pages)

    def _prefill_on_cpu(self, tokens, positions, lengths, pages):
        """Every token is a row, with the prompt up to itself as its own tokens."""
        first_pages = np.array([taken[0] for taken in pages])
        own = (first_pages * self.pool.page_size).repeat(lengths)
        alive = np.ones_like(tokens, dtype=bool)
        nothing = np.zeros_like(own)

        # Up to a multiple of 16 rows; those that fill up are not alive.
        missing = -len(tokens) % 16
        columns = (tokens, positions, alive, own, nothing, own, positions + 1)
        padded = [torch.from_numpy(np.pad(column, (0, missing))) for column in columns]
        tokens, positions, alive, *spans = padded
        self._decode_on_cpu(tokens, positions, alive, spans)

    def _prefill_packed(self, tokens, positions, lengths, pages):
        """One packed pass: pages are written on the way, attention is the training's."""
        page_size = self.pool.page_size
        page_table = _ragged(pages)
        sequence = np.arange(len(lengths)).repeat(lengths)
        page = page_table[sequence, positions // page_size]
        slots = page * page_size + positions % page_size
        packed = np.stack([tokens, positions, slots])
        tokens, positions, slots = upload(packed, self.device).unbind(0)
        causal = CausalAttention(self.config, make_segments(lengths).to(self.device))
        if self.exact:  # every token is a query of the decode kernel, over what it wrote
            tables = upload(page_table[sequence].astype(np.int32), self.device)
            seen = (positions + 1).int()

        def attend(index, qkv, bias, cos, sin):
            q = self._write(index, qkv, bias, cos, sin, slots)
            if self.exact:
                k_pages, v_pages = self.pool.layer(index)
                return attend_to_pages(q, k_pages, v_pages, tables, seen)
            return causal(index, qkv, bias, cos, sin)

        rope = (self.cos.index_select(0, positions), self.sin.index_select(0, positions))
        self.model.decode(tokens, rope, attend, self.linear)

    def join(self, new_rows):
        """Let slots decode new samples; new_rows: an array each, of Rows.new_row."""
        new = upload(np.stack(new_rows), self.device)
        self.rows.values.index_copy_(0, new[:, rows.SLOT], new)

    def place(self, slots):
        """Decode these slots from now on -> rows to run, some of them to fill up with."""
        count = self.pad(len(slots))
        active = np.full(count, self.rows.nobody)
        active[: len(slots)] = slots
        self.rows.active[:count].copy_(upload(active, self.device), non_blocking=True)
        return count

    def look(self, count, newest):
        """Position and life of the first `count` slots that run, and their `newest` tokens.

        -> Fetch of [count, 2] and, unless `newest` is 0, [count, newest], the last one last.
        """
        active = self.rows.active[:count]
        values = self.rows.values.index_select(0, active)
        places = values[:, rows.POSITION : rows.ALIVE + 1]
        if not newest:
            return Fetch(places)
        drawn = values[:, rows.POSITION] + 1 - values[:, rows.START]
        before = torch.arange(-newest, 0, device=self.device)
        columns = (drawn[:, None] + before).clamp(min=0)
        tokens = self.rows.out[:, 0].index_select(0, active).gather(1, columns)
        return Fetch(places, tokens)

    def outputs(self, slots, longest):
        """What slots have drawn -> Fetch of [slots, 2, longest] int32: tokens, bits of log-probs."""
        index = upload(np.array(slots), self.device)
        return Fetch(self.rows.out[:, :, :longest].index_select(0, index))

    def _write(self, index, qkv, bias, cos, sin, slots):
        """Rotate q and k and write k and v of layer `index` to the pool -> q."""
        heads = self.config.num_attention_heads
        k_pages, v_pages = self.pool.layer(index)
        return qkv_rope_write(qkv, bias, cos, sin, k_pages, v_pages, slots, heads)

    def run(self, count, steps, truncated, temperature=None):
        """`steps` steps of the first `count` slots of `place`; on CUDA each is one graph launch.

        truncated: some row has top_p or top_k.
        temperature: of all rows, in the exact mode.
        """
        if self.graphs is None or truncated:
            for _ in range(steps):
                self.step(count, truncated, temperature)
            return

        key = count, temperature
        if key not in self.graphs:
            self.graphs[key] = self._record(count, temperature)
        for _ in range(steps):
            self.graphs[key].replay()

    def _record(self, count, temperature):
        """Record a step as a CUDA graph.

        Nobody runs while it warms up (kernels compile, libraries allocate), so nothing changes.
        """
        active = self.rows.active[:count]
        placed = active.clone()
        active.fill_(self.rows.nobody)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(count, False, temperature)
            self.step(count, False, temperature)
        torch.cuda.current_stream().wait_stream(stream)

        # One memory pool for all graphs: they never run together.
        known = next(iter(self.graphs.values()), None)
        memory = known.pool() if known else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self.step(count, False, temperature)
        active.copy_(placed)
        return graph

    def step(self, count, truncated, temperature=None):
        """Decode one token of every living row of the first `count` that run."""
        active = self.rows.active[:count]
        if self.cpu:
            self._step_on_cpu(active, truncated)
            return

        step = rows.begin(self.rows, active, self.cos, self.sin, self.pool.page_size)
        rope = (step.cos, step.sin)
        hidden = self.model.decode(step.tokens, rope, self._paged_attention(step), self.linear)
        head = self.model.head_weight
        if truncated:
            values = self.rows.values.index_select(0, active)
            logits = self.linear(hidden, head)
            tokens, logprobs = _draw_truncated(logits, values)
            rows.advance(self.rows, active, values, tokens, logprobs)
            return

        tokens = rows.draw_and_advance(self.rows, active, step, hidden, head, one_tile=self.exact)
        if self.exact:  # the trainer's own kernel has the last word on the log-prob
            logprobs, _ = token_logprobs(hidden, head, tokens, temperature or 1.0)
            bits = logprobs.view(torch.int32)
            self.rows.out[:, 1].index_put_((active, step.column), bits)

    def _paged_attention(self, step):
        """The `attend` of a decode step: what dead rows would write is dropped."""
        scale = self.config.head_dim**-0.5

        def attend(index, qkv, bias, cos, sin):
            q = self._write(index, qkv, bias, cos, sin, step.slots)
            k_pages, v_pages = self.pool.layer(index)
            pages = (k_pages, v_pages, step.tables, step.lengths)
            if self.exact:
                return attend_to_pages(q, *pages)
            return paged_attention(q, *pages, scale).flatten(1)

        return attend

    def _step_on_cpu(self, active, truncated):
        values = self.rows.values.index_select(0, active)
        alive = values[:, rows.ALIVE] == 1
        positions = torch.where(alive, values[:, rows.POSITION], 0)
        start = values[:, rows.START]

        # The prompt, but its last token, lies in one piece; the run begins with the last token.
        page_size = self.pool.page_size
        shared = values[:, rows.STOPS + self.rows.stops] * page_size
        own = values[:, rows.SLOT] * (self.pool.size.run_pages * page_size)
        spans = (shared, start - 1, own, positions - start + 2)
        hidden = self._decode_on_cpu(values[:, rows.TOKEN], positions, alive, spans)
        logits = self.linear(hidden, self.model.head_weight)
        if truncated:
            tokens, logprobs = _draw_truncated(logits, values)
        else:
            temperature = rows.floats(values, rows.TEMPERATURE)
            tokens, logprobs = draw(logits.float(), temperature, rows.uniforms(values))
        rows.advance(self.rows, active, values, tokens, logprobs)

    def _decode_on_cpu(self, tokens, positions, alive, spans):
        """Model.decode in as few calls as can be, with attention over the pool.

        spans: what a row shares and what is its own, as native.attention takes them.
        """
        config = self.config
        eps = config.rms_norm_eps
        cos = self.cos.index_select(0, positions)
        sin = self.sin.index_select(0, positions)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        attend = native.attention(heads, cos, sin, *spans, alive)

        total = self.model.embed(tokens)
        width = config.num_attention_heads * config.head_dim
        mixed = total.new_zeros(len(tokens), width)  # stays 0 where a row is not alive
        for layer, cache in zip(self.model.layers, self.pool.kv):
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


def can_record(model):
    """Can steps be CUDA graphs? The torch references look at lengths on the host, Triton does not."""
    return use_triton(model.embed.weight) and model.config.head_dim in (64, 128)


def rope_of_positions(count, config, device):
    """rope_tables of positions 0..count-1 and some more.

    In parts of whole vectors for one thread: the rest of a vector comes from another function.
    """
    parts = []
    for start in range(0, count, 512):
        positions = torch.arange(start, start + 512, device=device)
        parts.append(rope_tables(positions, config.head_dim, config.rope_theta))
    cos, sin = zip(*parts)
    return torch.cat(cos), torch.cat(sin)


def _ragged(lists):
    """Lists of ints -> array [len(lists), longest]; a short list repeats its last entry."""
    width = max(len(values) for values in lists)
    padded = []
    for values in lists:
        missing = width - len(values)
        padded.append(values + values[-1:] * missing)
    return np.array(padded)


def _draw_truncated(logits, values):
    """Tokens and log-probs of gathered rows of which some have top_p or top_k."""
    limits = (rows.floats(values, rows.TOP_P), values[:, rows.TOP_K])
    temperature = rows.floats(values, rows.TEMPERATURE)
    return sample_logits(logits.float(), temperature, rows.uniforms(values), *limits)


def draw(logits, temperature, uniforms):
    """kernels.sampling.sample_tokens from given logits, in as few passes over them as can be.

    logits: [B, V], overwritten. uniforms: [2, B].
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
    tile_uniform, token_uniform = uniforms
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
