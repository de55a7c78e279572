"""Rollouts: paged key-value cache, continuous batching, prompts shared by the samples of a group.

    sampler = Sampler(model, slots=256)
    requests = [Request(prompt=ids, n=16, stop_ids=(2,), seed=0, id=7)]
    for completions in sampler.generate(requests): ...

The life of a request: all pages that its rollout can ever need are reserved (so nothing is
preempted and nothing runs out of memory half way), its prompt but the last token is prefilled once,
its n samples start by decoding that last token, and each leaves its row when it draws a stop token,
when its text has a stop string, or when it reaches max_new_tokens. Rows that leave are refilled
from the queue. Every draw depends only on (seed, request id, sample, position).
"""

import time
from dataclasses import dataclass, field

import torch

from decode import COLUMNS, Decoder, new_state
from kernels.native import UNIT
from pages import PagePool, PoolSize
from runtime.cpu import give_back
from runtime.machine import free_bytes
from runtime.memory import PREFILL_TOKENS

# Share of free memory for pages; the rest is for prefill, graphs and, in the same process, the
# training.
MEMORY = 0.5
# Bytes of pages and embedding above which the kernel gets back at once what is freed on a CPU; the
# built-in model would only wait for its pages again.
LARGE = 1 << 28
# What decoding gives for bytes that are not UTF-8.
REPLACEMENT = "\ufffd"


@dataclass
class Request:
    """One prompt. `id` and `seed` are the identity of its draws.

    top_p and top_k are for evaluation only: training samples are never truncated.
    """

    prompt: list[int]
    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    stop_ids: tuple = ()
    # Texts that end a completion with the token that completes the first of them; generate() needs
    # `decode` then. Only the completion is looked at, never the prompt.
    stop_strings: tuple = ()
    seed: int = 0
    id: int = 0
    # A guess of the response length, to start long rollouts first; None = max_new_tokens.
    expected_tokens: int | None = None


@dataclass
class Completion:
    """One sample.

    `tokens` ends with the stop token, or with the one that completes a stop string, when
    finish_reason is "stop".
    `logprobs` are fp32, of the distribution that was sampled from.
    """

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
    # At most one page: the prompt's last, not full, of which each sample gets a copy.
    tail: list[int] = field(default_factory=list)
    fresh: bool = True  # not prefilled yet
    running: int = 0

    @property
    def cached(self):
        """Tokens that prefill writes.

        The last prompt token is each sample's first decode step, so prefill needs no lm_head.
        """
        return len(self.request.prompt) - 1


class StopSearch:
    """Looks for the first stop string in the text of one sample, as it grows.

    A stop string need not begin or end where a token does, so text is compared, never ids. Only
    the end of the text is decoded each time: from `start` on, a token so far back that no stop
    string which is still to come can begin before it. At `start` no character is cut in two, so
    what is decoded there is the end of the whole text.
    """

    def __init__(self, strings, decode):
        self.strings = strings
        self.decode = decode
        self.longest = max(len(string) for string in strings)
        self.tokens = []  # all that were drawn
        self.end = 0  # how many the completion has, when a stop string was found
        self.start = 0
        # Where `start` goes next, and how many characters lie between the two.
        self.next_start = 0
        self.between = 0

    def add(self, tokens):
        """The sample has drawn more tokens."""
        seen = len(self.tokens)
        self.tokens += tokens
        text = self._text(len(self.tokens))
        if self._has_stop(text):
            self.end = seen + 1
            while not self._has_stop(self._text(self.end)):
                self.end += 1
            return

        # U+FFFD at the end may be the first bytes of a character.
        if len(text) - self.between >= self.longest and not text.endswith(REPLACEMENT):
            self.start = self.next_start
            self.next_start = len(self.tokens)
            self.between = len(text) - self.between

    def _text(self, end):
        return self.decode(self.tokens[self.start : end])

    def _has_stop(self, text):
        return any(string in text for string in self.strings)


@dataclass
class Row:
    """A running sample; `slot` is its run of pages."""

    group: Group
    sample: int
    slot: int
    search: StopSearch | None = None  # for its request's stop strings


class Sampler:
    """Samples from `model`, reading its weights in place. Call load() after every weight update.

    The host knows the running samples as a list of Row; the device has row i of `state` for each.
    """

    def __init__(
        self, model, slots=256, page_size=None, memory=None, share_prefix=True, exact=False
    ):
        """slots: samples decoded together.
        page_size: tokens per page, a multiple of 16.
        memory: most bytes of keys and values; None = half of what is free when they are first
            needed. Never more than the requests need; with less, fewer samples run together.
        share_prefix: False prefills every sample alone, to measure what sharing gains.
        exact: the GPU's mode with the trainer's arithmetic (runtime/exact.py); all requests of a
            call then have one temperature.
        """
        weight = model.embed.weight
        self.model = model
        self.config = model.config
        self.device = weight.device
        self.dtype = weight.dtype
        self.cpu = weight.device.type == "cpu"
        self.slots = slots
        self.memory = memory
        self.share_prefix = share_prefix
        self.exact = exact

        default = UNIT if self.cpu else 8192 // self.config.head_dim
        self.page_size = page_size or default
        if self.page_size % UNIT:
            raise ValueError(f"page_size {page_size} is not a multiple of {UNIT}")
        layer_values = 2 * self.config.num_key_value_heads * self.config.head_dim
        token_bytes = self.config.num_hidden_layers * layer_values * self.dtype.itemsize
        self.page_bytes = token_bytes * self.page_size

        # Made when first needed; release() gives them back.
        self.pool = None
        self.decoder = None
        self.state = None

        self.capacity = 0  # rows at a time for which there are pages
        self.version = 0  # of the weights
        self.checked_version = 0  # the one under which all running rows were checked
        self.look_every = 1 if self.cpu else 8  # steps between two looks at the rows that ended
        self.decode = None  # ids -> text, of the call that runs
        self.stats = {}

    def load(self, state=None):
        """The weights changed: start a new weight version; pages of the old one are refused now.

        state: name -> tensor, copied into the model in place; None = the model has them already.
        """
        if state:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(state[name])
        self.version += 1
        if self.decoder:
            # Its packed copies are of the old weights. Saying so is necessary: fused AdamW does not
            # bump a tensor's own version counter.
            self.decoder.stamp = None

    def release(self):
        """Free the pages and all that is built on them, for a trainer that needs the memory.

        The next generate() makes them again.
        """
        is_large = self.cpu and self.held_bytes() + self.model.embed.weight.nbytes > LARGE
        self.pool = None
        self.decoder = None
        self.state = None
        if is_large:
            give_back()

    def held_bytes(self):
        """Keys and values in memory now, whether or not a rollout runs."""
        return len(self.pool) * self.page_bytes if self.pool else 0

    def bytes_to_pack(self):
        """What the packed copies of the weights will take on a CPU; 0 when they are there."""
        if not self.cpu or (self.decoder and self.decoder.packed):
            return 0
        matrices = [p.nbytes for p in self.model.parameters() if p.dim() > 1]
        embedding = self.model.embed.weight.nbytes  # packed as the head, where it is that too
        return sum(matrices) - (0 if self.model.head is None else embedding)

    def generate(self, requests, on_done=None, decode=None):
        """Sample every request; returns, per request, its n completions in sample order.

        on_done(request index, completions) is called as soon as a request's samples are all done,
        so that rewards overlap sampling.
        decode(ids) -> text, the tokenizer's; needed where a request has stop strings.
        Raises ValueError with a sentence for a request that can never fit.
        """
        self.decode = decode
        with torch.inference_mode():
            return self._generate(requests, on_done)

    def _generate(self, requests, on_done):
        started = time.perf_counter()
        self.stats = {"tokens": 0, "prefill_tokens": 0, "steps": 0, "row_steps": 0}
        self.stats |= {"prefill_seconds": 0.0, "decode_seconds": 0.0, "seconds": 0.0}
        if not requests:
            return []

        queue = self._plan(requests)
        truncated = any(request.top_p < 1 or request.top_k > 0 for request in requests)
        temperature = self._one_temperature(requests)
        self.done = [[] for _ in requests]

        rows = []
        ended = False
        while queue or rows:
            # Refill the rows that are free.
            admitted = self._admit(queue, self.capacity - len(rows))
            if admitted:
                rows = self._join(rows, admitted)
            if admitted or ended:
                state = self._pad(len(rows))
            self._check_versions(rows, admitted)

            # Decode a few tokens of every row, then look which rows are still alive.
            before = time.perf_counter()
            self.decoder.run(state, self.look_every, truncated, temperature)
            alive = state["alive"][: len(rows)].tolist()
            self.stats["decode_seconds"] += time.perf_counter() - before
            self.stats["steps"] += self.look_every
            self.stats["row_steps"] += self.look_every * len(rows)
            if any(row.search for row in rows):
                alive = self._without_stopped(rows, alive)

            ended = not all(alive)
            if ended:
                rows = self._finish(rows, alive, on_done)

        self.stats["seconds"] = time.perf_counter() - started
        return [_in_sample_order(completions) for completions in self.done]

    # ---- before the first step: groups, pages, buffers ----

    def _plan(self, requests):
        """Requests -> queue of groups, the next one last; refuses what can never fit.

        Also makes what holds them: the page pool, the decoder and the row buffers.
        """
        for index, request in enumerate(requests):
            _check(index, request, self.config)
            if request.stop_strings and not self.decode:
                raise ValueError(
                    f"request {index} has stop strings, which are found in text: "
                    "give generate() the tokenizer's decode"
                )

        groups = []
        for index, request in enumerate(requests):
            samples = list(range(request.n))
            shares = [samples]
            if not self.share_prefix:
                shares = [[sample] for sample in samples]
            for share in shares:
                groups.append(Group(len(groups), index, request, share))

        self._reserve(groups)
        self.decoder.refresh()
        self._make_buffers(groups)
        return sorted(groups, key=_urgency)

    def _one_temperature(self, requests):
        """The temperature of all requests, which the exact mode needs; elsewhere None.

        The trainer's kernel, which computes log-probs there, takes one temperature.
        """
        if not self.exact:
            return None
        temperatures = {request.temperature for request in requests}
        if len(temperatures) > 1:
            raise ValueError(
                f"the exact mode samples at one temperature per call, not at {sorted(temperatures)}"
            )
        return temperatures.pop()

    def _prompt_pages(self, group):
        return _ceil(group.cached, self.page_size)

    def _own_pages(self, group):
        """Pages of a sample's run.

        They hold its tokens from the last prompt token on (the very last is drawn but never fed)
        and, where pages are read by a table, a copy of what the prompt wrote in its last page.
        """
        copied = 0 if self.cpu else group.cached % self.page_size
        return _ceil(group.request.max_new_tokens + copied, self.page_size)

    def _reserve(self, groups):
        """Pages for the whole rollout of as many rows at a time as memory surely has room for.

        Sets self.capacity to that number of rows. The pool is kept while it is large enough.
        """
        own_pages = max(self._own_pages(group) for group in groups)
        longest_first = sorted((self._prompt_pages(group) for group in groups), reverse=True)
        # CPU attention wants a prompt in one piece, and all pieces have one size.
        piece_pages = max(1, longest_first[0]) if self.cpu else 1
        prompts = [_ceil(pages, piece_pages) * piece_pages for pages in longest_first]

        # At worst every row is of another prompt, of the longest ones.
        room = self._affordable_pages()
        samples = sum(len(group.samples) for group in groups)
        self.capacity = 0
        prompt_pages = 0
        for rows in range(1, 1 + min(self.slots, samples)):
            more = prompts[rows - 1] if rows <= len(prompts) else 0
            if rows * own_pages + prompt_pages + more > room:
                break
            self.capacity = rows
            prompt_pages += more
        if not self.capacity:
            self._refuse(groups, own_pages + prompts[0], room)

        needed = PoolSize(self.capacity, own_pages, prompt_pages // piece_pages, piece_pages)
        held = self.pool.size if self.pool else needed
        if not self.pool or any(new > old for new, old in zip(needed, held)):
            # At least what it was, where there is room, so that two kinds of calls share a pool.
            larger = PoolSize(*map(max, needed, held))
            size = larger if larger.pages <= room else needed
            # The old pool is freed before the new one is made; packed weights are kept.
            before = self.decoder
            self.pool = None
            self.decoder = None
            packed = (before.packed, before.stamp) if before else ({}, None)
            before = None
            self.pool = PagePool(
                self.config, size, self.page_size, self.dtype, self.device, heads_first=self.cpu
            )
            self.decoder = Decoder(self.model, self.pool, self.cpu, self.exact)
            self.decoder.packed, self.decoder.stamp = packed

        # No page survives a call, and a rollout that was interrupted leaves none behind.
        self.pool.clear()

    def _affordable_pages(self):
        """Pages in the memory that the sampler may take; the pool in use counts as free."""
        free = free_bytes(self.device) + self.held_bytes() - self.bytes_to_pack()
        allowed = free * MEMORY if self.memory is None else min(self.memory, free)
        return int(allowed // self.page_bytes)

    def _refuse(self, groups, need, room):
        prompt = max(len(group.request.prompt) for group in groups)
        new = max(group.request.max_new_tokens for group in groups)
        worst = max(groups, key=lambda g: self._prompt_pages(g) + self._own_pages(g))
        raise ValueError(
            f"request {worst.index} can never fit: a prompt of {prompt} tokens and {new} new ones "
            f"need {need} pages of {self.page_size} tokens and there is room for {room}: "
            "shorten it, or give the sampler more memory"
        )

    def _make_buffers(self, groups):
        """Row buffers, kept from call to call while they are wide enough.

        CUDA graphs hold their addresses, so new buffers mean new graphs.
        """
        longest = max(group.request.max_new_tokens for group in groups)
        prompt_pages = max(self._prompt_pages(group) for group in groups)
        own_pages = 1 if self.cpu else self.pool.size.run_pages
        widths = {
            "stop_ids": max(len(group.request.stop_ids) for group in groups),
            "tables": prompt_pages + own_pages,
            "out_tokens": longest,
            "out_logprobs": longest,
        }
        if self.state:
            held = {name: self.state[name].shape[1] for name in widths}
            if all(held[name] >= width for name, width in widths.items()):
                return
            widths = {name: max(width, held[name]) for name, width in widths.items()}

        self.state = None  # freed before the new ones are made
        self.state = new_state(self.decoder.pad(self.slots), widths, self.device)
        self.decoder.forget_graphs()

    # ---- between two chunks of steps: who runs, and what the device knows of it ----

    def _admit(self, queue, free_rows):
        """Start samples from the end of the queue while rows last -> [Row]; prefills new prompts."""
        admitted = []
        fresh = []
        while queue and free_rows > 0:
            group = queue[-1]
            if group.fresh:
                pages = self.pool.take(self._prompt_pages(group), self.version)
                full = len(pages) if self.cpu else group.cached // self.page_size
                group.prefix = pages[:full]
                group.tail = pages[full:]
                group.fresh = False
                fresh.append(group)

            started = group.samples[:free_rows]
            group.samples = group.samples[free_rows:]
            strings = group.request.stop_strings
            for sample in started:
                slot = self.pool.take_run(self.version)
                search = StopSearch(strings, self.decode) if strings else None
                admitted.append(Row(group, sample, slot, search))
            group.running += len(started)
            free_rows -= len(started)
            if not group.samples:
                queue.pop()

        self._prefill([group for group in fresh if group.cached])
        self._copy_tails(admitted)
        return admitted

    def _prefill(self, groups):
        """Run prompts, but their last token, through the model in packed passes of like lengths."""
        started = time.perf_counter()
        groups = sorted(groups, key=lambda group: group.cached)
        while groups:
            batch = [groups.pop()]
            room = PREFILL_TOKENS - batch[0].cached
            while groups and groups[-1].cached <= room:
                room -= groups[-1].cached
                batch.append(groups.pop())
            prompts = [group.request.prompt[:-1] for group in batch]
            self.decoder.prefill(prompts, [group.prefix + group.tail for group in batch])
            self.stats["prefill_tokens"] += sum(group.cached for group in batch)
        self.stats["prefill_seconds"] += time.perf_counter() - started

    def _copy_tails(self, admitted):
        """Give every new sample its own copy of its prompt's last, not full page, to continue."""
        copies = []
        for row in admitted:
            for page in row.group.tail:
                first = self.pool.run(row.slot)[0]
                copies.append((page, first))
        if copies:
            self.pool.copy(copies)

        # When all samples of a group have theirs, the page itself is not needed any more.
        for row in admitted:
            group = row.group
            if not group.samples:
                self.pool.give(group.tail)
                group.tail = []

    def _join(self, rows, admitted):
        """Add new rows, sorted by group, so that the samples of a group are neighbours -> [Row]."""
        first = len(rows)
        rows = rows + admitted
        for name, values in self._columns(admitted).items():
            self.state[name][first : len(rows)] = values.to(self.device)

        order = sorted(range(len(rows)), key=lambda i: rows[i].group.number)
        return self._keep(rows, order)

    def _columns(self, rows):
        """What the device has to know of new rows, on the host: column -> [rows, ...]."""
        values = [_row_values(row, self.page_size) for row in rows]
        columns = {}
        for name, dtype in COLUMNS.items():
            columns[name] = torch.tensor([value[name] for value in values], dtype=dtype)

        stop_ids = []
        tables = []
        for row in rows:
            stop_ids.append(list(row.group.request.stop_ids))
            own = [] if self.cpu else self.pool.run(row.slot)  # on CPU the slot says where
            tables.append(row.group.prefix + own)
        columns["stop_ids"] = _filled(stop_ids, like=self.state["stop_ids"], filler=-1)
        columns["tables"] = _filled(tables, like=self.state["tables"], filler=0)
        return columns

    def _keep(self, rows, chosen):
        """Only the chosen rows, in that order, on the host and on the device -> [Row]."""
        index = torch.tensor(chosen, dtype=torch.int64, device=self.device)
        for buffer in self.state.values():
            buffer[: len(chosen)] = buffer.index_select(0, index)
        return [rows[i] for i in chosen]

    def _pad(self, count):
        """The state to run: `count` living rows, filled up with dead copies of the last one."""
        size = self.decoder.pad(count)
        for buffer in self.state.values():
            buffer[count:size] = buffer[count - 1]
        self.state["alive"][count:size] = False
        return {name: buffer[:size] for name, buffer in self.state.items()}

    def _check_versions(self, rows, admitted):
        """Every page about to be read is of the present weights.

        New rows are looked at always, the others when the version has changed.
        """
        suspects = admitted if self.version == self.checked_version else rows
        for row in suspects:
            pages = row.group.prefix + self.pool.run(row.slot)
            self.pool.check(pages, self.version)
        self.checked_version = self.version

    def _without_stopped(self, rows, alive):
        """`alive` with False for the rows whose text has a stop string.

        What they drew behind it since the host last looked is cut off in _finish.
        """
        count = len(rows)
        state = {name: buffer[:count] for name, buffer in self.state.items()}
        # A living row's last token is at `positions`, an ended one's was never fed.
        drawn = state["positions"] + 1 - state["start"] + ~state["alive"]
        last_columns = torch.arange(-self.look_every, 0, device=self.device)
        columns = (drawn[:, None] + last_columns).clamp(min=0)
        newest = state["out_tokens"].gather(1, columns).tolist()

        lives = []
        for row, total, tokens, is_alive in zip(rows, drawn.tolist(), newest, alive):
            if row.search:
                new = total - len(row.search.tokens)
                row.search.add(tokens[-new:])
                is_alive = is_alive and not row.search.end
            lives.append(is_alive)
        return lives

    def _finish(self, rows, alive, on_done):
        """Rows that ended become completions and leave -> the rows that go on.

        Hands over the requests that are complete.
        """
        ended = [i for i, lives in enumerate(alive) if not lives]
        index = torch.tensor(ended, device=self.device)
        # `positions` is that of the last token fed; one more was drawn.
        counts = self.state["positions"] + 2 - self.state["start"]
        counts = counts[index].tolist()
        all_tokens = self.state["out_tokens"][index].tolist()
        all_logprobs = self.state["out_logprobs"][index].tolist()

        for i, count, tokens, logprobs in zip(ended, counts, all_tokens, all_logprobs):
            row = rows[i]
            number, request = row.group.index, row.group.request
            found_stop = row.search and row.search.end
            if found_stop:
                count = row.search.end
            tokens = tokens[:count]
            logprobs = logprobs[:count]
            stopped = found_stop or tokens[-1] in request.stop_ids
            reason = "stop" if stopped else "length"
            done = self.done[number]
            done.append(Completion(number, row.sample, tokens, logprobs, reason))
            self.stats["tokens"] += count
            self._leave(row)
            if on_done and len(done) == request.n:
                on_done(number, _in_sample_order(done))

        living = [i for i, lives in enumerate(alive) if lives]
        return self._keep(rows, living)

    def _leave(self, row):
        """Give back the row's pages and, after the last sample of a group, those of its prompt."""
        self.pool.give_run(row.slot)
        row.group.running -= 1
        if not row.group.running and not row.group.samples:
            self.pool.give(row.group.prefix)


def _check(index, request, config):
    """ValueError with a sentence for a request that no sampler of this model could run."""
    prompt, new = request.prompt, request.max_new_tokens
    if not prompt:
        raise ValueError(f"request {index} has an empty prompt: give it at least one token")
    if new < 1 or request.n < 1:
        raise ValueError(f"request {index}: n and max_new_tokens must be at least 1")
    strings = request.stop_strings
    if isinstance(strings, str) or not all(strings) or REPLACEMENT in "".join(strings):
        raise ValueError(
            f"request {index}: stop_strings {strings!r} must be a tuple of texts, none of them "
            "empty or with half a character (U+FFFD)"
        )
    if len(prompt) + new > config.max_position_embeddings:
        raise ValueError(
            f"request {index}: a prompt of {len(prompt)} tokens with {new} new ones is longer than "
            f"the model's {config.max_position_embeddings} positions"
        )
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise ValueError(
            f"request {index} has a token id outside the model's vocabulary of "
            f"{config.vocab_size}: was it encoded by another tokenizer?"
        )


def _urgency(group):
    """Longest expected first: what starts last should be short.

    Otherwise a few long rows would run alone at the end.
    """
    expected = group.request.expected_tokens or group.request.max_new_tokens
    return expected, group.cached, -group.number


def _row_values(row, page_size):
    """The one-number columns of a new row (decode.COLUMNS)."""
    group, request = row.group, row.group.request
    return {
        "tokens": request.prompt[-1],
        "positions": group.cached,
        "start": group.cached + 1,
        "last": group.cached + request.max_new_tokens,
        "group": group.number,
        "slot": row.slot,
        "prefix": len(group.prefix) * page_size,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "request": request.id,
        "sample": row.sample,
        "alive": True,
    }


def _filled(lists, like, filler):
    """Lists of ints as rows as wide as `like`, filled up."""
    width = like.shape[1]
    filled = [values + [filler] * (width - len(values)) for values in lists]
    return torch.tensor(filled, dtype=like.dtype).view(len(lists), width)


def _in_sample_order(completions):
    return sorted(completions, key=lambda completion: completion.sample)


def _ceil(count, size):
    """How many pieces of `size` hold `count`."""
    return -(-count // size)
