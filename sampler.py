"""Rollouts: paged key-value cache, continuous batching, prompts prefilled once and shared by the samples of a group.

    sampler = Sampler(model, slots=256)
    for completions in sampler.generate([Request(prompt=ids, n=16, stop_ids=(2,), seed=0, id=7)]): ...

The life of a request: all pages its rollout can ever need are reserved (so nothing is preempted and nothing runs out of memory half way), its prompt but
the last token is prefilled once, its n samples start by decoding that last token, and each leaves its row when it draws a stop token or
reaches max_new_tokens. Rows that leave are refilled from the queue. Every draw depends only on (seed, request id, sample, position).
"""

import os
import time
from dataclasses import dataclass, field

import torch

from kernels.attention import shared_prefix_attention
from kernels.layers import qkv_rope_write
from kernels.sampling import sample_logits, sample_tokens
from model import causal_attention

PREFILL_TOKENS = 8192  # prompt tokens per prefill pass; bounds its activations (135M, fp32: 0.2 GB)


class StalePageError(RuntimeError):
    """A page written under other weights was about to be read."""


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
    expected_tokens: int | None = None  # a guess of the response length, to start long rollouts first; None = max_new_tokens


@dataclass
class Completion:
    """One sample. `tokens` ends with the stop token when finish_reason is "stop"; `logprobs` are fp32, of the distribution sampled from."""

    request: int  # position in the list given to generate()
    sample: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" or "length"


class PagePool:
    """Pages of keys and values of every layer, [pages, kv heads, page_size, head_dim] each, stamped with the weight version that wrote them."""

    def __init__(self, config, pages, page_size, dtype, device):
        shape = (pages, config.num_key_value_heads, page_size, config.head_dim)
        self.page_size = page_size
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.free = list(range(pages))[::-1]
        self.version = [-1] * pages

    def take(self, count, version):
        """Reserve `count` pages for K and V of weight version `version`."""
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.version[page] = version
        return taken

    def give(self, pages):
        for page in pages:
            self.version[page] = -1
        self.free.extend(reversed(pages))

    def check(self, pages, version):
        """Refuse to read any of `pages` that was written under another weight version."""
        for page in pages:
            if self.version[page] != version:
                raise StalePageError(
                    f"page {page} holds keys and values of weight version {self.version[page]}, the weights are now version {version}: "
                    "call load() between two generate() calls, not during one"
                )

    def copy(self, sources, targets):
        """Copy whole pages in every layer."""
        for pages in self.k + self.v:
            pages[targets] = pages[sources]


@dataclass
class Group:
    """A request on its way: its pages and what is left of its n samples."""

    index: int
    request: Request
    page_size: int
    prefix: list[int] = field(default_factory=list)  # shared full pages of prompt[:-1]
    tail: list[int] = field(default_factory=list)  # at most one page: the prompt's last, not full; each sample gets a copy
    started: int = 0
    done: list = field(default_factory=list)

    @property
    def cached(self):
        """Tokens that prefill writes. The last prompt token is each sample's first decode step, so prefill needs no lm_head."""
        return len(self.request.prompt) - 1

    @property
    def own_pages(self):
        """Pages of one sample besides the shared ones. The very last token is drawn but never fed, so it needs no place."""
        return -(-(self.cached + self.request.max_new_tokens) // self.page_size) - self.cached // self.page_size

    @property
    def prompt_pages(self):
        return -(-self.cached // self.page_size)


# One row per running sample: name -> (dtype, value in an empty row). Tables and outputs are added by Sampler._empty_rows.
ROW = {
    "tokens": torch.int64,  # fed next
    "positions": torch.int64,  # of `tokens`
    "start": torch.int64,  # prompt length = position of the first response token
    "last": torch.int64,  # position of the last token that may be drawn
    "group": torch.int64,
    "prefix": torch.int32,  # tokens in pages shared with the rest of the group
    "temperature": torch.float32,
    "top_p": torch.float32,
    "top_k": torch.int64,
    "seed": torch.int64,
    "request": torch.int64,
    "sample": torch.int64,
    "alive": torch.bool,
}


class Sampler:
    """Samples from `model`, reading its weights in place. Call load() after every weight update."""

    def __init__(self, model, slots=256, page_size=None, pages=None):
        """slots: samples decoded together. page_size: tokens per page. pages: pool size; None = what the requests need, within the memory that is free."""
        weight = model.embed.weight
        self.model, self.config, self.slots = model, model.config, slots
        self.device, self.dtype = weight.device, weight.dtype
        self.page_size = page_size or (16 if self.device.type == "cpu" else 8192 // self.config.head_dim)
        self.pages, self.pool, self.version = pages, None, 0
        self.look_every = 1 if self.device.type == "cpu" else 8  # steps between two looks of the host at the stop flags
        self.stats = {}

    def load(self, state=None):
        """The weights changed: copy `state` (name -> tensor) into the model in place if given, and start a new weight version.

        Pages of the old version are refused from now on.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters() if state else []:
                parameter.copy_(state[name])
        self.version += 1

    def generate(self, requests, on_done=None):
        """Sample every request; returns, per request, its n completions in sample order.

        on_done(request index, completions) is called as soon as a request's samples are all done, so that rewards overlap sampling.
        Raises ValueError with a sentence for a request that can never fit.
        """
        with torch.inference_mode():
            return self._generate(requests, on_done)

    def _generate(self, requests, on_done):
        started = time.perf_counter()
        groups = [Group(i, request, self.page_size) for i, request in enumerate(requests)]
        self._reserve(groups)
        self.stats = {"tokens": 0, "prefill_tokens": 0, "steps": 0, "row_steps": 0, "prefill_seconds": 0.0}
        truncated = any(r.top_p < 1 or r.top_k > 0 for r in requests)
        # Longest expected first: what is started last should be short, or a few long rows run alone at the end.
        queue = sorted(groups, key=lambda g: (-(g.request.expected_tokens or g.request.max_new_tokens), -len(g.request.prompt)))[::-1]
        rows, state = [], self._empty_rows(groups)
        while queue or rows:
            admitted = self._admit(queue, self.slots - len(rows))
            if admitted:
                rows, state = self._join(rows, state, admitted)
            for _ in range(self.look_every):
                self._step(state, rows, truncated)
            alive = state["alive"].tolist()
            if not all(alive):
                self._finish(state, rows, alive, on_done)
                rows, state = [row for row, a in zip(rows, alive) if a], _select(state, state["alive"].nonzero().squeeze(1))
        self.stats["seconds"] = time.perf_counter() - started
        return [sorted(group.done, key=lambda c: c.sample) for group in groups]

    def _reserve(self, groups):
        """Make the page pool, and refuse what can never fit before anything runs."""
        for group in groups:
            _check(group.request, self.config)
        need = max((g.prompt_pages + g.own_pages for g in groups), default=1)
        if self.pool is None or (self.pages is None and len(self.pool.version) < self._wanted_pages(groups)):
            pages = self.pages or max(need, min(self._wanted_pages(groups), self._affordable_pages()))
            self.pool = None  # free the old pool before the new one is made
            self.pool = PagePool(self.config, pages, self.page_size, self.dtype, self.device)
        for group in groups:
            if group.prompt_pages + group.own_pages > len(self.pool.version):
                raise ValueError(
                    f"request {group.index}: a prompt of {len(group.request.prompt)} tokens with {group.request.max_new_tokens} new ones needs "
                    f"{group.prompt_pages + group.own_pages} pages of {self.page_size} tokens and the sampler has {len(self.pool.version)}: "
                    "shorten the request or give the sampler more pages"
                )

    def _wanted_pages(self, groups):
        """Pages with which `slots` rows never wait for memory, whatever the order of the requests."""
        own = max((g.own_pages for g in groups), default=1)
        prompts = sorted((g.prompt_pages for g in groups), reverse=True)[: self.slots]
        return min(self.slots, sum(g.request.n for g in groups)) * own + sum(prompts)

    def _affordable_pages(self):
        """Half of the memory that is free, in pages."""
        free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        c = self.config
        page_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.page_size * self.dtype.itemsize
        return max(1, free // 2 // page_bytes)

    def _empty_rows(self, groups):
        widths = {
            "stop_ids": (torch.int64, max((len(g.request.stop_ids) for g in groups), default=0)),
            "tables": (torch.int32, max((g.cached // self.page_size + g.own_pages for g in groups), default=1)),
            "out_tokens": (torch.int64, max((g.request.max_new_tokens for g in groups), default=1)),
            "out_logprobs": (torch.float32, max((g.request.max_new_tokens for g in groups), default=1)),
        }
        state = {name: torch.empty(0, dtype=dtype, device=self.device) for name, dtype in ROW.items()}
        state.update({name: torch.empty(0, width, dtype=dtype, device=self.device) for name, (dtype, width) in widths.items()})
        return state

    def _admit(self, queue, rows_free):
        """Take samples from the end of the queue while rows and pages last; prefill prompts that start. Returns [(group, sample, own pages)]."""
        admitted, fresh = [], []
        while queue and rows_free > 0:
            group = queue[-1]
            pages_free = len(self.pool.free) - (group.prompt_pages if group.started == 0 else 0)
            count = min(rows_free, group.request.n - group.started, pages_free // group.own_pages)
            if count <= 0:
                break
            if group.started == 0:
                pages = self.pool.take(group.prompt_pages, self.version)
                full = group.cached // self.page_size
                group.prefix, group.tail = pages[:full], pages[full:]
                fresh.append(group)
            admitted += [(group, group.started + i, self.pool.take(group.own_pages, self.version)) for i in range(count)]
            group.started += count
            rows_free -= count
            if group.started == group.request.n:
                queue.pop()
        self._prefill([g for g in fresh if g.cached])
        self._copy_tails(admitted)
        return admitted

    def _prefill(self, groups):
        """Run prompts (but their last token) through the model in packed passes and write their pages."""
        started = time.perf_counter()
        groups = sorted(groups, key=lambda g: g.cached)
        while groups:
            batch, total = [], 0
            while groups and (not batch or total + groups[-1].cached <= PREFILL_TOKENS):
                batch.append(groups.pop())
                total += batch[-1].cached
            self._prefill_pass(batch)
            self.stats["prefill_tokens"] += total
        self.stats["prefill_seconds"] += time.perf_counter() - started

    def _prefill_pass(self, groups):
        lengths = torch.tensor([0] + [g.cached for g in groups])
        tokens = torch.tensor([t for g in groups for t in g.request.prompt[:-1]], device=self.device)
        positions = torch.cat([torch.arange(g.cached) for g in groups])
        pages = torch.tensor([page for g in groups for page in g.prefix + g.tail])
        first = torch.tensor([0] + [g.prompt_pages for g in groups]).cumsum(0)[:-1].repeat_interleave(lengths[1:])
        slots = (pages[first + positions // self.page_size] * self.page_size + positions % self.page_size).to(self.device)
        causal = causal_attention(self.config, lengths.cumsum(0).to(self.device, torch.int32))

        def attend(i, qkv, bias, cos, sin):
            qkv_rope_write(qkv, bias, cos, sin, self.pool.k[i], self.pool.v[i], slots, self.config.num_attention_heads)
            return causal(i, qkv, bias, cos, sin)

        self.model.decode(tokens, positions.to(self.device), attend)

    def _copy_tails(self, admitted):
        """Give every new sample its own copy of its prompt's last, not full page, to go on writing in."""
        copies = [(group.tail[0], own[0]) for group, _, own in admitted if group.tail]
        if copies:
            sources, targets = torch.tensor(copies, device=self.device).T
            self.pool.copy(sources, targets)
        for group in {id(g): g for g, _, _ in admitted}.values():
            if group.started == group.request.n:
                self.pool.give(group.tail)
                group.tail = []

    def _join(self, rows, state, admitted):
        """Append new rows and sort by group, so that the samples of a group are neighbours."""
        fresh = self._empty_fields(len(admitted), state)
        for i, (group, sample, own) in enumerate(admitted):
            request, table = group.request, group.prefix + own
            values = {
                "tokens": request.prompt[-1], "positions": group.cached, "start": group.cached + 1, "last": group.cached + request.max_new_tokens,
                "group": group.index, "prefix": len(group.prefix) * self.page_size, "temperature": request.temperature, "top_p": request.top_p,
                "top_k": request.top_k, "seed": request.seed, "request": request.id, "sample": sample, "alive": True,
            }  # fmt: skip
            for name, value in values.items():
                fresh[name][i] = value
            fresh["stop_ids"][i] = list(request.stop_ids) + [-1] * (len(fresh["stop_ids"][i]) - len(request.stop_ids))
            fresh["tables"][i] = table + [table[0]] * (len(fresh["tables"][i]) - len(table))
        new = {name: torch.tensor(column, dtype=state[name].dtype).view(-1, *state[name].shape[1:]) for name, column in fresh.items()}
        joined = {name: torch.cat([state[name], new[name].to(self.device)]) for name in state}
        rows = rows + admitted
        order = sorted(range(len(rows)), key=lambda i: rows[i][0].index)
        return [rows[i] for i in order], _select(joined, torch.tensor(order, device=self.device))

    def _empty_fields(self, count, state):
        return {name: [[0] * t.shape[1] if t.dim() == 2 else 0 for _ in range(count)] for name, t in state.items()}

    def _step(self, state, rows, truncated):
        """Decode one token of every living row: all tensors, no look by the host."""
        self.pool.check({page for group, _, own in rows for page in (*group.prefix, *own)}, self.version)
        s, ps, config, pool = state, self.page_size, self.config, self.pool
        alive, positions = s["alive"], s["positions"]
        page = s["tables"].gather(1, (positions // ps)[:, None]).squeeze(1)
        slots = torch.where(alive, page * ps + positions % ps, -1)
        lengths = torch.where(alive, positions + 1, 0).int()

        def attend(i, qkv, bias, cos, sin):
            q = qkv_rope_write(qkv, bias, cos, sin, pool.k[i], pool.v[i], slots, config.num_attention_heads)
            scale = config.head_dim**-0.5
            return shared_prefix_attention(q, pool.k[i], pool.v[i], s["tables"], lengths, s["prefix"], s["group"], scale).flatten(1)

        hidden = self.model.decode(s["tokens"], positions, attend)
        tokens, logprobs = self._draw(hidden, s, positions + 1, truncated)
        column = (positions + 1 - s["start"])[:, None]
        for out, value in (("out_tokens", tokens), ("out_logprobs", logprobs)):
            s[out].scatter_(1, column, torch.where(alive[:, None], value[:, None], s[out].gather(1, column)))
        s["alive"] = alive & ~(tokens[:, None] == s["stop_ids"]).any(1) & (positions + 1 < s["last"])
        s["tokens"] = torch.where(s["alive"], tokens, s["tokens"])
        s["positions"] = torch.where(s["alive"], positions + 1, positions)
        self.stats["steps"] += 1
        self.stats["row_steps"] += len(rows)

    def _draw(self, hidden, s, positions, truncated):
        key = (s["temperature"], s["seed"], s["request"], s["sample"], positions)
        if truncated:
            logits = hidden.float() @ self.model.head_weight.float().T
            return sample_logits(logits, *key, s["top_p"], s["top_k"])[:2]
        return sample_tokens(hidden, self.model.head_weight, *key)[:2]

    def _finish(self, state, rows, alive, on_done):
        """Turn rows that ended into completions, free their pages, and hand over groups that are complete."""
        ended = [i for i, a in enumerate(alive) if not a]
        s = _select({k: state[k] for k in ("positions", "start", "out_tokens", "out_logprobs")}, torch.tensor(ended, device=self.device))
        counts = (s["positions"] + 2 - s["start"]).tolist()
        for i, count, tokens, logprobs in zip(ended, counts, s["out_tokens"].tolist(), s["out_logprobs"].tolist()):
            group, sample, own = rows[i]
            reason = "stop" if tokens[count - 1] in group.request.stop_ids else "length"
            group.done.append(Completion(group.index, sample, tokens[:count], logprobs[:count], reason))
            self.pool.give(own)
            self.stats["tokens"] += count
            if len(group.done) == group.request.n:
                self.pool.give(group.prefix)
                if on_done:
                    on_done(group.index, sorted(group.done, key=lambda c: c.sample))


def _select(state, index):
    return {name: tensor.index_select(0, index) for name, tensor in state.items()}


def _check(request, config):
    """ValueError with a sentence for a request that no sampler of this model could run."""
    total = len(request.prompt) + request.max_new_tokens
    if not request.prompt:
        raise ValueError(f"request {request.id} has an empty prompt: give it at least one token")
    if request.max_new_tokens < 1 or request.n < 1:
        raise ValueError(f"request {request.id}: n and max_new_tokens must be at least 1")
    if total > config.max_position_embeddings:
        raise ValueError(
            f"request {request.id}: a prompt of {len(request.prompt)} tokens with {request.max_new_tokens} new ones is longer than the model's "
            f"{config.max_position_embeddings} positions"
        )
    if max(request.prompt) >= config.vocab_size or min(request.prompt) < 0:
        raise ValueError(f"request {request.id} has a token id outside the model's vocabulary of {config.vocab_size}: was it encoded by another tokenizer?")
