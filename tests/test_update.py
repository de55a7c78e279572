"""The gradient does not depend on how the work is cut."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode

import build
import grpo
import model as model_file
import train
from batches import (
    Sequence,
    backward,
    learning_rate,
    make_optimizer,
    micro_batches,
    pack,
    packed_batches,
    score,
    take_step,
)
from kernels import native
from runtime import checkpoint, distributed
from sampler import Request, Sampler
from settings import Settings

CONFIG = model_file.Config.from_dict(
    dict(
        model_type="qwen2",
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
)
# As wide as the kernels on a GPU want it.
WIDE = replace(CONFIG, hidden_size=128, num_attention_heads=4, head_dim=64)


def sequences(count=9):
    """Sequences of uneven lengths with advantages of both signs and weights of the grpo loss."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return torch.randint(0, 50, (length,), generator=generator).tolist()

    made = []
    for i in range(count):
        prompt = tokens(1 + i % 4)
        completion = tokens(1 + (5 * i) % 7)
        advantage = (-1.0) ** i * (i + 1) / 5
        made.append(Sequence(prompt, completion, [-3.0] * len(completion), advantage))
    weights = grpo.token_weights("grpo", [len(sequence.tokens) for sequence in made], 8)
    for sequence, weight in zip(made, weights):
        sequence.weight = weight
    return made


def gradient(work, token_budget, checkpointing=False, model=None, share_prompts=False):
    """{name: gradient} of the loss that training has."""
    model = model or model_file.random_model(CONFIG, 1, std=0.3)
    model.gradient_checkpointing = checkpointing
    parts = micro_batches(work, token_budget, share_prompts)
    for batch in packed_batches(parts, "cpu", share_prompts):
        loss, _ = grpo.policy_loss(model, batch, Settings(loss="grpo"))
        backward(loss)
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, theirs):
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("token_budget,checkpointing", [(1, False), (25, False), (25, True)])
def test_gradient_is_the_same_packed_alone_and_checkpointed(token_budget, checkpointing):
    whole = gradient(sequences(), 10_000)
    assert_same(gradient(sequences(), token_budget, checkpointing), whole)
    assert max(g.abs().max() for g in whole.values()) > 0.01


@pytest.mark.parametrize("token_budget,checkpointing", [(10_000, False), (30, False), (1, True)])
def test_gradient_is_the_same_when_a_prompt_is_computed_once_for_its_group(
    token_budget, checkpointing
):
    work = in_three_groups()
    shared = gradient(work, token_budget, checkpointing, share_prompts=True)
    assert_same(shared, gradient(work, 10_000))


@pytest.mark.parametrize("token_budget,checkpointing", [(10_000, False), (30, True)])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_gradient_is_the_same_in_c_and_in_torch(
    monkeypatch, token_budget, checkpointing, share_prompts
):
    """Of a model as wide as the kernels of a CPU want it."""

    def found():
        model = model_file.random_model(WIDE, 1, std=0.1)
        return gradient(in_three_groups(), token_budget, checkpointing, model, share_prompts)

    in_c = found()
    monkeypatch.setattr(native, "library", lambda target: None)
    in_torch = found()
    assert_same(in_c, in_torch)
    assert max(g.abs().max() for g in in_c.values()) > 0.01


@pytest.mark.parametrize("share_prompts", [False, True])
def test_gradient_is_the_same_when_prompts_and_completions_are_one_call(monkeypatch, share_prompts):
    """What runs on CUDA, with torch's varlen_attn said in a few lines: test it there too."""
    calls = []

    def varlen_attn(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size, enable_gqa):
        """The queries of a segment are the last ones of its keys."""
        queries, keys = ends_q.diff().tolist(), ends_k.diff().tolist()
        assert (longest_q, longest_k) == (max(queries), max(keys))
        assert (len(q), len(k), window_size) == (sum(queries), sum(keys), (-1, 0))
        calls.append(len(queries))
        mixed = []
        for one_q, one_k, one_v in zip(q.split(queries), k.split(keys), v.split(keys)):
            mask = torch.ones(len(one_q), len(one_k)).tril(len(one_k) - len(one_q)).bool()
            parts = [x.transpose(0, 1) for x in (one_q, one_k, one_v)]
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=enable_gqa)
            mixed.append(out.transpose(0, 1))
        return torch.cat(mixed)

    def found(**options):  # float64: nothing but the cut differs
        model = model_file.random_model(CONFIG, 1, torch.float64, std=0.3)
        return gradient(in_three_groups(), 10_000, model=model, **options)

    expected = found()
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(model_file, "PaddedSegments", model_file.FlashSegments)
    assert_same(found(share_prompts=share_prompts), expected)
    segments = 3 + 12 if share_prompts else 12
    assert calls == [segments] * CONFIG.num_hidden_layers


def in_three_groups():
    """Twelve sequences of three prompts."""
    work = sequences(12)
    for i, sequence in enumerate(work):
        sequence.prompt = work[i // 4 * 4 + 3].prompt
    return work


def test_a_shared_prompt_is_computed_once_and_scores_are_those_of_each_sequence_alone():
    work = in_three_groups()

    def tokens(share):
        parts = micro_batches(work, 10_000, share)
        return sum(len(pack(part, share).tokens) for part in parts)

    assert tokens(True) == tokens(False) - sum(3 * len(work[i].prompt) for i in (0, 4, 8))
    model = model_file.random_model(CONFIG, 1, std=0.3)
    for found, sequence in zip(score(model, work, 40, "cpu", share_prompts=True), work):
        (alone,) = score(model, [sequence], 40, "cpu")
        assert found == pytest.approx(alone, abs=1e-5)


@pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="NCCL wants a card for each rank")
def test_gradient_is_the_same_on_two_ranks_one_of_them_nearly_idle(tmp_path):
    """2 ranks with FSDP2; rank 0 has one sequence, rank 1 eight in many micro-batches: nobody waits.

    And with the mixed precision of GPUs a layer gets bf16 hidden states, but the rotary tables in
    fp32, as the sampler has them.
    """
    whole = gradient(sequences(), 10_000)
    torch.save(whole, tmp_path / "whole.pt")
    here = Path(__file__).parent
    program = f"""
import sys, torch
sys.path[:0] = {[str(here), str(here.parent)]!r}
import model as model_file
from runtime import distributed
from test_update import CONFIG, gradient, pack, sequences

device = distributed.setup()
work = sequences()[:1] if distributed.rank() == 0 else sequences()[1:]
model = distributed.shard(model_file.random_model(CONFIG, 1, std=0.3), device)
got = gradient(work, 12, model=model)
for name, expected in torch.load({str(tmp_path / "whole.pt")!r}).items():
    torch.testing.assert_close(distributed.full(got[name]), expected, atol=2e-6, rtol=1e-4)

mixed = distributed.shard(model_file.random_model(CONFIG, 1), device, distributed.MIXED)
seen = []
def look(layer, inputs):
    seen.extend(x.dtype for x in inputs if torch.is_tensor(x))
mixed.layers[0].register_forward_pre_hook(look)
mixed(pack(sequences()[:1]).to(device))
assert seen == [torch.bfloat16, torch.float32, torch.float32], seen
distributed.finish()
print("equal")
"""
    (tmp_path / "ranks.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "ranks.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.stdout.count("equal") == 2, done.stderr[-2000:]


def test_masters_on_one_gpu_are_fsdps_arithmetic_to_the_last_bit(tmp_path):
    """bf16 compute and fp32 gradients of two steps of several micro-batches: the same masters.

    One rank of FSDP2 with the mixed precision of GPUs in a process of its own, which says them.
    """
    here = Path(__file__).parent
    program = f"""
import sys, torch
sys.path[:0] = {[str(here), str(here.parent)]!r}
from runtime import distributed
from test_update import stepped

device = distributed.setup()
model = stepped(lambda model: distributed.shard(model, device, distributed.MIXED))
found = {{name: distributed.full(p) for name, p in model.named_parameters()}}
torch.save(found, {str(tmp_path / "fsdp.pt")!r})
distributed.finish()
"""
    (tmp_path / "rank.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*torchrun, str(tmp_path / "rank.py")], check=True, timeout=120, env=environment)

    def with_masters(model):
        distributed.add_masters(model, torch.bfloat16)
        return model

    model = stepped(with_masters)
    start = dict(model_file.random_model(CONFIG, 1, std=0.3).named_parameters())
    for name, expected in torch.load(tmp_path / "fsdp.pt").items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter.master, expected), name
        assert not torch.equal(expected, start[name])
        # What the sampler reads.
        assert torch.equal(parameter, expected.bfloat16())


def stepped(prepare):
    """A model after two steps of training, as `prepare` holds its weights."""
    model = prepare(model_file.random_model(CONFIG, 1, std=0.3))
    optimizer = make_optimizer(model)
    for _ in range(2):
        gradient(sequences(), 12, model=model)
        take_step(model, optimizer, 0.01, 1.0)
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_process_samples_with_the_weights_that_it_trains(device):
    """After an update the run's sampler draws what a new one of the same model draws."""
    model = model_file.random_model(WIDE, 1, std=0.3)
    run = run_of(distributed.shard(model, torch.device(device)), lr=0.1, warmup=1)
    run.device = torch.device(device)
    run.sampler = Sampler(run.model, slots=2)
    requests = [Request([1, 2, 3], n=2, max_new_tokens=8)]

    def drawn(sampler):
        (group,) = sampler.generate(requests)
        return [(completion.tokens, completion.logprobs) for completion in group]

    before = drawn(run.sampler)
    train.update(run, 1, sequences())
    train.refresh_sampler(run)
    after = drawn(run.sampler)
    assert after == drawn(Sampler(run.model, slots=2)) != before
    if device == "cuda":
        assert model.norm.dtype == torch.bfloat16
        assert distributed.full(model.norm).dtype == torch.float32


def test_a_frozen_weight_that_16_bits_hold_has_no_master():
    """4 bytes of every weight of a base under adapters; one that they do not hold has."""
    model = model_file.random_model(CONFIG, 1, std=0.3)
    model.requires_grad_(False)
    with torch.no_grad():
        model.norm.fill_(1 + 2**-7)  # bf16: 8 bits
        model.layers[0].post_norm.fill_(1 + 2**-8)
    distributed.add_masters(model, torch.bfloat16)
    assert distributed.master(model.norm) is model.norm
    kept = distributed.full(model.layers[0].post_norm)
    assert torch.equal(kept, torch.full_like(kept, 1 + 2**-8))
    assert torch.equal(distributed.full(model.norm).float(), torch.full((48,), 1 + 2**-7))


def test_a_checkpoint_keeps_masters_and_restores_what_they_compute(tmp_path):
    """Not the rounded weights: after it a step moves by less than bf16 could hold."""

    def fresh():
        model = model_file.random_model(CONFIG, 1, std=0.3)
        distributed.add_masters(model, torch.bfloat16)
        return model, make_optimizer(model)

    model, optimizer = fresh()
    gradient(sequences(), 12, model=model)
    take_step(model, optimizer, 0.01, 1.0)
    checkpoint.save(tmp_path, 1, model, optimizer, {"updates": 1}, None, keep=1)

    other, its_optimizer = fresh()
    checkpoint.restore(tmp_path / "step_1", other, its_optimizer)
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours.master, theirs.master)
        assert torch.equal(ours, theirs)
    for one, its in ((model, optimizer), (other, its_optimizer)):
        gradient(sequences(), 12, model=one)
        take_step(one, its, 1e-5, 1.0)
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours.master, theirs.master)


def test_micro_batches_keep_every_sequence_and_the_budget():
    work = sequences(20)
    parts = micro_batches(work, 25)
    assert sorted(id(x) for part in parts for x in part) == sorted(map(id, work))
    assert all(sum(map(len, part)) <= 25 or len(part) == 1 for part in parts)
    assert [len(part) for part in micro_batches(work, 1)] == [1] * 20


def test_step_is_skipped_when_the_gradient_is_not_finite():
    model = model_file.random_model(CONFIG)
    before = model.norm.detach().clone()
    optimizer = make_optimizer(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert math.isnan(take_step(model, optimizer, 0.1, 1.0))
    assert torch.equal(model.norm, before)


def test_learning_rate_schedule():
    rates = [learning_rate(step, 99, 1.0, 10, "cosine") for step in (1, 10, 55)]
    assert rates == pytest.approx([0.1, 1.0, 0.5])
    assert learning_rate(99, 99, 1.0, 10, "constant") == 1.0
    assert learning_rate(55, 99, 1.0, 10, "linear") == 0.5


@pytest.mark.parametrize("schedule,last", [("linear", 0.25), ("cosine", 0.1464), ("constant", 1)])
def test_the_last_step_learns_too(schedule, last):
    """Steps 1 to 4 and 0 at step 5: 0.75, 0.5, 0.25, of which the last was 0: a rollout for nothing.

    Cosine: (1 + cos(3/4 pi)) / 2 = 0.1464.
    """
    rates = [learning_rate(step, 4, 1.0, 1, schedule) for step in (1, 2, 3, 4)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(last, abs=1e-4)
    assert learning_rate(3, 3, 1.0, 3, schedule) == 1.0  # all of it warm-up


# ---- the host never waits ----


class Reads(TorchFunctionMode):
    """Notes what asks a tensor for its value: on a GPU each of these waits for all that runs."""

    names = (
        "tolist item numpy cpu nonzero __float__ __int__ __bool__ __index__ __contains__".split()
    )
    # Their result has a length that only the device knows.
    names += "unique masked_select repeat_interleave equal argwhere".split()

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        has_length = "output_size" in (kwargs or {})
        if name in self.names and not has_length:
            self.events.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("share_prompts", [False, True])
def test_nothing_is_read_from_the_device_before_the_end_of_an_update(monkeypatch, share_prompts):
    """Two updates of two micro-batches: one number each, the gradient's norm, and all sums at the
    end of the step. With old log-probs of the trainer one more read, before the first update."""
    events = []

    def noted(loss):
        backward(loss)
        events.append("backward")

    monkeypatch.setattr(train, "backward", noted)
    work = in_three_groups()[:8]
    for i, sequence in enumerate(work):
        sequence.group = i // 4
    settings = dict(minibatches=2, token_budget=16, old_logprobs="trainer", kl_coef=0.01)
    run = run_of(model_file.random_model(CONFIG, 1, std=0.3), **settings)
    run.settings.share_prompts = share_prompts
    run.reference = model_file.random_model(CONFIG, 2, std=0.3)
    with Reads(events):
        train.score_again(run, work)
        train.update(run, 1, work)

    assert events[:2] == ["tolist", "tolist"]  # the trainer's and the reference's log-probs
    updates = [event for event in events[2:] if event != "backward"]
    assert updates == ["__float__", "__float__", "tolist"]
    assert events[-2:] == ["__float__", "tolist"]
    assert events.count("backward") >= 4


@pytest.mark.gpu
def test_a_gradient_on_a_gpu_never_waits():
    """CUDA itself raises where a call waits for the device."""
    model = model_file.random_model(WIDE, 1, dtype=torch.bfloat16).cuda()
    work = in_three_groups()

    def add_gradient():
        parts = micro_batches(work, 30, True)
        for batch in packed_batches(parts, "cuda", True):
            loss, _ = grpo.policy_loss(model, batch, Settings(loss="grpo"))
            backward(loss)

    add_gradient()  # kernels compile, libraries allocate
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- all updates of a rollout ----


def run_of(model, **settings):
    """The parts of a run that an update needs."""
    parts = dict.fromkeys(
        "folder language tokenizer tokenizer_folder sampler judge curriculum held_out".split()
    )
    return build.Run(
        settings=Settings(**settings),
        device="cpu",
        model=model,
        optimizer=make_optimizer(model),
        **parts,
    )


@pytest.mark.parametrize(
    "settings,factor",
    [
        (dict(), 0.0),  # the ratio 3 is clipped away
        (dict(old_logprobs="trainer"), 1.0),  # the ratio is 1
        (dict(old_logprobs="trainer", tis=2.0), 2.0),  # and weighted with min(3, 2)
    ],
)
def test_old_logprobs_of_the_trainer_and_truncated_importance_weights(settings, factor):
    """A sampler that gives every token a third of its probability; its gap is always reported."""

    def metrics_of(shift, **settings):
        model = model_file.random_model(CONFIG, 1, std=0.3)
        work = sequences()
        for sequence, logprobs in zip(work, score(model, work, 30, "cpu")):
            sequence.logprobs = [p - shift for p in logprobs]
            sequence.advantage = abs(sequence.advantage)
        run = run_of(model, max_norm=0.0, **settings)
        train.score_again(run, work)
        return train.update(run, 1, work)

    exact = metrics_of(0.0)
    assert exact["sampling/sampling_logp_difference/max"] < 1e-5
    assert exact["clip_ratio/high_mean"] == 0.0
    off = metrics_of(math.log(3), **settings)
    assert off["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(3), rel=1e-4)
    assert off["clip_ratio/high_mean"] == (1.0 if factor == 0 else 0.0)
    assert off["grad_norm"] == pytest.approx(factor * exact["grad_norm"], rel=1e-4)


def test_the_trainers_logprobs_are_of_the_sampling_temperature():
    """log softmax(logits / 0.5): in score() and in the loss, so that the ratio to the sampler is 1."""
    model, work = model_file.random_model(CONFIG, 1, std=0.3), sequences()
    first = work[0]
    batch = pack([first])
    hidden = model.hidden(batch.tokens, batch.positions, batch.segments)[batch.predict]
    logprobs = (hidden @ model.head_weight.T / 0.5).log_softmax(-1)
    expected = logprobs.gather(1, batch.targets[:, None]).squeeze(1).tolist()
    scored = score(model, work, 10_000, "cpu", temperature=0.5)
    assert scored[0] == pytest.approx(expected, abs=1e-5)

    for sequence, row in zip(work, scored):
        sequence.logprobs = row
    run = run_of(model, temperature=0.5, old_logprobs="trainer")
    train.score_again(run, work)
    metrics = train.update(run, 1, work)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.0


def test_epochs_and_minibatches_keep_the_old_logprobs_of_the_rollout():
    """Two epochs of two halves: four updates, each group in one half, later ratios far from 1."""

    def trained(**settings):
        model = model_file.random_model(CONFIG, 1, std=0.3)
        work = sequences(8)
        for i, logprobs in enumerate(score(model, work, 10_000, "cpu")):
            work[i].logprobs = logprobs
            work[i].group = i // 2
        before = [list(sequence.logprobs) for sequence in work]
        run = run_of(model, lr=0.02, warmup=1, **settings)
        metrics = train.update(run, 1, work)
        assert [sequence.logprobs for sequence in work] == before
        clipped = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        return run.updates, clipped, metrics["num_train_tokens"]

    updates, clipped, tokens = trained()
    assert (updates, clipped) == (1, 0.0)
    updates, clipped, more_tokens = trained(epochs=2, minibatches=2)
    assert updates == 4
    assert clipped > 0.05
    assert more_tokens == 2 * tokens  # every sequence once per epoch


def test_a_skipped_update_is_counted_and_said_and_three_steps_of_them_end_the_run():
    model = model_file.random_model(CONFIG, 1, std=0.3)
    with torch.no_grad():
        model.norm[0] = float("nan")
    before = model.embed.weight.detach().clone()
    metrics = train.update(run_of(model), 1, sequences())
    assert metrics["skipped_updates"] == 1.0
    assert torch.equal(model.embed.weight, before)

    said = []
    train.say_skipped(1, metrics, 1, said.append)
    train.say_skipped(2, metrics, 2, said.append)
    assert "step 2: 1 updates skipped" in said[1]
    with pytest.raises(ValueError, match="3 steps in a row"):
        train.say_skipped(3, metrics, 3, said.append)


def test_minibatches_never_cut_a_group(monkeypatch):
    """Four groups of two in two minibatches: groups 0 and 2, then 1 and 3, whatever the lengths."""
    work = sequences(8)
    for i, sequence in enumerate(work):
        sequence.group = i // 2
    updates = []

    def recorded(part, *how):
        updates.append(sorted(sequence.group for sequence in part))
        return micro_batches(part, *how)

    monkeypatch.setattr(train, "micro_batches", recorded)
    run = run_of(model_file.random_model(CONFIG, 1, std=0.3), minibatches=2)
    train.update(run, 1, work)
    assert updates == [[0, 0, 2, 2], [1, 1, 3, 3]]


def test_packed_forward_equals_each_sequence_alone():
    model, work = model_file.random_model(CONFIG, 2, std=0.3), sequences(4)
    together, _ = model(pack(work))
    alone = [model(pack([sequence]))[0] for sequence in work]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
