"""What must always hold of the sampler's state: it never moves, and nothing of it is given out early.

On CUDA's way with the torch references, and on the CPU's own; random models, to the last bit.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decode
from model import random_model
from pages import StalePageError
from sampler import Request, Sampler
from test_sampler import CONFIG, STOP_IDS, drawn, kernels_way, make_requests, sample


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return random_model(CONFIG, seed=1, std=0.15).requires_grad_(False)


def is_whole(sampler):
    """All slots and all pages are free, and no page has a version."""
    pool = sampler.pool
    runs = sorted(pool.free_runs) == list(range(pool.size.runs))
    pieces = len(set(pool.free_pieces)) == len(pool.free_pieces) == pool.size.pieces
    return runs and pieces and set(pool.version) == {None}


def addresses(sampler):
    rows = sampler.decoder.rows
    tensors = (rows.values, rows.out, rows.active, sampler.pool.kv)
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("slots", [1, 3, 0])
def test_samples_do_not_depend_on_slots_chunk_and_lag(model, slots, chunk, lag):
    """Groups of 4 are split over several admissions by 1 and by 3 slots."""
    requests = make_requests(new=20)
    sampler = Sampler(model, slots=slots)
    sampler.chunk, sampler.lag = chunk, lag
    assert sampler.generate(requests) == sample(model, requests)
    assert is_whole(sampler)


@pytest.mark.parametrize("way", ["cpu", "kernels"])
def test_what_is_expected_is_made_once(model, way):
    """The second call has the longest prompts, responses and stop ids; nothing is made anew.

    Without `expected` it is, and with it the graphs. Of the prompt of 64 tokens, 31 are copied
    from a page of 32 to a sample's own, which with 40 new ones need 3 pages; of the one of 89
    tokens, 24, which need 2.
    """
    first = make_requests(n=3, new=10, lengths=(1, 9, 20))
    second = make_requests(n=4, new=40, stop_ids=STOP_IDS + (1, 2), lengths=(89, 64, 88))
    largest = Request([0] * 89, n=4, max_new_tokens=40, stop_ids=STOP_IDS + (1, 2))
    made = {}
    for expected in ([largest] * 3, ()):
        options = {"slots": 12, "expected": expected}
        sampler = Sampler(model, **options) if way == "cpu" else kernels_way(model, **options)
        sampler.generate(first)
        before = addresses(sampler)
        groups = sampler.generate(second)
        assert is_whole(sampler)
        made[bool(expected)] = addresses(sampler) != before
        if way == "cpu":
            assert groups == sample(model, second)
    assert made == {True: False, False: True}


def test_prompts_wait_for_pages_of_others(model):
    """Made for four prompts and eight rows: a fifth prompt waits, eight are worth a new pool."""
    sampler = Sampler(model, slots=8)
    sampler.generate(make_requests(n=2, lengths=(90, 91, 92, 93)))
    assert sampler.pool.size.pieces == 4
    before = addresses(sampler)
    five = make_requests(n=1, lengths=(90, 80, 70, 60, 50))
    assert sampler.generate(five) == sample(model, five)
    assert addresses(sampler) == before and is_whole(sampler)

    eight = make_requests(n=1, lengths=(90, 80, 70, 60, 50, 40, 30, 20))
    assert sampler.generate(eight) == sample(model, eight)
    assert sampler.pool.size.pieces == 8 and is_whole(sampler)


def test_no_slot_is_given_out_before_its_outputs_are_copied(model, monkeypatch):
    """What a free slot holds is garbage from then on, on the device too, and nobody sees it."""
    requests = make_requests(new=20)
    expected = sample(model, requests)
    sampler = Sampler(model, slots=5)
    sampler.chunk, sampler.lag = 4, 1
    sampler.generate(requests)
    size, decoder = sampler.pool.size, sampler.decoder
    in_use = set()

    def take_run(version, take=sampler.pool.take_run):
        slot = take(version)
        in_use.add(slot)
        return slot

    def give_run(slot, give=sampler.pool.give_run):
        # Nobody that the device will still be asked to run has it.
        assert slot not in [row.slot for row in sampler.running]
        in_use.remove(slot)
        decoder.rows.out[slot] = 77
        sampler.pool.kv[:, :, slot * size.run_pages : (slot + 1) * size.run_pages] = np.nan
        give(slot)

    class LateFetch:
        """The device is behind: here when asked again, with the values of that time."""

        def __init__(self, *arguments):
            self.arguments = arguments
            self.asked = 0

        def is_here(self):
            self.asked += 1
            return self.asked == 3

        def wait(self):
            return outputs(*self.arguments).wait()

    outputs = decoder.outputs
    monkeypatch.setattr(sampler, "_reserve", lambda groups: sampler.pool.clear())
    monkeypatch.setattr(sampler.pool, "take_run", take_run)
    monkeypatch.setattr(sampler.pool, "give_run", give_run)
    monkeypatch.setattr(decoder, "outputs", LateFetch)
    short = [dataclasses.replace(request, n=3) for request in requests]
    groups = sampler.generate(short)
    assert drawn(groups) == [group[:3] for group in drawn(expected)]
    assert not in_use


@pytest.mark.parametrize("lag", [0, 1])
def test_new_weights_in_the_middle_are_refused_at_the_next_look(model, lag):
    sampler = kernels_way(model, slots=5)
    sampler.lag = lag
    steps = []

    def load(*_):
        sampler.load()
        steps.append(sampler.stats["steps"])

    with pytest.raises(StalePageError, match="weight version 0.*now version 1"):
        sampler.generate(make_requests(n=2), on_done=load)
    assert sampler.stats["steps"] == steps[0]
    sampler.generate(make_requests(n=2))
    assert is_whole(sampler)


class FakeGraph:
    """What Decoder._record gives, with a step for a replay."""

    def __init__(self, decoder, count, temperature):
        self.arguments = (decoder, count, temperature)

    def replay(self):
        decoder, count, temperature = self.arguments
        decoder.step(count, False, temperature)


def test_a_graph_is_recorded_once_for_each_number_of_rows(model, monkeypatch):
    """Also when the second call has longer prompts: 12 rows fill 16, then 8, 4, 2 or 1."""
    recorded = []
    buckets = set()

    def run(decoder, count, *arguments, run=decode.Decoder.run):
        buckets.add(count)
        return run(decoder, count, *arguments)

    def record(decoder, count, temperature):
        recorded.append(count)
        return FakeGraph(decoder, count, temperature)

    monkeypatch.setattr(decode, "can_record", lambda model: True)
    monkeypatch.setattr(decode.Decoder, "_record", record)
    monkeypatch.setattr(decode.Decoder, "run", run)
    largest = Request([0] * 90, n=4, max_new_tokens=40, stop_ids=STOP_IDS)
    sampler = kernels_way(model, slots=12, expected=[largest] * 3)
    for lengths in ((1, 9, 20), (90, 65, 88), (40, 50, 60)):
        sampler.generate(make_requests(lengths=lengths))
    assert sorted(recorded) == sorted(buckets) and len(buckets) > 2


def test_a_prefill_pass_has_many_prompts(model, monkeypatch):
    """48 prompts of one sample, 32 slots: at least 2 at a time while there are as many."""
    passes = []
    prefill = decode.Decoder.prefill

    def counted(decoder, prompts, pages):
        passes.append(len(prompts))
        return prefill(decoder, prompts, pages)

    monkeypatch.setattr(decode.Decoder, "prefill", counted)
    sampler = kernels_way(model, slots=32)
    sampler.generate(make_requests(n=1, lengths=(9,) * 48))
    assert sum(passes) == 48 and min(passes) >= 2


class CountOperations(TorchDispatchMode):
    """Operations that would be a launch on a GPU: no views, no memory."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        is_memory = function.overloadpacket.__name__ in ("empty", "empty_like", "new_empty")
        self.count += not function.is_view and not is_memory
        return function(*arguments, **(options or {}))


def test_a_step_has_five_launches_outside_its_layers(monkeypatch):
    """begin, embedding, last norm, draw, choose; kernels and torch operations both count."""
    pytest.importorskip("triton")
    from kernels import attention, head, layers, rows

    for module in (attention, layers, rows):
        monkeypatch.setattr(module, "use_triton", lambda x: True)
    monkeypatch.setattr(head, "fits", lambda hidden: True)
    kernel_class = type(head._stats_kernel)
    run = kernel_class.run
    counter = CountOperations()

    def counted(kernel, *arguments, **options):
        before = counter.count
        run(kernel, *arguments, **options)
        counter.count = before + 1  # not the interpreter's own

    monkeypatch.setattr(kernel_class, "run", counted)
    launches = []
    for count in (1, 2):
        config = dataclasses.replace(CONFIG, hidden_size=64, num_hidden_layers=count)
        sampler = kernels_way(random_model(config, seed=1).requires_grad_(False), slots=2)
        sampler.generate([Request([5, 6, 7], n=2, max_new_tokens=2)])
        counter.count = 0
        with torch.inference_mode(), counter:
            sampler.decoder.step(2, False)
        launches.append(counter.count)
    first, second = launches
    assert first - (second - first) == 5
