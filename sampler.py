"""Rollouts: paged key-value cache, continuous batching, prompts shared by the samples of a group.

    sampler = Sampler(model, slots=256)
    requests = [Request(prompt=ids, n=16, stop_ids=(2,), seed=0, id=7)]
    for completions in sampler.generate(requests): ...

The life of a request: all pages that its rollout can ever need are reserved (so nothing is
preempted and nothing runs out of memory half way), its prompt but the last token is prefilled once,
its n samples start by decoding that last token, each in a slot: a row of the device's state that
never moves, with a run of pages. A sample ends when it draws a stop token, when its text has a stop
string, or when it reaches max_new_tokens; its slot is free for the next when its outputs are copied.
Every draw depends only on (seed, request id, sample, position).

On a GPU the host is a chunk of steps behind: it queues the next chunk before it looks at what the
last one did, so neither waits for the other, and a sample that ended idles for a chunk.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from decode import Decoder, Fetch, upload
from kernels.native import UNIT
from pages import PagePool, PoolSize
from runtime.cpu import give_back
from runtime.machine import free_bytes
from runtime.memory import FREE_SHARE, PREFILL_TOKENS, page_tokens, rows_at_once

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
    """A sample in a slot, until its outputs are copied."""

    group: Group
    sample: int
    slot: int
    search: StopSearch | None = None  # for its request's stop strings
    drawn: int = 0  # tokens, by the last look that had to know
    ended: bool = False


class Awaited(NamedTuple):
    """Rows, and what the device has been asked about them."""

    rows: list[Row]
    fetch: Fetch  # of Decoder.look, or of Decoder.outputs where they have ended


class Sampler:
    """Samples from `model`, reading its weights in place. Call load() after every weight update."""

    def __init__(
        self,
        model,
        slots=0,
        page_size=None,
        memory=None,
        share_prefix=True,
        exact=False,
        expected=(),
    ):
        """slots: samples decoded together; 0: all that memory holds, at most 1,024 (CPU: 256).
        page_size: tokens per page, a multiple of 16.
        memory: most bytes of keys and values; None = half of what is free when they are first
            needed. Never more than the requests need; with less, fewer samples run together.
        share_prefix: False prefills every sample alone, to measure what sharing gains.
        exact: the GPU's mode with the trainer's arithmetic (runtime/exact.py); all requests of a
            call then have one temperature.
        expected: requests as large as any call's; what is made once is sized for them, where
            memory allows it, so that no later call has to make it (and its graphs) anew.
        """
        weight = model.embed.weight
        self.model = model
        self.config = model.config
        self.device = weight.device
        self.dtype = weight.dtype
        self.cpu = weight.device.type == "cpu"
        self.slots = rows_at_once(slots, cuda=not self.cpu)
        self.memory = memory
        self.share_prefix = share_prefix
        self.exact = exact
        self.expected = expected

        default = UNIT if self.cpu else page_tokens(self.config)
        self.page_size = page_size or default
        if self.page_size % UNIT:
            raise ValueError(f"page_size {page_size} is not a multiple of {UNIT}")
        layer_values = 2 * self.config.num_key_value_heads * self.config.head_dim
        token_bytes = self.config.num_hidden_layers * layer_values * self.dtype.itemsize
        self.page_bytes = token_bytes * self.page_size

        # Made when first needed; release() gives them back.
        self.pool = None
        self.decoder = None

        self.version = 0  # of the weights
        self.checked_version = 0  # the one under which all running rows were checked
        # Steps between two looks at the rows, and looks that the host is behind. A sample that has
        # ended idles for 12 steps in the mean; 8 steps take the GPU 10 ms or more, the host 2.
        self.chunk, self.lag = (1, 0) if self.cpu else (8, 1)
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
        self.truncated = any(request.top_p < 1 or request.top_k > 0 for request in requests)
        self.searched = any(request.stop_strings for request in requests)
        self.temperature = self._one_temperature(requests)
        self.done = [[] for _ in requests]
        self.running = []
        self.count = 0  # rows of a step, `running` and some to fill up; 0: not placed yet
        looks = deque()
        self.leaving = deque()

        while queue or self.running or looks or self.leaving:
            self._admit(queue)
            before = time.perf_counter()
            if self.running:
                looks.append(self._run_chunk())
            if len(looks) > self.lag or (looks and not self.running):
                self._collect(*looks.popleft())
            self.stats["decode_seconds"] += time.perf_counter() - before

            # Outputs arrive behind the chunk that was under way when they were asked for.
            while self.leaving and (self.leaving[0].fetch.is_here() or not self.running):
                self._finish(*self.leaving.popleft(), on_done)

        self.stats["seconds"] = time.perf_counter() - started
        return [_in_sample_order(completions) for completions in self.done]

    # ---- before the first step: groups, pages, buffers ----

    def _plan(self, requests):
        """Requests -> queue of groups, the next one last; refuses what can never fit.

        Also makes what holds them: the page pool and the decoder.
        """
        for index, request in enumerate(requests):
            _check(index, request, self.config, self.decode)

        groups = self._groups(requests)
        self._reserve(groups)
        self.decoder.refresh()
        return sorted(groups, key=_urgency)

    def _groups(self, requests):
        groups = []
        for index, request in enumerate(requests):
            samples = list(range(request.n))
            shares = [samples]
            if not self.share_prefix:
                shares = [[sample] for sample in samples]
            for share in shares:
                groups.append(Group(len(groups), index, request, share))
        return groups

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
        and, where pages are read by a table, a copy of what the prompt wrote in its last page:
        up to a page, whatever the prompt, so that another prompt needs no larger runs.
        """
        copied = 0 if self.cpu else self.page_size - 1
        return _ceil(group.request.max_new_tokens + copied, self.page_size)

    def _reserve(self, groups):
        """Make what holds these groups, or keep what there is.

        That is pages for the whole rollout of as many rows at a time as memory surely has room for.
        """
        room = self._affordable_pages()
        samples = _samples(groups)
        needed = self._size(groups, samples, room)
        if not needed.runs:
            self._refuse(groups, needed.run_pages + needed.pieces * needed.piece_pages, room)
        if not self.pool or not self._is_held(needed):
            # For what is expected too, where that leaves room for rows, and at least what it was,
            # so that all kinds of calls share a pool and its graphs.
            expected = self._groups(self.expected)
            samples = max(samples, _samples(expected))
            size = self._size(groups + expected, samples, room)
            size = size if size.runs else needed
            if self.pool:
                larger = PoolSize(*map(max, size, self.pool.size))
                size = larger if larger.pages <= room else size
            # The old ones are freed before the new ones are made; packed weights are kept.
            old = self.decoder
            packed = (old.packed, old.stamp) if old else ({}, None)
            self.pool = self.decoder = old = None
            self.pool = PagePool(
                self.config, size, self.page_size, self.dtype, self.device, heads_first=self.cpu
            )
            self.decoder = Decoder(self.model, self.pool, self.cpu, self.exact)
            self.decoder.packed, self.decoder.stamp = packed

        # No page survives a call, and a rollout that was interrupted leaves none behind.
        self.pool.clear()
        self.refill = 1 if self.cpu else max(1, self.pool.size.runs // 16)

    def _size(self, groups, samples, room):
        """PoolSize for groups of so many samples; 0 runs where not even one row has room.

        room: pages at most.
        """
        own_pages = max(self._own_pages(group) for group in groups)
        longest_first = sorted((self._prompt_pages(group) for group in groups), reverse=True)
        # CPU attention wants a prompt in one piece, and all pieces have one size.
        piece_pages = max(1, longest_first[0]) if self.cpu else 1
        prompts = [_ceil(pages, piece_pages) * piece_pages for pages in longest_first]

        # At worst every row is of another prompt, of the longest ones.
        asked = [group.request for group in groups]
        runs = 0
        prompt_pages = 0
        for count in range(1, 1 + min(self.slots, samples)):
            more = prompts[count - 1] if count <= len(prompts) else 0
            if count * own_pages + prompt_pages + more > room:
                break
            runs = count
            prompt_pages += more

        return PoolSize(
            runs=runs,
            run_pages=own_pages,
            pieces=max(prompt_pages, prompts[0]) // piece_pages,
            piece_pages=piece_pages,
            stops=max(len(request.stop_ids) for request in asked),
            table=1 if self.cpu else longest_first[0] + own_pages,
            response=max(request.max_new_tokens for request in asked),
            positions=max(len(request.prompt) + request.max_new_tokens for request in asked),
        )

    def _is_held(self, needed):
        """Does what there is hold rows of this size?

        With fewer slots or pieces samples wait for others; only for a quarter more of them is it
        worth to record all graphs again.
        """
        held = self.pool.size
        prompt_pages = needed.piece_pages if self.cpu else needed.table - needed.run_pages
        has_pieces = prompt_pages <= held.pieces * held.piece_pages
        least = needed._replace(runs=needed.runs * 4 // 5, pieces=needed.pieces * 4 // 5)
        return has_pieces and all(new <= old for new, old in zip(least, held))

    def _affordable_pages(self):
        """Pages in the memory that the sampler may take; the pool in use counts as free."""
        free = free_bytes(self.device) + self.held_bytes() - self.bytes_to_pack()
        allowed = free * FREE_SHARE if self.memory is None else min(self.memory, free)
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

    # ---- between two chunks of steps: who runs, and what the device has done ----

    def _admit(self, queue):
        """Start samples from the end of the queue while there are slots and pages for prompts.

        On a GPU by 1/16 of the slots at least: a prefill pass takes 15 ms for 1 to 16 prompts.
        """
        if self.running and len(self.pool.free_runs) < min(self.refill, _samples(queue)):
            return

        admitted = []
        fresh = []
        while queue and self.pool.free_runs:
            group = queue[-1]
            if group.fresh:
                if not self.pool.has(self._prompt_pages(group)):
                    break
                pages = self.pool.take(self._prompt_pages(group), self.version)
                full = len(pages) if self.cpu else group.cached // self.page_size
                group.prefix = pages[:full]
                group.tail = pages[full:]
                group.fresh = False
                fresh.append(group)

            free = len(self.pool.free_runs)
            strings = group.request.stop_strings
            for sample in group.samples[:free]:
                slot = self.pool.take_run(self.version)
                search = StopSearch(strings, self.decode) if strings else None
                admitted.append(Row(group, sample, slot, search))
                group.running += 1
            group.samples = group.samples[free:]
            if not group.samples:
                queue.pop()

        if admitted:
            self._prefill([group for group in fresh if group.cached])
            self._copy_tails(admitted)
            self.decoder.join([self._values(row) for row in admitted])
            self.running = self.running + admitted  # a new list: looks keep the old one
            self.count = 0

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
            self.pool.copy(upload(np.array(copies), self.device))

        # When all samples of a group have theirs, the page itself is not needed any more.
        for row in admitted:
            group = row.group
            if not group.samples:
                self.pool.give(group.tail)
                group.tail = []

    def _values(self, row):
        """What the device has to know of a new row; on a CPU the slot says where its own pages are."""
        prefix = row.group.prefix
        pages = prefix[:1] if self.cpu else prefix + self.pool.run(row.slot)
        return self.decoder.rows.new_row(row.group.request, row.sample, row.slot, pages)

    def _run_chunk(self):
        """Give the device a chunk of steps, and ask what it will have done -> Awaited."""
        # Every page about to be read is of the present weights; new ones are when they are taken.
        if self.version != self.checked_version:
            for row in self.running:
                self.pool.check(row.group.prefix + self.pool.run(row.slot), self.version)
            self.checked_version = self.version

        if not self.count:
            self.count = self.decoder.place([row.slot for row in self.running])
        self.decoder.run(self.count, self.chunk, self.truncated, self.temperature)
        self.stats["steps"] += self.chunk
        self.stats["row_steps"] += self.chunk * len(self.running)
        fetch = self.decoder.look(self.count, self.chunk if self.searched else 0)
        return Awaited(self.running, fetch)

    def _collect(self, ran, fetch):
        """Find the rows that have ended by then, and ask for their outputs."""
        places, *newest = fetch.wait()
        positions, lives = places[: len(ran)].T
        ended = []
        for i in range(len(ran)) if newest else np.flatnonzero(lives == 0):
            row = ran[i]
            if row.ended:  # by the look before, when this chunk was on its way already
                continue
            drawn = int(positions[i]) - row.group.cached
            if row.search and drawn > row.drawn:
                row.search.add(newest[0][i, row.drawn - drawn :].tolist())
            row.drawn = drawn
            row.ended = not lives[i] or bool(row.search and row.search.end)
            if row.ended:
                ended.append(row)

        if ended:
            self.running = [row for row in self.running if not row.ended]
            self.count = 0
            longest = max(row.drawn for row in ended)
            fetch = self.decoder.outputs([row.slot for row in ended], longest)
            self.leaving.append(Awaited(ended, fetch))

    def _finish(self, ended, fetch, on_done):
        """Rows whose outputs are here become completions, and their slots free.

        Hands over the requests that are complete.
        """
        (outputs,) = fetch.wait()
        for row, (tokens, logprobs) in zip(ended, outputs):
            number, request = row.group.index, row.group.request
            found_stop = row.search and row.search.end
            # Cut off what was drawn behind a stop string before the host knew.
            count = row.search.end if found_stop else row.drawn
            tokens = tokens[:count].tolist()
            logprobs = logprobs[:count].view(np.float32).tolist()
            stopped = found_stop or tokens[-1] in request.stop_ids
            reason = "stop" if stopped else "length"
            done = self.done[number]
            done.append(Completion(number, row.sample, tokens, logprobs, reason))
            self.stats["tokens"] += count
            self._leave(row)
            if on_done and len(done) == request.n:
                on_done(number, _in_sample_order(done))

    def _leave(self, row):
        """Give back the row's pages and, after the last sample of a group, those of its prompt."""
        self.pool.give_run(row.slot)
        row.group.running -= 1
        if not row.group.running and not row.group.samples:
            self.pool.give(row.group.prefix)


def _check(index, request, config, decode):
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
    if strings and not decode:
        raise ValueError(
            f"request {index} has stop strings, which are found in text: "
            "give generate() the tokenizer's decode"
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


def _samples(groups):
    """How many have not started."""
    return sum(len(group.samples) for group in groups)


def _urgency(group):
    """Longest expected first: what starts last should be short.

    Otherwise a few long rows would run alone at the end.
    """
    expected = group.request.expected_tokens or group.request.max_new_tokens
    return expected, group.cached, -group.number


def _in_sample_order(completions):
    return sorted(completions, key=lambda completion: completion.sample)


def _ceil(count, size):
    """How many pieces of `size` hold `count`."""
    return -(-count // size)
