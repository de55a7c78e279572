"""The sampler's rows on the device: a matrix with one row per slot, which never moves.

A step reads which slots to run from `active`, so rows that leave, join or change places are a new
`active` and nothing else, and a CUDA graph of so many rows serves all of them. `begin` gathers what
a step needs of its rows, in one launch; `advance` stores what they drew and moves them on (on a GPU
kernels/sampling.py does that where it chooses the tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from kernels import head, jit, sampling, tl, triton, use_triton
from kernels.sampling import uniforms_of

# Columns of a row, int64 each. The stop ids and then the row's pages follow them.
TOKEN = 0  # fed next
POSITION = 1  # of that token
ALIVE = 2  # 1 until it draws a stop token or its last one
START = 3  # prompt length = position of the first response token
LAST = 4  # position of the last token that may be drawn
SEED = 5  # with the next two and the position: the key of a draw
REQUEST = 6
SAMPLE = 7
TEMPERATURE = 8  # bits of a float64, as the next one
TOP_P = 9
TOP_K = 10
SLOT = 11  # its number: of its row here, and of its run of pages
STOPS = 12  # first stop id; filled up with -1


class Rows:
    """State of `slots` samples, and one more row at the end that is never alive, to fill up with."""

    def __init__(self, slots, stops, pages, longest, device):
        """stops: most stop ids. pages: most pages. longest: most tokens of a response."""
        self.nobody = slots
        self.stops = stops
        self.pages = pages
        self.longest = longest
        values = torch.zeros(slots + 1, STOPS + stops + pages, dtype=torch.int64)
        values[:, START] = 1
        values[:, TEMPERATURE:TOP_K].view(torch.float64).fill_(1.0)
        self.values = values.to(device)
        # What was drawn: tokens, and their log-probs as the bits of fp32. Rows that are not alive
        # write to a column of their own at the end.
        self.out = torch.zeros(slots + 1, 2, longest + 1, dtype=torch.int32, device=device)
        self.active = torch.full((slots + 64,), slots, dtype=torch.int64, device=device)

    def new_row(self, request, sample, slot, pages):
        """Row of a sample (sampler.Request) that starts with its prompt's last token, [columns]."""
        values = np.zeros(self.values.shape[1], dtype=np.int64)
        length = len(request.prompt)
        values[TOKEN] = request.prompt[-1]
        values[POSITION] = length - 1
        values[ALIVE] = 1
        values[START] = length
        values[LAST] = length - 1 + request.max_new_tokens
        values[SEED] = request.seed
        values[REQUEST] = request.id
        values[SAMPLE] = sample
        values[TEMPERATURE:TOP_K].view(np.float64)[:] = request.temperature, request.top_p
        values[TOP_K] = request.top_k
        values[SLOT] = slot

        table = STOPS + self.stops
        values[STOPS:table] = -1
        values[STOPS : STOPS + len(request.stop_ids)] = request.stop_ids
        values[table : table + len(pages)] = pages
        return values


class Step(NamedTuple):
    """What a step needs of each of its rows."""

    tokens: torch.Tensor  # [B] int64, to feed
    column: torch.Tensor  # [B] int64, of `out`, for what it draws
    slots: torch.Tensor  # [B] int64, where its keys and values go; -1: nowhere
    lengths: torch.Tensor  # [B] int32, tokens it sees; 0 if it is not alive
    tables: torch.Tensor  # [B, pages] int32
    cos: torch.Tensor  # [B, head_dim / 2] fp32, of its position
    sin: torch.Tensor
    temperature: torch.Tensor  # [B] fp32
    uniforms: torch.Tensor  # [2, B] fp32, for its draw


# ---- public functions ----


def begin(rows, active, cos, sin, page_size):
    """Step of the slots `active` [B]; cos, sin [positions, head_dim / 2]: of every position."""
    if not use_triton(active):
        return begin_reference(rows, active, cos, sin, page_size)
    return _begin(rows, active, cos, sin, page_size)


def begin_reference(rows, active, cos, sin, page_size):
    """`begin` in torch."""
    values = rows.values.index_select(0, active)
    alive = values[:, ALIVE] == 1
    position = torch.where(alive, values[:, POSITION], 0)
    tables = values[:, STOPS + rows.stops :]
    page = tables.gather(1, (position // page_size)[:, None]).squeeze(1)
    return Step(
        tokens=values[:, TOKEN],
        column=response_column(rows, values),
        slots=torch.where(alive, page * page_size + position % page_size, -1),
        lengths=torch.where(alive, position + 1, 0).int(),
        tables=tables.int(),
        cos=cos.index_select(0, position),
        sin=sin.index_select(0, position),
        temperature=floats(values, TEMPERATURE),
        uniforms=uniforms(values),
    )


def draw_and_advance(rows, active, step, hidden, weight, one_tile=False):
    """Draw a token of each slot, as sampling.sample_tokens, and move it on -> tokens [B] int64.

    hidden [B, D], weight [V, D]; one_tile: of sample_tokens.
    """
    drawing = (hidden, weight, step.temperature, step.uniforms)
    if head.fits(hidden):
        moved = (rows, active, step.column)
        return sampling.draw(*drawing, one_tile=one_tile, moved=moved)[0]
    tokens, logprobs = sampling.sample_tokens_reference(*drawing)
    advance(rows, active, rows.values.index_select(0, active), tokens, logprobs)
    return tokens


def advance(rows, active, values, tokens, logprobs):
    """Store what the slots drew and move them on; a stop token or the last position ends one.

    values: their rows, overwritten. tokens [B] int64, logprobs [B] fp32.
    """
    column = response_column(rows, values)
    rows.out[:, 0].index_put_((active, column), tokens.int())
    rows.out[:, 1].index_put_((active, column), logprobs.view(torch.int32))

    alive = values[:, ALIVE]
    stopped = (tokens[:, None] == values[:, STOPS : STOPS + rows.stops]).any(1)
    has_room = values[:, POSITION] + 1 < values[:, LAST]
    values[:, TOKEN] = tokens
    values[:, POSITION] += alive
    values[:, ALIVE] = alive * (~stopped & has_room)
    rows.values.index_copy_(0, active, values)


def response_column(rows, values):
    """Column of `out` for what each of the gathered rows draws next."""
    drawn = values[:, POSITION] + 1 - values[:, START]
    return torch.where(values[:, ALIVE] == 1, drawn, rows.longest)


def uniforms(values):
    """The two numbers with which each of the gathered rows draws next, [2, B]."""
    key = values[:, SEED : SAMPLE + 1].unbind(1)
    return sampling.uniforms_reference(*key, values[:, POSITION] + 1)


def floats(values, column):
    """A column of float64 bits as fp32 [B]."""
    return values[:, column].view(torch.float64).float()


# ---- launcher and kernel ----


def _begin(rows, active, cos, sin, page_size):
    count = len(active)
    half = cos.shape[1]

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device=active.device)

    step = Step(
        tokens=empty(count, dtype=torch.int64),
        column=empty(count, dtype=torch.int64),
        slots=empty(count, dtype=torch.int64),
        lengths=empty(count, dtype=torch.int32),
        tables=empty(count, rows.pages, dtype=torch.int32),
        cos=empty(count, half, dtype=torch.float32),
        sin=empty(count, half, dtype=torch.float32),
        temperature=empty(count, dtype=torch.float32),
        uniforms=empty(2, count, dtype=torch.float32),
    )
    grid = (count,)
    _begin_kernel[grid](
        rows.values,
        active,
        cos,
        sin,
        *step,
        count,
        rows.values.shape[1],
        STOPS + rows.stops,
        rows.pages,
        rows.longest,
        page_size,
        HALF=half,
        BLOCK=triton.next_power_of_2(rows.pages),
        num_warps=1,
    )
    return step


@jit(do_not_specialize=["B"])
def _begin_kernel(
    values,  # [slots + 1, columns]
    active,  # [B]
    all_cos,  # [positions, HALF]
    all_sin,
    tokens,  # [B], as `Step` and so on
    column,
    slots,
    lengths,
    tables,  # [B, pages]
    cos,  # [B, HALF]
    sin,
    temperature,
    uniforms,  # [2, B]
    B,
    columns,
    table_column,
    pages,
    longest,
    page_size,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. The columns' numbers are those above: a kernel sees no plain globals."""
    row = tl.program_id(0).to(tl.int64)
    at = values + tl.load(active + row) * columns
    alive = tl.load(at + 2) == 1
    drawn_at = tl.load(at + 1) + 1
    position = tl.where(alive, drawn_at - 1, 0)
    tl.store(tokens + row, tl.load(at))
    tl.store(column + row, tl.where(alive, drawn_at - tl.load(at + 3), longest))

    page = tl.load(at + table_column + position // page_size)
    slot = page * page_size + position % page_size
    tl.store(slots + row, tl.where(alive, slot, -1))
    tl.store(lengths + row, tl.where(alive, position + 1, 0).to(tl.int32))
    index = tl.arange(0, BLOCK)
    table = tl.load(at + table_column + index, mask=index < pages, other=0)
    tl.store(tables + row * pages + index, table.to(tl.int32), mask=index < pages)

    half = tl.arange(0, HALF)
    tl.store(cos + row * HALF + half, tl.load(all_cos + position * HALF + half))
    tl.store(sin + row * HALF + half, tl.load(all_sin + position * HALF + half))

    bits = tl.load(at + 8)
    tl.store(temperature + row, bits.to(tl.float64, bitcast=True).to(tl.float32))
    key = (tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), drawn_at)
    u0, u1 = uniforms_of(*key)
    tl.store(uniforms + row, u0)
    tl.store(uniforms + B + row, u1)
