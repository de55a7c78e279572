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

from decode import ROW, UNIT, Decoder, new_state

PREFILL_TOKENS = 8192  # prompt tokens per prefill pass; bounds its activations (135M in fp32: 0.3 GB)
MEMORY = 0.5  # share of free memory for pages; the rest is for prefill, graphs and, in the same process, training


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
        shape = (pages + 1, config.num_key_value_heads, page_size, config.head_dim)  # the last one takes what dead rows write on CPU
        self.page_size = page_size
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.clear(pages)

    def __len__(self):
        return len(self.version)

    def clear(self, pages=None):
        self.version = [None] * (pages or len(self))
        self.free = list(range(len(self)))[::-1]

    def take(self, count, version):
        """Reserve `count` pages for keys and values of weight version `version`."""
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.version[page] = version
        return taken

    def give(self, pages):
        """Hand pages back: what they hold may not be read any more."""
        for page in pages:
            self.version[page] = None
        self.free.extend(reversed(pages))

    def check(self, pages, version):
        """Refuse to read a page that was not written under weight version `version`."""
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
    """Samples of one request that share the pages of its prompt."""

    number: int
    index: int  # of the request in the list
    request: Request
    samples: list[int]  # not yet started
    page_size: int
    prefix: list[int] = field(default_factory=list)  # shared full pages of prompt[:-1]
    tail: list[int] = field(default_factory=list)  # at most one page: the prompt's last, not full; each sample gets a copy
    fresh: bool = True  # not prefilled yet
    running: int = 0

    @property
    def cached(self):
        """Tokens that prefill writes. The last prompt token is each sample's first decode step, so prefill needs no lm_head."""
        return len(self.request.prompt) - 1

    @property
    def prompt_pages(self):
        return -(-self.cached // self.page_size)

    @property
    def own_pages(self):
        """Pages of one sample besides the shared ones. The very last token is drawn but never fed, so it needs no place."""
        return -(-(self.cached + self.request.max_new_tokens) // self.page_size) - self.cached // self.page_size


class Sampler:
    """Samples from `model`, reading its weights in place. Call load() after every weight update."""

    def __init__(self, model, slots=256, page_size=None, pages=None, share_prefix=True):
        """slots: samples decoded together. page_size: tokens per page, a multiple of 16. pages: size of the pool; None = what the requests need,
        within half of the memory that is free. share_prefix=False prefills every sample alone, to measure what sharing gains.
        """
        weight = model.embed.weight
        self.model, self.config, self.slots, self.share_prefix = model, model.config, slots, share_prefix
        self.device, self.dtype = weight.device, weight.dtype
        self.page_size = page_size or (UNIT if self.device.type == "cpu" else 8192 // self.config.head_dim)
        if self.page_size % UNIT:
            raise ValueError(f"page_size {page_size} is not a multiple of {UNIT}")
        self.pages, self.pool, self.decoder, self.state, self.version, self.checked = pages, None, None, None, 0, 0
        self.look_every = 1 if self.device.type == "cpu" else 8  # steps between two looks of the host at the rows that ended
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
        self.stats = {"tokens": 0, "prefill_tokens": 0, "steps": 0, "row_steps": 0, "prefill_seconds": 0.0}
        groups = self._plan(requests)
        self.done = [[] for _ in requests]
        truncated = any(r.top_p < 1 or r.top_k > 0 for r in requests)
        # Longest expected first: what starts last should be short, or a few long rows run alone at the end.
        queue = sorted(groups, key=lambda g: (g.request.expected_tokens or g.request.max_new_tokens, g.cached, -g.number))
        rows, state, ended = [], {name: tensor[:0] for name, tensor in self.state.items()}, False
        while queue or rows:
            admitted = self._admit(queue, self.slots - len(rows))
            if admitted:
                rows, state = self._join(rows, state, admitted)
            if admitted or ended:
                view = self._place(state)
            self._check_versions(rows, admitted)
            self.decoder.run(view, self.look_every, truncated)
            self.stats["steps"] += self.look_every
            self.stats["row_steps"] += self.look_every * len(rows)
            alive = view["alive"][: len(rows)].tolist()
            state, ended = {name: tensor[: len(rows)] for name, tensor in view.items()}, not all(alive)
            if ended:
                self._finish(rows, state, alive, on_done)
                rows, state = [row for row, a in zip(rows, alive) if a], _select(state, state["alive"].nonzero().squeeze(1))
        self.stats["seconds"] = time.perf_counter() - started
        return [sorted(done, key=lambda c: c.sample) for done in self.done]

    def _plan(self, requests):
        """Requests -> groups, a page pool and row buffers that hold them; refuses what can never fit before anything runs."""
        for i, request in enumerate(requests):
            _check(i, request, self.config)
        shares = [(i, r, s) for i, r in enumerate(requests) for s in ([range(r.n)] if self.share_prefix else [[j] for j in range(r.n)])]
        groups = [Group(number, i, r, list(samples), self.page_size) for number, (i, r, samples) in enumerate(shares)]
        need = max((g.prompt_pages + g.own_pages for g in groups), default=1)
        self._reserve(groups, need)
        if need > len(self.pool):
            worst = max(groups, key=lambda g: g.prompt_pages + g.own_pages)
            raise ValueError(
                f"request {worst.index}: a prompt of {len(worst.request.prompt)} tokens with {worst.request.max_new_tokens} new ones needs {need} pages of "
                f"{self.page_size} tokens and there is room for {len(self.pool)}: shorten it, or give the sampler more pages or memory"
            )
        longest = max((r.max_new_tokens for r in requests), default=1)
        widths = {
            "stop_ids": (torch.int64, max((len(r.stop_ids) for r in requests), default=0)),
            "tables": (torch.int32, max((g.cached // self.page_size + g.own_pages for g in groups), default=1)),
            "out_tokens": (torch.int64, longest),
            "out_logprobs": (torch.float32, longest),
        }
        self.decoder.refresh()
        self._make_buffers(widths)
        return groups

    def _make_buffers(self, widths):
        """Row buffers, kept from call to call while they are wide enough: CUDA graphs hold their addresses."""
        if self.state and all(self.state[name].shape[1] >= width for name, (_, width) in widths.items()):
            return
        old = {name: self.state[name].shape[1] if self.state else 0 for name in widths}
        self.state = None
        self.state = new_state(self.decoder.pad(self.slots), {n: (dtype, max(width, old[n])) for n, (dtype, width) in widths.items()}, self.device)
        self.decoder.graphs = {} if self.decoder.graphs is not None else None

    def _reserve(self, groups, need):
        """Keep the page pool when it is large enough, else make one. Pages never survive a call: a rollout that was interrupted leaves none behind."""
        own = max((g.own_pages for g in groups), default=1)
        prompts = sorted((g.prompt_pages for g in groups), reverse=True)[: self.slots]
        wanted = min(self.slots, sum(len(g.samples) for g in groups)) * own + sum(prompts)  # with these no row ever waits for memory
        pages = self.pages or max(1, min(wanted, self._affordable_pages()))
        if self.pool is None or len(self.pool) < pages:
            self.pool = self.decoder = None  # free the old pool before the new one is made
            self.pool = PagePool(self.config, pages, self.page_size, self.dtype, self.device)
            self.decoder = Decoder(self.model, self.pool)
        self.pool.clear()

    def _affordable_pages(self):
        """Pages in the share of memory that the sampler may take; the pool in use counts as free."""
        c = self.config
        page_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.page_size * self.dtype.itemsize
        return int((free_bytes(self.device) // page_bytes + (len(self.pool) if self.pool else 0)) * MEMORY)

    def _admit(self, queue, rows_free):
        """Start samples from the end of the queue while rows and pages last, prefilling prompts that are new: [(group, sample, own pages)]."""
        admitted, fresh = [], []
        while queue and rows_free > 0:
            group = queue[-1]
            pages_free = len(self.pool.free) - group.prompt_pages * group.fresh
            count = min(rows_free, len(group.samples), pages_free // group.own_pages)
            if count <= 0:
                break
            if group.fresh:
                pages = self.pool.take(group.prompt_pages, self.version)
                full = group.cached // self.page_size
                group.prefix, group.tail, group.fresh = pages[:full], pages[full:], False
                fresh.append(group)
            started, group.samples = group.samples[:count], group.samples[count:]
            admitted += [(group, sample, self.pool.take(group.own_pages, self.version)) for sample in started]
            group.running += count
            rows_free -= count
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
            self.decoder.prefill([g.request.prompt[:-1] for g in batch], [g.prefix + g.tail for g in batch])
            self.stats["prefill_tokens"] += sum(g.cached for g in batch)
        self.stats["prefill_seconds"] += time.perf_counter() - started

    def _copy_tails(self, admitted):
        """Give every new sample its own copy of its prompt's last, not full page, to go on writing in."""
        copies = [(group.tail[0], own[0]) for group, _, own in admitted if group.tail]
        if copies:
            self.pool.copy(*torch.tensor(copies, device=self.device).T)
        for group in {g.number: g for g, _, _ in admitted}.values():
            if not group.samples:
                self.pool.give(group.tail)
                group.tail = []

    def _join(self, rows, state, admitted):
        """Add new rows and sort by group, so that the samples of a group are neighbours."""
        new = [_row_values(group, sample) for group, sample, _ in admitted]
        fields = {name: torch.tensor([values[name] for values in new], dtype=dtype) for name, dtype in ROW.items()}
        fields["stop_ids"] = _filled([list(g.request.stop_ids) for g, _, _ in admitted], state["stop_ids"], -1)
        fields["tables"] = _filled([g.prefix + own for g, _, own in admitted], state["tables"], 0)
        for name in ("out_tokens", "out_logprobs"):
            fields[name] = torch.zeros(len(new), state[name].shape[1], dtype=state[name].dtype)
        joined = {name: torch.cat([state[name], fields[name].to(self.device)]) for name in state}
        rows = rows + admitted
        order = sorted(range(len(rows)), key=lambda i: rows[i][0].number)
        return [rows[i] for i in order], _select(joined, torch.tensor(order, device=self.device))

    def _place(self, state):
        """Copy living rows to the fixed buffers, with dead copies of the last one up to a size that the decoder runs."""
        count, size = len(state["alive"]), self.decoder.pad(len(state["alive"]))
        view = {name: tensor[:size] for name, tensor in self.state.items()}
        index = torch.arange(size, device=self.device).clamp_(max=count - 1)
        for name, tensor in _select(state, index).items():
            view[name].copy_(tensor)
        view["alive"][count:] = False
        if count:
            self.decoder.regroup(view)
        return view

    def _check_versions(self, rows, admitted):
        """Every page about to be read is of the present weights: new rows always, all rows when the version has changed."""
        changed = rows if self.version != self.checked else admitted
        for group, _, own in changed:
            self.pool.check(group.prefix + own, self.version)
        self.checked = self.version

    def _finish(self, rows, state, alive, on_done):
        """Turn rows that ended into completions, free their pages, and hand over requests that are complete."""
        ended = [i for i, a in enumerate(alive) if not a]
        columns = ("positions", "start", "out_tokens", "out_logprobs")
        s = _select({name: state[name] for name in columns}, torch.tensor(ended, device=self.device))
        counts = (s["positions"] + 2 - s["start"]).tolist()
        for i, count, tokens, logprobs in zip(ended, counts, s["out_tokens"].tolist(), s["out_logprobs"].tolist()):
            group, sample, own = rows[i]
            reason = "stop" if tokens[count - 1] in group.request.stop_ids else "length"
            done = self.done[group.index]
            done.append(Completion(group.index, sample, tokens[:count], logprobs[:count], reason))
            self.stats["tokens"] += count
            self._release(group, own)
            if on_done and len(done) == group.request.n:
                on_done(group.index, sorted(done, key=lambda c: c.sample))

    def _release(self, group, own):
        self.pool.give(own)
        group.running -= 1
        if not group.running and not group.samples:
            self.pool.give(group.prefix)


def free_bytes(device):
    """Memory that can be had now: what CUDA says is free, Linux's MemAvailable, elsewhere half of what is installed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _row_values(group, sample):
    """The one-number columns of a new row (decode.ROW)."""
    r = group.request
    return {
        "tokens": r.prompt[-1], "positions": group.cached, "start": group.cached + 1, "last": group.cached + r.max_new_tokens, "group": group.number,
        "prefix": len(group.prefix) * group.page_size, "temperature": r.temperature, "top_p": r.top_p, "top_k": r.top_k, "seed": r.seed,
        "request": r.id, "sample": sample, "alive": True,
    }  # fmt: skip


def _filled(lists, like, filler):
    """Lists of ints as rows as wide as `like`, filled up."""
    width = like.shape[1]
    return torch.tensor([x + [filler] * (width - len(x)) for x in lists], dtype=like.dtype).view(len(lists), width)


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
        raise ValueError(f"request {index}: a prompt of {len(prompt)} tokens with {new} new ones is longer than the model's {config.max_position_embeddings} positions")
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise ValueError(f"request {index} has a token id outside the model's vocabulary of {config.vocab_size}: was it encoded by another tokenizer?")
