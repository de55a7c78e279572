"""What the sampler's host does between two chunks of steps, counted and timed without a GPU.

    python -m bench host               the workloads of `bench sampler` and that of a 135M run
    python -m bench host --only GRPO   one of them

The real scheduler, pages and state on CUDA's way, and in place of the model and of the graphs of
its steps a stub that draws responses of a given length. The device is the CPU under another name
(cpu:0), so that torch says of every operation on which side it would run:

launches   operations on tensors of the device, and graph replays; a prefill's layers count as one
uploads    tensors copied from the host
waits      the host needs a value of the device, or copies without non_blocking
us         CPU time of the host, with neither the stub's nor the counting's
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
import sampler as sampler_file
from bench.clock import device_name
from decode import Decoder
from kernels import rows
from sampler import Request, Sampler

DEVICE = torch.device("cpu", 0)
STOP_ID = 1
ROUNDS = 3  # warm calls, the median counts


@dataclass
class Meter:
    """Counts of one call of generate()."""

    launches: int = 0
    uploads: int = 0
    waits: int = 0
    stub_seconds: float = 0.0
    counting: bool = False
    lengths: dict = field(default_factory=dict)  # (request, sample) -> tokens of its response

    def stub(self, run):
        """Call run() outside of all counts and times."""
        started = time.process_time()
        counting, self.counting = self.counting, False
        result = run()
        self.counting = counting
        self.stub_seconds += time.process_time() - started
        return result


METER = Meter()


# ---- which side an operation runs on ----


class CountOperations(TorchDispatchMode):
    """Tensors made on cpu:0, and what is made of them, are the device's."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        tensors = list(tensors_in((arguments, options)))
        of_device = [tensor for tensor in tensors if on_device(tensor)]
        if "device" in options and options["device"] is not None:
            to_device = options["device"] == DEVICE
        else:
            to_device = bool(of_device)

        if to_device:
            for tensor in tensors_in(result):
                tensor.of_device = True
        # `to` gives the tensor itself or a copy.
        is_copy = function.overloadpacket.__name__ == "to" and result is not arguments[0]
        if METER.counting and (to_device or of_device) and (is_copy or not function.is_view):
            count(function, tensors, of_device, to_device, arguments, options)
        return result


def count(function, tensors, of_device, to_device, arguments, options):
    name = function.overloadpacket.__name__
    if name in ("item", "_local_scalar_dense"):
        METER.waits += 1
        return

    METER.launches += to_device
    host = [tensor for tensor in tensors if not on_device(tensor) and tensor.dim()]
    METER.uploads += len(host) if to_device else 0
    crosses_over = not to_device or host
    non_blocking = options.get("non_blocking", False) or (
        name == "copy_" and arguments[2:] == (True,)
    )
    picks_by_mask = any(tensor.dtype == torch.bool for tensor in of_device) and "index" in name
    needs_sizes = name == "nonzero" or (name == "repeat_interleave" and not options)
    if (crosses_over and not non_blocking) or picks_by_mask or needs_sizes:
        METER.waits += 1


class CountReads(TorchFunctionMode):
    """What torch does on a CPU without an operation of its own."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function in (torch.Tensor.tolist, torch.Tensor.numpy) and on_device(arguments[0]):
            METER.waits += METER.counting
        if function is torch.tensor and (options or {}).get("device") == DEVICE:
            result.of_device = True
            METER.uploads += METER.counting
            METER.waits += METER.counting
        return result


def on_device(tensor):
    return getattr(tensor, "of_device", False)


def tensors_in(value):
    """All tensors of nested arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


# ---- the stubs ----


class StubDecoder(Decoder):
    """Decoder whose steps are one graph launch each, and whose tokens come from METER.lengths."""

    def run(self, count, steps, truncated, temperature=None):
        METER.launches += steps * METER.counting
        METER.stub(lambda: super(StubDecoder, self).run(count, steps, truncated, temperature))

    def step(self, count, truncated, temperature=None):
        active = self.rows.active[:count]
        values = self.rows.values.index_select(0, active)
        column = rows.response_column(self.rows, values)
        identity = values[:, rows.REQUEST : rows.SAMPLE + 1].tolist()
        tokens = []
        for key, drawn in zip(identity, column.tolist()):
            is_last = drawn + 1 == METER.lengths.get(tuple(key))
            tokens.append(STOP_ID if is_last else 2)
        rows.advance(self.rows, active, values, torch.tensor(tokens), torch.zeros(count))


class StubModel:
    """The shapes of one small layer, and no layers."""

    config = model_file.Config(
        vocab_size=512,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
    )
    embed = SimpleNamespace(weight=torch.zeros(512, 8))
    head_weight = embed.weight

    def decode(self, tokens, rope, attend, linear):
        METER.launches += METER.counting
        return torch.zeros(len(tokens), 8)


def make_sampler(slots):
    """A sampler on CUDA's way whose device is cpu:0."""
    sampler = Sampler(StubModel(), slots=slots, page_size=128)
    sampler.device = DEVICE
    sampler.cpu = False
    sampler.chunk, sampler.lag = 8, 1
    return sampler


# ---- workloads ----


def workloads():
    """name -> (slots, requests); lengths of the responses go to METER.lengths."""
    chance = random.Random(0)
    METER.lengths = {}

    def group(id, prompt, samples, new, mean):
        for sample in range(samples):
            length = 1 + int(chance.expovariate(1 / mean))
            METER.lengths[id, sample] = min(length, new)
        return Request([2] * prompt, n=samples, max_new_tokens=new, stop_ids=(STOP_ID,), id=id)

    grpo = [group(id, 512, 16, 1024, 400) for id in range(64)]
    small = [group(1000 + id, 400, 16, 256, 100) for id in range(64)]
    nano_vllm = []
    for id in range(2000, 2256):
        new = chance.randint(100, 1024)
        nano_vllm.append(group(id, chance.randint(100, 1024), 1, new, 10**6))
    return {"GRPO": (512, grpo), "nano-vllm": (512, nano_vllm), "135M": (256, small)}


def measure(name, slots, requests):
    """One line of the table -> row."""
    sampler = make_sampler(slots)
    seconds = []
    for _ in range(1 + ROUNDS):
        METER.stub_seconds = 0.0
        started = time.process_time()
        groups = sampler.generate(requests)
        seconds.append(time.process_time() - started - METER.stub_seconds)
    host = statistics.median(seconds[1:])

    METER.launches = METER.uploads = METER.waits = 0
    with CountReads(), CountOperations():
        counted = make_sampler(slots)
        counted.generate(requests)
        METER.counting = True
        counted.generate(requests)
        METER.counting = False

    finished = sum(len(group) for group in groups)
    loops = sampler.stats["steps"] // sampler.chunk
    row = {
        "workload": name,
        "slots": slots,
        "finished": finished,
        "steps": sampler.stats["steps"],
        "loops": loops,
        "launches": METER.launches,
        "uploads": METER.uploads,
        "waits": METER.waits,
        "host_s": round(host, 3),
        "us_per_loop": round(1e6 * host / loops),
        "us_per_row": round(1e6 * host / finished),
    }
    print(" ".join(f"{value:>11}" for value in row.values()), flush=True)
    return row


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="GRPO,nano-vllm,135M", help="comma-separated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sampler_file.Decoder = StubDecoder
    # CUDA's attention, as far as the host goes.
    model_file.NativeSegments = model_file.PaddedSegments = model_file.FlashSegments

    print(f"{device_name()}, torch {torch.__version__}")
    heading = ("workload", "slots", "finished", "steps", "loops", "launches", "uploads", "waits")
    heading += ("host s", "us/loop", "us/row")
    print(" ".join(f"{word:>11}" for word in heading))
    cases = workloads()
    rows = [measure(name, *cases[name]) for name in options.only.split(",")]
    print(json.dumps({"device": device_name(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
