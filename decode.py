"""The device side of sampling: prefill passes and decode steps on tensors, without a look by the host.

On CUDA a step is the kernels of kernels/, captured as one CUDA graph per batch size. On CPU it is torch, with every shape chosen so that a row's result
depends on that row alone, to the last bit, whatever else is in the batch (measured with 1 and 2 threads):

- matrix products go through oneDNN's packed weights, whose sums have one order for any number of rows but 1 (and which are up to twice as fast as
  F.linear for 2 to 32 rows); F.linear's order changes with the number of rows and of threads;
- batches are filled up to 2, 4, 8 or a multiple of 16 rows: exp, sin or log of the last few elements of a tensor, or of a thread's share of it, those
  that fill no vector register, come from another function than the rest;
- attention reads keys in units of 16 tokens and chunks of 384 (longer inner sums are blocked by their length), merged by log-sum-exp;
- it always splits a sequence into its prompt and its own tokens, whether or not the prompt is shared.

A CPU step's matrix products read all weights, which throws everything else out of the caches: each further call then costs 2.5 times what it costs
alone. So the step makes few calls: oneDNN adds biases and residuals itself, rotation and page write treat q, k and v as one tensor.
"""

import torch
import torch.nn.functional as F

from exact import attend_to_pages, exact_linear
from kernels import use_triton
from kernels.attention import shared_prefix_attention
from kernels.layers import qkv_rope_write, rope_tables
from kernels.logprob import token_logprobs
from kernels.sampling import TILE, sample_logits, sample_tokens, uniforms_reference
from model import causal_attention

UNIT = 16  # tokens: lanes of a vector register, so that a sum's lanes do not depend on where a page starts
CHUNK = 384
BLOCK = 64  # queries per prefill attention call on CPU
SIZES = (1, 2, 4, 8, 16, 32)  # rows of the CUDA graphs, then every 64: few graphs to record, at most a third of the rows dead above 64

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
    return state | {name: torch.zeros(rows, width, dtype=dtype, device=device) for name, (dtype, width) in widths.items()}


class Decoder:
    """Model and page pool as two functions: `prefill` writes prompts to pages, `step` draws the next token of every row."""

    def __init__(self, model, pool, cpu, exact=False):
        self.model, self.config, self.pool, self.cpu, self.exact = model, model.config, pool, cpu, exact
        self.linear, self.attention = exact_linear if exact else F.linear, CpuAttention(self.config, pool) if self.cpu else None
        self.packed, self.stamp = {}, None
        # The torch references look at lengths on the host, so only the Triton kernels can be recorded.
        self.graphs = {} if use_triton(model.embed.weight) and self.config.head_dim in (64, 128) else None

    def refresh(self):
        """Pack the weights again if they changed; on CUDA they are read in place."""
        matrices = [w for layer in self.model.layers for w in (layer.qkv.weight, layer.o.weight, layer.gate_up.weight, layer.down.weight)]
        stamp = [(w.data_ptr(), w._version) for w in (*matrices, self.model.head_weight)]
        can_pack = self.cpu and torch.backends.mkldnn.is_available() and self.model.head_weight.dtype == torch.float32
        if can_pack and stamp != self.stamp:
            self.packed = {w.data_ptr(): torch.ops.mkldnn._reorder_linear_weight(w.detach(), 64) for w in (*matrices, self.model.head_weight)}
            self.stamp, self.linear = stamp, self._packed_linear

    def _packed_linear(self, x, weight, bias=None):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[weight.data_ptr()], bias, "none", [], "")

    def _linear_plus(self, x, weight, other):
        """x @ weight.T + other: in one call where the weights are packed, with the same bits as in two."""
        if not self.packed:
            return other + self.linear(x, weight)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed[weight.data_ptr()], None, "add")

    def _decode_on_cpu(self, tokens, attend):
        """Model.decode for few rows, in half as many calls."""
        norm = lambda x, weight: F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
        total = self.model.embed(tokens)
        for i, layer in enumerate(self.model.layers):
            qkv = self.linear(norm(total, layer.input_norm), layer.qkv.weight, layer.qkv.bias)
            if layer.qkv.bias is None:
                qkv = layer.norm_heads(qkv)
            total = self._linear_plus(attend(i, qkv), layer.o.weight, total)
            gate, up = self.linear(norm(total, layer.post_norm), layer.gate_up.weight).chunk(2, dim=-1)
            total = self._linear_plus(F.silu(gate).mul_(up), layer.down.weight, total)
        return norm(total, self.model.norm)

    def pad(self, count):
        """Rows to run for `count` living ones."""
        if not self.cpu:
            return next((size for size in SIZES if size >= count), -(-count // 64) * 64)
        return next((size for size in (2, 4, 8) if size >= count), -(-count // 16) * 16)

    def prefill(self, prompts, pages):
        """Write the keys and values of `prompts` (lists of ids, longest first) to `pages` (a list of page ids each)."""
        device = self.model.embed.weight.device
        lengths = torch.tensor([len(p) for p in prompts])
        filler = -int(lengths.sum()) % 16 if self.cpu else 0  # a last sequence that is not written anywhere
        tokens = torch.tensor([t for p in prompts for t in p] + [0] * filler, device=device)
        positions = torch.cat([torch.arange(n) for n in lengths.tolist() + [filler]])
        page_size, table = self.pool.page_size, _ragged(pages)
        sequence = torch.arange(len(prompts)).repeat_interleave(lengths)
        slots = torch.full_like(positions, -1)
        where = positions[: len(sequence)]
        slots[: len(sequence)] = table[sequence, where // page_size] * page_size + where % page_size
        positions, slots = positions.to(device), slots.to(device)
        if self.cpu:
            attend = self.attention.prefill(lengths, table, slots, positions)
        else:
            causal = causal_attention(self.config, F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32))
            tables, upto = table.int().to(device)[sequence.to(device)], (positions + 1).int()

            def attend(i, qkv, bias, cos, sin):
                q = qkv_rope_write(qkv, bias, cos, sin, self.pool.k[i], self.pool.v[i], slots, self.config.num_attention_heads)
                return attend_to_pages(q, self.pool.k[i], self.pool.v[i], tables, upto) if self.exact else causal(i, qkv, bias, cos, sin)

        self.model.decode(tokens, positions, attend, self.linear)

    def regroup(self, state, count):
        """Tell the step that rows came or went; the first `count` are rows, the others filler."""
        if self.cpu:
            self.attention.regroup(state, count)

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
        with torch.cuda.graph(graph, pool=known.pool() if known else None):  # one memory pool for all: they never run together
            self.step(state, False, temperature)
        state["alive"].copy_(alive)
        return graph

    def step(self, state, truncated, temperature=None):
        """Decode one token of every living row, in place: `alive` turns False on a stop token or at the last position."""
        s, alive, positions = state, state["alive"], state["positions"]
        if self.cpu:
            hidden = self._decode_on_cpu(s["tokens"], self.attention.step(s))
        else:
            hidden = self.model.decode(s["tokens"], positions, self._paged_attention(s), self.linear)
        tokens, logprobs = self._draw(hidden, s, positions + 1, truncated, temperature)
        column = (positions + 1 - s["start"])[:, None]
        for out, value in (("out_tokens", tokens), ("out_logprobs", logprobs)):
            s[out].scatter_(1, column, torch.where(alive[:, None], value[:, None], s[out].gather(1, column)))
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
            return shared_prefix_attention(q, pool.k[i], pool.v[i], s["tables"], lengths, s["prefix"], s["group"], scale).flatten(1)

        return attend

    def _draw(self, hidden, s, positions, truncated, temperature):
        key = (s["temperature"], s["seed"], s["request"], s["sample"], positions)
        if truncated:
            return sample_logits(self.linear(hidden, self.model.head_weight).float(), *key, s["top_p"], s["top_k"])[:2]
        if self.cpu:
            return draw(self.linear(hidden, self.model.head_weight).float(), *key)
        tokens, logprobs, _ = sample_tokens(hidden, self.model.head_weight, *key, one_tile=self.exact)
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
    top, best = logits.max(-1) if bool(greedy.any()) else (logits.amax(-1), torch.zeros_like(key[0]))
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


class CpuAttention:
    """Decode and prefill attention on CPU, bit for bit the same for a sequence whatever it is batched with.

    Two parts are merged: a group's prompt against the queries of all its samples, and each row's own tokens (from the last prompt token on) in its run
    of pages. The runs of all rows are one tensor [runs, kv heads, tokens, head_dim], and so are all prompts: nothing is copied, but when few prompts of
    many are left, which are gathered.
    """

    def __init__(self, config, pool):
        self.pool, self.heads, self.kv_heads, self.head_dim = pool, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.theta, self.ratio, self.tokens = config.rope_theta, config.num_attention_heads // self.kv_heads, len(pool) * pool.page_size
        run, shape = pool.run_pages * pool.page_size, (pool.prompts, pool.prompt_pages * pool.page_size)
        # Views of the same memory: keys and values by token [2 * kv heads, tokens, head_dim]; keys, values by unit, by run, by prompt.
        self.flat = [joint.flatten(1, 2) for joint in pool.joint]
        self.units, self.runs, self.prompts = [], [], []
        for side in (0, 1):
            layers = [joint.flatten(1, 2)[side * self.kv_heads : (side + 1) * self.kv_heads] for joint in pool.joint]
            self.units.append([x.reshape(-1, UNIT * self.head_dim) for x in layers])
            self.runs.append([x[:, : pool.runs * run].unflatten(1, (pool.runs, run)).transpose(0, 1) for x in layers])
            self.prompts.append([x[:, pool.runs * run : -pool.page_size].unflatten(1, shape).transpose(0, 1) for x in layers])
        self.gathered = [torch.empty(0), torch.empty(0)]
        self.out = torch.empty(0)

    def regroup(self, s, count):
        """Index the first `count` rows, the others being filler: where their runs and prompts lie, and where each row's queries sit among those of
        its prompt."""
        self.count, group, slot = count, s["group"][:count], s["slot"][:count]
        if len(self.out) != len(s["group"]):
            self.out = torch.zeros(len(s["group"]), self.heads * self.head_dim, dtype=self.flat[0].dtype)  # filler rows stay 0
        self.by_slot = torch.zeros(int(slot.max()) + 1, dtype=torch.int64)
        self.by_slot[slot] = torch.arange(count)
        self.in_order = torch.equal(slot, torch.arange(count))
        self.own_rows = self._query_rows(self.by_slot[:, None])
        _, group, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        width = int(counts.max())
        while 0 < width * self.ratio % 32 < 8:  # the op takes queries in blocks of 32; a rest of fewer than 8 rows takes other code
            width += 1
        length, tables = s["start"][first] - 1, s["tables"][first]
        some = (length > 0).nonzero().squeeze(1)  # a prompt of one token leaves nothing to read
        slot = (tables[:, 0].long() - self.pool.runs * self.pool.run_pages).clamp_(min=0) // self.pool.prompt_pages
        top = int(slot[some].max()) + 1 if len(some) else 0
        in_place = 0 < top < 1.5 * len(length) + 4
        if in_place:
            owner, longest = torch.zeros(top, dtype=torch.int64), torch.ones(top, dtype=torch.int64)
            owner[slot[some]], longest[slot[some]] = some, length[some]
        else:
            owner, longest, slot = torch.arange(len(length)), length, torch.arange(len(length))
        members = (first[owner, None] + torch.arange(width)).clamp_(max=count - 1)
        self.query_rows, self.shape = self._query_rows(members), (len(members), self.kv_heads, width * self.ratio, self.head_dim)
        self.place = slot[group] * width + torch.arange(count) - first[group]
        self.prompt = []
        for start, mask, _ in _chunks(longest):
            unit = torch.arange(start // UNIT, (start + mask.shape[-1]) // UNIT).minimum((length[:, None] - 1).clamp(min=0) // UNIT)
            index, valid = None if in_place else self._unit_rows(tables, unit), length > start
            self.prompt.append((start, index, mask[:, None, None], None if valid.all() else valid[group]))

    def _query_rows(self, members):
        """Rows [sequences, width] -> where their queries stand among the rows of heads, in the order [sequences, kv heads, width, ratio]."""
        head = torch.arange(self.heads).view(self.kv_heads, 1, self.ratio)
        return (members[:, None, :, None] * (self.heads + 2 * self.kv_heads) + head).flatten()

    def step(self, s):
        """attend(layer, qkv) of one step, in which each row writes its token to its run and reads its prompt and its run."""
        alive, run, count = s["alive"], self.pool.run_pages * self.pool.page_size, self.count
        own = s["positions"] - s["start"] + 1
        places = torch.where(alive, s["slot"] * run + own, self.tokens - 1)  # what dead rows write goes to the spare page
        length = torch.ones(len(self.by_slot), dtype=torch.int64)
        length[s["slot"][:count]] = own[:count] + 1
        slot = s["slot"][:count]
        chunks = [(start, mask[:, None, None], None if valid is None else valid[slot]) for start, mask, valid in _chunks(length)]
        turn, out = self.rotation(s["positions"]), self.out[:count].view(count, self.kv_heads, self.ratio, self.head_dim).transpose(1, 2)

        def attend(i, qkv):
            heads, parts = self._rotate_and_write(i, qkv, turn, places), []
            if self.in_order:
                mine = heads[:count, : self.heads].unflatten(1, (self.kv_heads, self.ratio))
            else:
                mine = heads.flatten(0, 1).index_select(0, self.own_rows).view(-1, self.kv_heads, self.ratio, self.head_dim)
            for start, mask, valid in chunks:
                k, v = (runs[i][: len(mask), :, start : start + mask.shape[-1]] for runs in self.runs)
                part = (x.transpose(1, 2) for x in flash(mine, k, v, mask))
                parts.append((*(part if self.in_order else (x.index_select(0, slot) for x in part)), valid))
            shared = heads.flatten(0, 1).index_select(0, self.query_rows).view(self.shape)
            for start, index, mask, valid in self.prompt:
                if index is None:
                    k, v = (prompts[i][: len(mask), :, start : start + mask.shape[-1]] for prompts in self.prompts)
                else:
                    k, v = self._gather(i, index, len(mask))
                part = (x.transpose(1, 2).unflatten(1, (-1, self.ratio)).flatten(0, 1).index_select(0, self.place) for x in flash(shared, k, v, mask))
                parts.append((*part, valid))
            merge(parts, out)
            return self.out

        return attend

    def rotation(self, positions):
        """Factors of RoPE for q, k and v as one tensor [rows, heads, head_dim], of itself and of its swapped halves; v stays as it is."""
        cos, sin = rope_tables(positions, self.head_dim, self.theta)
        turned = self.heads + self.kv_heads
        straight = torch.ones(len(positions), turned + self.kv_heads, self.head_dim, dtype=cos.dtype)
        crossed = torch.zeros_like(straight)
        straight[:, :turned] = torch.cat([cos, cos], 1)[:, None]
        crossed[:, :turned] = torch.cat([-sin, sin], 1)[:, None]
        return straight, crossed

    def _rotate_and_write(self, i, qkv, turn, places):
        """kernels.layers.qkv_rope_write in a fourth of its calls -> rotated heads [rows, heads of q, k and v, head_dim]."""
        x = qkv.unflatten(1, (-1, self.head_dim))
        swapped = torch.cat([x[..., self.head_dim // 2 :], x[..., : self.head_dim // 2]], -1)
        turned = (x * turn[0]).addcmul_(swapped, turn[1]).to(qkv.dtype)
        self.flat[i].index_copy_(1, places, turned[:, self.heads :].transpose(0, 1))
        return turned

    def _unit_rows(self, tables, units):
        """Row of each (sequence, head, unit) in `self.units`."""
        per_page = self.pool.page_size // UNIT
        rows = tables.gather(1, units // per_page).long() * per_page + units % per_page
        return (torch.arange(self.kv_heads)[:, None] * (self.tokens // UNIT) + rows[:, None, :]).flatten()

    def _gather(self, i, index, sequences):
        """Keys and values of layer i as [sequences, kv heads, tokens, head_dim]."""
        found = []
        for side, units in enumerate(self.units):
            # Into a buffer that is kept: a fresh tensor of megabytes costs more in page faults than the copy itself.
            if len(self.gathered[side]) < len(index):
                self.gathered[side] = torch.empty(2 * len(index), UNIT * self.head_dim, dtype=units[i].dtype)
            out = self.gathered[side][: len(index)]
            torch.index_select(units[i], 0, index, out=out)
            found.append(out.view(sequences, self.kv_heads, -1, self.head_dim))
        return found

    def prefill(self, lengths, table, slots, positions):
        """attend() for prompts, longest first: queries in blocks of 64 against the keys up to the block's end."""
        sequences, longest = len(lengths), -(-int(lengths.max()) // BLOCK) * BLOCK
        offset = F.pad(lengths.cumsum(0), (1, 0))[:-1]
        token = torch.arange(longest)
        units = (token[None, ::UNIT] // UNIT).minimum((lengths[:, None] - 1) // UNIT)
        index = self._unit_rows(table, units)
        source = (offset[:, None] + token.minimum(lengths[:, None] - 1)).flatten()  # padding repeats the last token; its result is dropped
        back = torch.cat([row * longest + torch.arange(n) for row, n in enumerate(lengths.tolist())])
        places, turn = torch.where(slots < 0, self.tokens - 1, slots), self.rotation(positions)
        blocks = [(start, int((lengths > start).sum())) for start in range(0, longest, BLOCK)]

        def attend(i, qkv, bias, cos, sin):
            q = self._rotate_and_write(i, qkv if bias is None else qkv + bias, turn, places)[:, : self.heads]
            k, v = self._gather(i, index, sequences)
            padded = q[source].view(sequences, longest, *q.shape[1:]).transpose(1, 2)
            out = torch.zeros(sequences, longest, *q.shape[1:], dtype=q.dtype)
            for start, count in blocks:
                block = causal_block(padded[:count, :, start : start + BLOCK], k[:count], v[:count], start)
                out[:count, start : start + BLOCK] = block.transpose(1, 2)
            mixed = torch.zeros_like(q, memory_format=torch.contiguous_format)
            mixed[: len(back)] = out.flatten(0, 1)[back]
            return mixed.flatten(1)

        return attend


def flash(q, k, v, mask=None):
    """torch's CPU flash attention with its log-sum-exp: q [B, H, M, hd], k and v [B, K, L, hd] -> [B, H, M, hd], [B, H, M]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


def _chunks(lengths):
    """Sequences of `lengths` tokens in chunks: [(first token, additive mask [sequences, tokens], sequences with any token or None for all)]."""
    chunks = []
    for start in range(0, max(1, int(lengths.max())), CHUNK):
        count = min(CHUNK, -(-(int(lengths.max()) - start) // UNIT) * UNIT) or UNIT
        valid = lengths > start
        hidden = torch.arange(start, start + count) >= lengths[:, None]
        hidden[:, 0] &= valid  # a sequence with nothing here looks at something, and the result is dropped
        mask = torch.zeros(len(lengths), count).masked_fill_(hidden, float("-inf"))
        chunks.append((start, mask, None if valid.all() else valid))
    return chunks


def causal_block(q, k, v, start):
    """Queries start..start+BLOCK of each sequence, q [B, H, BLOCK, hd], against k, v [B, K, longest, hd]."""
    parts = []
    for first in range(0, start + BLOCK, CHUNK):
        end = min(first + CHUNK, start + BLOCK)
        later = torch.arange(first, end) > torch.arange(start, start + BLOCK)[:, None]
        mask = torch.zeros(1, 1, BLOCK, end - first).masked_fill_(later, float("-inf")) if end > start else None
        parts.append((*flash(q, k[:, :, first:end], v[:, :, first:end], mask), None))
    return merge(parts[-1:] + parts[:-1])


def merge(parts, out=None):
    """Attention over several sets of keys from the attention over each: [(out [B, ..., hd], log-sum-exp [B, ...], rows to count [B] or None)].

    out = sum_i out_i exp(lse_i - lse), lse = log sum_i exp(lse_i) (Hydragen, arXiv 2402.05099): two parts of equal lse give their mean.
    """
    if len(parts) == 1 and out is None:
        return parts[0][0]
    lse = [torch.where(valid.view(-1, *[1] * (lse.dim() - 1)), lse, float("-inf")) if valid is not None else lse for _, lse, valid in parts]
    weights = torch.stack(lse, dim=-1).softmax(-1).to(parts[0][0].dtype)  # softmax works row by row; sigmoid's last few elements would not be exact
    out = torch.mul(parts[0][0], weights[..., :1], out=out)
    for i, (other, _, _) in enumerate(parts[1:], start=1):
        out.addcmul_(other, weights[..., i : i + 1])
    return out
