"""What a call takes: the first apart from the warm ones, and the machine it ran on."""

import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """One call that has ended."""

    wall: float  # seconds
    cpu: float  # seconds of this process
    result: Any


def call(run):
    """Call run() and wait until the device has done its work too."""
    started, cpu = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Call(time.perf_counter() - started, time.process_time() - cpu, result)


@dataclass(frozen=True)
class Timing:
    """Seconds of the same call several times.

    The first compiles kernels, records graphs, packs weights and allocates memory; one round of it
    once passed for the speed of the sampler on a GPU, where it was 0.8 of it.
    [3, 1, 2, 1.5] -> cold 3, warm 1.5, spread 1.
    """

    seconds: list[float]  # in order, at least two

    @property
    def cold(self):
        return self.seconds[0]

    @property
    def warm(self):
        """Median of all calls but the first."""
        return statistics.median(self.seconds[1:])

    @property
    def spread(self):
        """Largest less smallest of the warm calls."""
        return max(self.seconds[1:]) - min(self.seconds[1:])

    def columns(self):
        """For the last line of JSON."""
        return {"cold_s": self.cold, "warm_s": self.warm, "spread_s": self.spread}


def device_name():
    """The GPU, or the CPU with the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
