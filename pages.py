"""The key-value cache of the sampler: pages, who holds them, and which weights wrote them."""

import os

import torch


class StalePageError(RuntimeError):
    """A page written under other weights was about to be read."""


class PagePool:
    """Keys and values of every layer as pages [pages, kv heads, page_size, head_dim], stamped with the weight version that wrote them.

    The first `runs` x `run_pages` pages are runs, one for each row's own tokens; the next `prompts` x `prompt_pages` hold prompts, each in as many
    pieces of `prompt_pages` as it needs. On CPU the tensors lie in memory heads first and a prompt is one piece, so that a row's tokens are two stretches
    of memory for each head; keys lie there in units of 16 tokens (kernels/native.py), and `k` shows them in the wrong order.
    """

    def __init__(
        self, config, runs, run_pages, prompts, prompt_pages, page_size, dtype, device, heads_first
    ):
        self.runs, self.run_pages, self.prompts, self.prompt_pages, self.page_size = (
            runs,
            run_pages,
            prompts,
            prompt_pages,
            page_size,
        )
        count = runs * run_pages + prompts * prompt_pages
        layers, heads = range(config.num_hidden_layers), config.num_key_value_heads
        zeros = lambda *shape: torch.zeros(
            *shape, page_size, config.head_dim, dtype=dtype, device=device
        )
        if heads_first:  # keys and values of a layer in one tensor, so that one call writes both
            self.joint = [zeros(2 * heads, count) for _ in layers]
            self.k, self.v = (
                [joint[side].transpose(0, 1) for joint in self.joint]
                for side in (slice(heads), slice(heads, None))
            )
        else:
            self.k, self.v = ([zeros(count, heads) for _ in layers] for _ in "kv")
        self.clear()

    def __len__(self):
        return len(self.version)

    def clear(self):
        self.version = [None] * len(self.k[0])
        self.free_runs = list(range(self.runs))
        self.free = list(
            range(self.runs * self.run_pages, len(self), self.prompt_pages)
        )  # first pages of pieces

    def run(self, slot):
        """Pages of a run."""
        return list(range(slot * self.run_pages, (slot + 1) * self.run_pages))

    def take_run(self, version):
        """Reserve a run for keys and values of weight version `version` -> its number."""
        slot = self.free_runs.pop()
        self.version[slot * self.run_pages : (slot + 1) * self.run_pages] = [
            version
        ] * self.run_pages
        return slot

    def give_run(self, slot):
        """Hand a run back: what it holds may not be read any more."""
        self.free_runs.append(slot)
        self.version[slot * self.run_pages : (slot + 1) * self.run_pages] = [None] * self.run_pages

    def take(self, count, version):
        """Reserve `count` pages for a prompt."""
        pieces = [self.free.pop() for _ in range(-(-count // self.prompt_pages))]
        taken = [first + i for first in pieces for i in range(self.prompt_pages)][:count]
        for page in taken:
            self.version[page] = version
        return taken

    def give(self, pages):
        for page in pages:
            self.version[page] = None
        self.free += pages[:: self.prompt_pages]

    def check(self, pages, version):
        """Refuse to read a page that was not written under weight version `version`."""
        for page in pages:
            if self.version[page] != version:
                raise StalePageError(
                    f"page {page} holds keys and values of weight version {self.version[page]}, the weights are now version {version}: "
                    "call load() between two generate() calls, not during one"
                )

    def copy(self, copies):
        """Copy whole pages in every layer; copies: [(from, to)]."""
        sources, targets = (
            torch.tensor(copies, dtype=torch.int64, device=self.k[0].device).view(-1, 2).T
        )
        for pages in self.k + self.v:
            pages[targets] = pages[sources]


def free_bytes(device):
    """Memory that this process can have now: what CUDA says is free; on CPU its rank's share of Linux's MemAvailable, elsewhere of half of all memory."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        with open("/proc/meminfo") as lines:
            free = next(
                int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
