"""Rollouts: paged key-value cache, continuous batching, prompts prefilled once and shared by the samples of a group.

    sampler = Sampler(model, slots=256)
    for completions in sampler.generate([Request(prompt=ids, n=16, stop_ids=(2,), seed=0, id=7)]): ...

The life of a request: all pages its rollout can ever need are reserved (so nothing is preempted and nothing runs out of memory half way), its prompt but
the last token is prefilled once, its n samples start by decoding that last token, and each leaves its row when it draws a stop token or
reaches max_new_tokens. Rows that leave are refilled from the queue. Every draw depends only on (seed, request id, sample, position).
"""

import time
from dataclasses import dataclass, field

import torch

from decode import ROW, Decoder, new_state
from kernels.native import LANES
from pages import PagePool, StalePageError, free_bytes  # noqa: F401 (StalePageError is part of this module's interface)

PREFILL_TOKENS = (
    8192  # prompt tokens per prefill pass; bounds its activations (135M in fp32: 0.3 GB)
)
MEMORY = 0.5  # share of free memory for pages; the rest is for prefill, graphs and, in the same process, training


@dataclass
class Request:
    """One prompt. `id` and `seed` are the identity of its draws; top_p and top_k are for evaluation only (training samples are never truncated)."""

    prompt: list[int]
    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    stop_ids: tuple = ()
    seed: int = 0
    id: int = 0
    expected_tokens: int | None = (
        None  # a guess of the response length, to start long rollouts first; None = max_new_tokens
    )


@dataclass
class Completion:
    """One sample. `tokens` ends with the stop token when finish_reason is "stop"; `logprobs` are fp32, of the distribution sampled from."""

    request: int  # position in the list given to generate()
    sample: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


@dataclass
class Group:
    """Samples of one request that share the pages of its prompt."""

    number: int
    index: int  # of the request in the list
    request: Request
    samples: list[int]  # not yet started
    prefix: list[int] = field(default_factory=list)  # shared pages of prompt[:-1]
    tail: list[int] = field(
        default_factory=list
    )  # at most one page: the prompt's last, not full, where each sample gets a copy
    fresh: bool = True  # not prefilled yet
    running: int = 0

    @property
    def cached(self):
        """Tokens that prefill writes. The last prompt token is each sample's first decode step, so prefill needs no lm_head."""
        return len(self.request.prompt) - 1


@dataclass
class Row:
    """A running sample; `slot` is its run of pages."""

    group: Group
    sample: int
    slot: int


class Sampler:
    """Samples from `model`, reading its weights in place. Call load() after every weight update."""

    def __init__(
        self, model, slots=256, page_size=None, memory=None, share_prefix=True, exact=False
    ):
        """slots: samples decoded together. page_size: tokens per page, a multiple of 16. memory: most bytes of keys and values; None = half of
        what is free when they are first needed. Never more than the requests need; with less, fewer samples run together.
        share_prefix=False prefills every sample alone, to measure what sharing gains. exact: the GPU's mode with the trainer's arithmetic
        (exact.py); all requests of a call then have one temperature.
        """
        weight = model.embed.weight
        self.model, self.config, self.slots, self.share_prefix, self.exact = (
            model,
            model.config,
            slots,
            share_prefix,
            exact,
        )
        self.device, self.dtype, self.cpu = weight.device, weight.dtype, weight.device.type == "cpu"
        self.page_size = page_size or (LANES if self.cpu else 8192 // self.config.head_dim)
        if self.page_size % LANES:
            raise ValueError(f"page_size {page_size} is not a multiple of {LANES}")
        c = self.config
        self.page_bytes = (
            2
            * c.num_hidden_layers
            * c.num_key_value_heads
            * c.head_dim
            * self.page_size
            * self.dtype.itemsize
        )
        self.memory, self.pool, self.decoder, self.state, self.version, self.checked = (
            memory,
            None,
            None,
            None,
            0,
            0,
        )
        self.look_every = (
            1 if self.cpu else 8
        )  # steps between two looks of the host at the rows that ended
        self.stats = {}

    def load(self, state=None):
        """The weights changed: copy `state` (name -> tensor) into the model in place if given, and start a new weight version.

        Pages of the old version are refused from now on.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters() if state else []:
                parameter.copy_(state[name])
        self.version += 1
        if self.decoder:  # its packed copies are of the old weights; fused AdamW does not bump a tensor's own version counter
            self.decoder.stamp = None

    def release(self):
        """Free the pages and everything built on them; the next generate() makes them again. For a trainer that needs the memory."""
        self.pool = self.decoder = self.state = None

    def generate(self, requests, on_done=None):
        """Sample every request; returns, per request, its n completions in sample order.

        on_done(request index, completions) is called as soon as a request's samples are all done, so that rewards overlap sampling.
        Raises ValueError with a sentence for a request that can never fit.
        """
        with torch.inference_mode():
            return self._generate(requests, on_done)

    def _generate(self, requests, on_done):
        started = time.perf_counter()
        self.stats = {
            "tokens": 0,
            "prefill_tokens": 0,
            "steps": 0,
            "row_steps": 0,
            "prefill_seconds": 0.0,
            "decode_seconds": 0.0,
        }
        groups = self._plan(requests)
        self.done = [[] for _ in requests]
        truncated, temperature = (
            any(r.top_p < 1 or r.top_k > 0 for r in requests),
            self._one_temperature(requests),
        )
        # Longest expected first: what starts last should be short, or a few long rows run alone at the end.
        queue = sorted(
            groups,
            key=lambda g: (
                g.request.expected_tokens or g.request.max_new_tokens,
                g.cached,
                -g.number,
            ),
        )
        rows, state, ended = [], {name: tensor[:0] for name, tensor in self.state.items()}, False
        while queue or rows:
            admitted = self._admit(queue, self.rows - len(rows))
            if admitted:
                rows, state = self._join(rows, state, admitted)
            if admitted or ended:
                view = self._place(state)
            self._check_versions(rows, admitted)
            before = time.perf_counter()
            self.decoder.run(view, self.look_every, truncated, temperature)
            alive = view["alive"][: len(rows)].tolist()
            self.stats["decode_seconds"] += time.perf_counter() - before
            self.stats["steps"] += self.look_every
            self.stats["row_steps"] += self.look_every * len(rows)
            state, ended = (
                {name: tensor[: len(rows)] for name, tensor in view.items()},
                not all(alive),
            )
            if ended:
                self._finish(rows, state, alive, on_done)
                rows, state = (
                    [row for row, a in zip(rows, alive) if a],
                    _select(state, state["alive"].nonzero().squeeze(1)),
                )
        self.stats["seconds"] = time.perf_counter() - started
        return [sorted(done, key=lambda c: c.sample) for done in self.done]

    def _plan(self, requests):
        """Requests -> groups, a page pool and row buffers that hold them; refuses what can never fit before anything runs."""
        for i, request in enumerate(requests):
            _check(i, request, self.config)
        shares = [
            (i, r, s)
            for i, r in enumerate(requests)
            for s in ([range(r.n)] if self.share_prefix else [[j] for j in range(r.n)])
        ]
        groups = [
            Group(number, i, r, list(samples)) for number, (i, r, samples) in enumerate(shares)
        ]
        self._reserve(groups)
        longest = max((r.max_new_tokens for r in requests), default=1)
        widths = {
            "stop_ids": (torch.int64, max((len(r.stop_ids) for r in requests), default=0)),
            "tables": (
                torch.int32,
                max((self._prompt_pages(g) for g in groups), default=1)
                + (1 if self.cpu else self.pool.run_pages),
            ),
            "out_tokens": (torch.int64, longest),
            "out_logprobs": (torch.float32, longest),
        }
        self.decoder.refresh()
        self._make_buffers(widths)
        return groups

    def _one_temperature(self, requests):
        """The exact mode computes log-probs in the trainer's kernel, which takes one temperature; elsewhere it does not matter."""
        temperatures = {r.temperature for r in requests} if self.exact else {None}
        if len(temperatures) > 1:
            raise ValueError(
                f"the exact mode samples at one temperature per call, not at {sorted(temperatures)}"
            )
        return temperatures.pop() if temperatures else None

    def _prompt_pages(self, group):
        return -(-group.cached // self.page_size)

    def _own_pages(self, group):
        """Pages of a sample's run: its tokens from the last prompt token on (the very last is drawn but never fed) and, where pages are read by a table, a
        copy of what the prompt wrote in its last page."""
        return -(
            -(group.request.max_new_tokens + (0 if self.cpu else group.cached % self.page_size))
            // self.page_size
        )

    def _reserve(self, groups):
        """Pages for the whole rollout of as many rows at a time as memory surely has room for: self.rows. The pool is kept while it is large enough."""
        own = max((self._own_pages(g) for g in groups), default=1)
        prompts = sorted((self._prompt_pages(g) for g in groups), reverse=True)
        piece = (
            max(1, prompts[0]) if groups and self.cpu else 1
        )  # CPU attention wants a prompt in one piece, all pieces of one size
        prompts = [-(-pages // piece) * piece for pages in prompts]
        budget = self._affordable_pages()
        self.rows, prompt_pages = 0, 0
        for row in range(min(self.slots, sum(len(g.samples) for g in groups))):
            prompt = (
                prompts[row] if row < len(prompts) else 0
            )  # at worst every row is of another prompt, of the longest ones
            if (row + 1) * own + prompt_pages + prompt > budget:
                break
            self.rows, prompt_pages = row + 1, prompt_pages + prompt
        if groups and not self.rows:
            self._refuse(groups, own + prompts[0], budget)
        old = self.pool
        size = [self.rows, own, prompt_pages // piece, piece]
        kept = [old.runs, old.run_pages, old.prompts, old.prompt_pages] if old else size
        if not old or any(new > have for new, have in zip(size, kept)):
            larger = [max(new, have) for new, have in zip(size, kept)]
            size = larger if larger[0] * larger[1] + larger[2] * larger[3] <= budget else size
            self.pool = self.decoder = old = None  # free the old pool before the new one is made
            self.pool = PagePool(
                self.config, *size, self.page_size, self.dtype, self.device, self.cpu
            )
            self.decoder = Decoder(self.model, self.pool, self.cpu, self.exact)
        self.pool.clear()  # no page survives a call, and a rollout that was interrupted leaves none behind

    def _refuse(self, groups, need, room):
        prompt, new = (
            max(len(g.request.prompt) for g in groups),
            max(g.request.max_new_tokens for g in groups),
        )
        worst = max(groups, key=lambda g: self._prompt_pages(g) + self._own_pages(g)).index
        raise ValueError(
            f"request {worst} can never fit: a prompt of {prompt} tokens and {new} new ones need {need} pages of {self.page_size} tokens and there is room "
            f"for {room}: shorten it, or give the sampler more memory"
        )

    def _make_buffers(self, widths):
        """Row buffers, kept from call to call while they are wide enough: CUDA graphs hold their addresses."""
        if self.state and all(
            self.state[name].shape[1] >= width for name, (_, width) in widths.items()
        ):
            return
        old = {name: self.state[name].shape[1] if self.state else 0 for name in widths}
        self.state = None
        self.state = new_state(
            self.decoder.pad(self.slots),
            {n: (dtype, max(width, old[n])) for n, (dtype, width) in widths.items()},
            self.device,
        )
        self.decoder.graphs = {} if self.decoder.graphs is not None else None

    def _affordable_pages(self):
        """Pages in the memory that the sampler may take; the pool in use counts as free."""
        free = free_bytes(self.device) + self.held_bytes()
        return int(
            (free * MEMORY if self.memory is None else min(self.memory, free)) // self.page_bytes
        )

    def held_bytes(self):
        """Keys and values in memory now, whether or not a rollout runs."""
        return len(self.pool) * self.page_bytes if self.pool else 0

    def _admit(self, queue, rows_free):
        """Start samples from the end of the queue while rows last, prefilling prompts that are new -> [Row]."""
        admitted, fresh = [], []
        while queue and rows_free > 0:
            group = queue[-1]
            if group.fresh:
                pages = self.pool.take(self._prompt_pages(group), self.version)
                full = len(pages) if self.cpu else group.cached // self.page_size
                group.prefix, group.tail, group.fresh = pages[:full], pages[full:], False
                fresh.append(group)
            started, group.samples = group.samples[:rows_free], group.samples[rows_free:]
            admitted += [Row(group, sample, self.pool.take_run(self.version)) for sample in started]
            group.running += len(started)
            rows_free -= len(started)
            if not group.samples:
                queue.pop()
        self._prefill([g for g in fresh if g.cached])
        self._copy_tails(admitted)
        return admitted

    def _prefill(self, groups):
        """Run prompts, but their last token, through the model in packed passes of like lengths."""
        started = time.perf_counter()
        groups = sorted(groups, key=lambda g: g.cached)
        while groups:
            batch = [groups.pop()]
            room = PREFILL_TOKENS - batch[0].cached
            while groups and groups[-1].cached <= room:
                room -= groups[-1].cached
                batch.append(groups.pop())
            self.decoder.prefill(
                [g.request.prompt[:-1] for g in batch], [g.prefix + g.tail for g in batch]
            )
            self.stats["prefill_tokens"] += sum(g.cached for g in batch)
        self.stats["prefill_seconds"] += time.perf_counter() - started

    def _copy_tails(self, admitted):
        """Give every new sample its own copy of its prompt's last, not full page, to go on writing in."""
        copies = [
            (row.group.tail[0], self.pool.run(row.slot)[0]) for row in admitted if row.group.tail
        ]
        if copies:
            self.pool.copy(copies)
        for group in {row.group.number: row.group for row in admitted}.values():
            if not group.samples:
                self.pool.give(group.tail)
                group.tail = []

    def _join(self, rows, state, admitted):
        """Add new rows and sort by group, so that the samples of a group are neighbours."""
        new = [_row_values(row, self.page_size) for row in admitted]
        fields = {
            name: torch.tensor([values[name] for values in new], dtype=dtype)
            for name, dtype in ROW.items()
        }
        fields["stop_ids"] = _filled(
            [list(row.group.request.stop_ids) for row in admitted], state["stop_ids"], -1
        )
        fields["tables"] = _filled(
            [row.group.prefix + ([] if self.cpu else self.pool.run(row.slot)) for row in admitted],
            state["tables"],
            0,
        )
        for name in ("out_tokens", "out_logprobs"):
            fields[name] = torch.zeros(len(new), state[name].shape[1], dtype=state[name].dtype)
        joined = {name: torch.cat([state[name], fields[name].to(self.device)]) for name in state}
        rows = rows + admitted
        order = sorted(range(len(rows)), key=lambda i: rows[i].group.number)
        return [rows[i] for i in order], _select(joined, torch.tensor(order, device=self.device))

    def _place(self, state):
        """Copy living rows to the fixed buffers, with dead copies of the last one up to a size that the decoder runs."""
        count, size = len(state["alive"]), self.decoder.pad(len(state["alive"]))
        view = {name: tensor[:size] for name, tensor in self.state.items()}
        index = torch.arange(size, device=self.device).clamp_(max=count - 1)
        for name, tensor in _select(state, index).items():
            view[name].copy_(tensor)
        view["alive"][count:] = False
        return view

    def _check_versions(self, rows, admitted):
        """Every page about to be read is of the present weights: new rows always, all rows when the version has changed."""
        for row in rows if self.version != self.checked else admitted:
            self.pool.check(row.group.prefix + self.pool.run(row.slot), self.version)
        self.checked = self.version

    def _finish(self, rows, state, alive, on_done):
        """Turn rows that ended into completions, free their pages, and hand over requests that are complete."""
        ended = [i for i, a in enumerate(alive) if not a]
        columns = ("positions", "start", "out_tokens", "out_logprobs")
        s = _select(
            {name: state[name] for name in columns}, torch.tensor(ended, device=self.device)
        )
        counts = (s["positions"] + 2 - s["start"]).tolist()
        for i, count, tokens, logprobs in zip(
            ended, counts, s["out_tokens"].tolist(), s["out_logprobs"].tolist()
        ):
            group = rows[i].group
            reason = "stop" if tokens[count - 1] in group.request.stop_ids else "length"
            done = self.done[group.index]
            done.append(
                Completion(group.index, rows[i].sample, tokens[:count], logprobs[:count], reason)
            )
            self.stats["tokens"] += count
            self._leave(rows[i])
            if on_done and len(done) == group.request.n:
                on_done(group.index, sorted(done, key=lambda c: c.sample))

    def _leave(self, row):
        self.pool.give_run(row.slot)
        row.group.running -= 1
        if not row.group.running and not row.group.samples:
            self.pool.give(row.group.prefix)


def _row_values(row, page_size):
    """The one-number columns of a new row (decode.ROW)."""
    r, cached = row.group.request, row.group.cached
    return {
        "tokens": r.prompt[-1],
        "positions": cached,
        "start": cached + 1,
        "last": cached + r.max_new_tokens,
        "group": row.group.number,
        "slot": row.slot,
        "prefix": len(row.group.prefix) * page_size,
        "temperature": r.temperature,
        "top_p": r.top_p,
        "top_k": r.top_k,
        "seed": r.seed,
        "request": r.id,
        "sample": row.sample,
        "alive": True,
    }


def _filled(lists, like, filler):
    """Lists of ints as rows as wide as `like`, filled up."""
    width = like.shape[1]
    return torch.tensor([x + [filler] * (width - len(x)) for x in lists], dtype=like.dtype).view(
        len(lists), width
    )


def _select(state, index):
    return {name: tensor.index_select(0, index) for name, tensor in state.items()}


def _check(index, request, config):
    """ValueError with a sentence for a request that no sampler of this model could run."""
    new, prompt = request.max_new_tokens, request.prompt
    if not prompt:
        raise ValueError(f"request {index} has an empty prompt: give it at least one token")
    if new < 1 or request.n < 1:
        raise ValueError(f"request {index}: n and max_new_tokens must be at least 1")
    if len(prompt) + new > config.max_position_embeddings:
        raise ValueError(
            f"request {index}: a prompt of {len(prompt)} tokens with {new} new ones is longer than the model's {config.max_position_embeddings} positions"
        )
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise ValueError(
            f"request {index} has a token id outside the model's vocabulary of {config.vocab_size}: was it encoded by another tokenizer?"
        )
