"""The key-value cache of the sampler: pages, who holds them, and which weights wrote them."""

from typing import NamedTuple

import torch

# Pages copied at a time, through memory of their size: 0.1 GB of the 0.5B model's.
COPIED_PAGES = 64


class StalePageError(RuntimeError):
    """A page written under other weights was about to be read."""


class PoolSize(NamedTuple):
    """What is made once for many calls: how pages are cut, and how wide the rows' state is.

    The runs hold the rows' own tokens, the pieces prompts.
    """

    runs: int
    run_pages: int  # pages of each run
    pieces: int
    piece_pages: int  # pages of each piece
    stops: int  # stop ids of a row
    table: int  # pages of a row
    response: int  # tokens of a response
    positions: int  # tokens of a prompt with its response

    @property
    def pages(self):
        return self.runs * self.run_pages + self.pieces * self.piece_pages


class PagePool:
    """Keys and values of every layer as pages [pages, kv heads, page_size, head_dim], one tensor.

    Each page is stamped with the weight version that wrote it. The runs come first, one for each
    row's own tokens; then the pieces, of which a prompt takes as many as it needs.

    On CPU the tensors lie in memory heads first and a prompt is one piece, so that a row's tokens
    are two stretches of memory for each head; keys lie there in units of 16 tokens
    (kernels/native.py), and `layer` shows them in the wrong order.
    """

    def __init__(self, config, size, page_size, dtype, device, heads_first):
        """size: PoolSize. page_size: tokens per page."""
        self.size = size
        self.page_size = page_size
        self.device = device
        heads = config.num_key_value_heads
        layers = config.num_hidden_layers
        page = (page_size, config.head_dim)
        kind = {"dtype": dtype, "device": device}

        self.heads_first = heads_first
        if heads_first:
            # Keys and values of a layer together, so that one call writes both.
            self.kv = torch.zeros(layers, 2 * heads, size.pages, *page, **kind)
        else:
            self.kv = torch.zeros(layers, 2, size.pages, heads, *page, **kind)
        self.clear()

    def __len__(self):
        return self.size.pages

    def clear(self):
        """Take every page back."""
        self.version = [None] * len(self)
        self.free_runs = list(range(self.size.runs))
        # The first pages of the pieces.
        first = self.size.runs * self.size.run_pages
        self.free_pieces = list(range(first, len(self), self.size.piece_pages))

    def layer(self, index):
        """Keys and values of a layer, each [pages, kv heads, page_size, head_dim]."""
        if not self.heads_first:
            return self.kv[index].unbind(0)
        k, v = self.kv[index].chunk(2)
        return k.transpose(0, 1), v.transpose(0, 1)

    def run(self, slot):
        """Pages of a run."""
        return list(range(slot * self.size.run_pages, (slot + 1) * self.size.run_pages))

    def take_run(self, version):
        """Reserve a run for keys and values of weight version `version` -> its number."""
        slot = self.free_runs.pop()
        self._stamp(self.run(slot), version)
        return slot

    def give_run(self, slot):
        """Hand a run back: what it holds may not be read any more."""
        self.free_runs.append(slot)
        self._stamp(self.run(slot), None)

    def has(self, count):
        """Are `count` pages free for a prompt?"""
        return count <= len(self.free_pieces) * self.size.piece_pages

    def take(self, count, version):
        """Reserve `count` pages for a prompt -> the pages, in order."""
        taken = []
        while len(taken) < count:
            first = self.free_pieces.pop()
            taken += range(first, first + self.size.piece_pages)
        taken = taken[:count]
        self._stamp(taken, version)
        return taken

    def give(self, pages):
        """Hand the pages of a prompt back."""
        self._stamp(pages, None)
        self.free_pieces += pages[:: self.size.piece_pages]

    def _stamp(self, pages, version):
        for page in pages:
            self.version[page] = version

    def check(self, pages, version):
        """Refuse to read a page that was not written under weight version `version`."""
        for page in pages:
            if self.version[page] != version:
                raise StalePageError(
                    f"page {page} holds keys and values of weight version {self.version[page]}, "
                    f"the weights are now version {version}: "
                    "call load() between two generate() calls, not during one"
                )

    def copy(self, pairs):
        """Copy whole pages in every layer; pairs [n, 2] int64, from and to, on the device."""
        for part in pairs.split(COPIED_PAGES):
            sources, targets = part.unbind(1)
            self.kv.index_copy_(2, targets, self.kv.index_select(2, sources))
