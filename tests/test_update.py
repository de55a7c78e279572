"""The gradient does not depend on how the work is cut (DESIGN.md invariant 4)."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build
import grpo
import model as model_file
from batches import (
    Sequence,
    accumulate,
    learning_rate,
    make_optimizer,
    micro_batches,
    pack,
    score,
    take_step,
)
from kernels.logprob import fused_policy_loss, token_logprobs

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


def sequences(count=9):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 50, (n,), generator=generator).tolist()
    made = [
        Sequence(draw(1 + i % 4), draw(1 + (5 * i) % 7), None, (-1.0) ** i * (i + 1) / 5)
        for i in range(count)
    ]
    for q, weight in zip(made, grpo.token_weights("grpo", [len(q.tokens) for q in made], 8)):
        q.weight, q.logprobs = weight, [-3.0] * len(q.tokens)
    return made


def gradient(work, token_budget, checkpointing=False, model=None, fused=False, share_prompts=False):
    model = model or model_file.random_model(CONFIG, 1, std=0.3)
    model.gradient_checkpointing = checkpointing

    def fused_loss_of(batch):
        token_loss = lambda logprobs, entropy, rows: (
            batch.weights[rows] * grpo.policy_loss("grpo", logprobs, batch, 0.2, 0.28, rows)
        )
        head = lambda hidden, weight: fused_policy_loss(
            hidden[batch.predict], weight, batch.targets, token_loss
        )
        return model(batch.tokens, batch.positions, batch.cu_seqlens, batch.parents, head)[0], None

    def loss_of(batch):
        head = lambda hidden, weight: token_logprobs(hidden[batch.predict], weight, batch.targets)
        logprobs, _ = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.parents, head)
        return (batch.weights * grpo.policy_loss("grpo", logprobs, batch, 0.2, 0.28)).sum(), None

    accumulate(model, work, fused_loss_of if fused else loss_of, token_budget, "cpu", share_prompts)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "token_budget,checkpointing,fused",
    [(1, False, False), (25, False, False), (25, True, False), (25, False, True)],
)
def test_gradient_is_the_same_packed_alone_checkpointed_or_fused(
    token_budget, checkpointing, fused
):
    whole, cut = (
        gradient(sequences(), 10_000),
        gradient(sequences(), token_budget, checkpointing, fused=fused),
    )
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], atol=2e-6, rtol=1e-4)
    assert max(g.abs().max() for g in whole.values()) > 0.01


@pytest.mark.parametrize(
    "token_budget,checkpointing,fused",
    [(10_000, False, False), (30, False, True), (1, True, False)],
)
def test_gradient_is_the_same_when_a_prompt_is_computed_once_for_its_group(
    token_budget, checkpointing, fused
):
    work = sequences(12)
    for i, q in enumerate(work):
        q.prompt = work[i // 4 * 4 + 3].prompt  # three groups of four
    plain, shared = (
        gradient(work, 10_000),
        gradient(work, token_budget, checkpointing, fused=fused, share_prompts=True),
    )
    for name in plain:
        torch.testing.assert_close(shared[name], plain[name], atol=2e-6, rtol=1e-4)
    tokens = lambda share: sum(
        len(pack(g, share_prompts=share).tokens) for g in micro_batches(work, 10_000, share)
    )
    assert tokens(True) == tokens(False) - sum(3 * len(work[i].prompt) for i in (0, 4, 8))
    model = model_file.random_model(CONFIG, 1, std=0.3)
    for got, q in zip(score(model, work, 40, "cpu", share_prompts=True), work):
        assert got == pytest.approx(score(model, [q], 40, "cpu")[0], abs=1e-5)


def test_gradient_is_the_same_on_two_ranks_one_of_them_nearly_idle(tmp_path):
    """2 ranks with FSDP2 over gloo; rank 0 has one sequence, rank 1 eight in many micro-batches: nobody waits for ever.

    And with the mixed precision of GPUs a layer gets bf16 hidden states, but the rotary tables in fp32, as the sampler has them."""
    whole = gradient(sequences(), 10_000)
    torch.save(whole, tmp_path / "whole.pt")
    program = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
import model as model_file
from runtime import distributed
from test_update import CONFIG, gradient, pack, sequences
device = distributed.setup()
work = sequences()[:1] if distributed.rank() == 0 else sequences()[1:]
got = gradient(work, 12, model=distributed.shard(model_file.random_model(CONFIG, 1, std=0.3), device))
for name, expected in torch.load({str(tmp_path / "whole.pt")!r}).items():
    torch.testing.assert_close(distributed.full(got[name]), expected, atol=2e-6, rtol=1e-4)
mixed = distributed.shard(model_file.random_model(CONFIG, 1), device, distributed.MIXED)
mixed.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.extend(x.dtype for x in inputs if torch.is_tensor(x)))
seen, batch = [], pack(sequences()[:1])
mixed(batch.tokens, batch.positions, batch.cu_seqlens)
assert seen == [torch.bfloat16, torch.float32, torch.float32], seen
distributed.finish()
print("equal")
"""
    (tmp_path / "ranks.py").write_text(program)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(tmp_path / "ranks.py"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("equal") == 2, done.stderr[-2000:]


def test_micro_batches_keep_every_sequence_and_the_budget():
    work = sequences(20)
    groups = micro_batches(work, 25)
    assert sorted(id(q) for g in groups for q in g) == sorted(map(id, work))
    assert all(sum(map(len, g)) <= 25 or len(g) == 1 for g in groups)
    assert [len(g) for g in micro_batches(work, 1)] == [1] * 20


def test_step_is_skipped_when_the_gradient_is_not_finite():
    model = model_file.random_model(CONFIG)
    before = model.norm.detach().clone()
    optimizer = make_optimizer(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert not take_step(model, optimizer, 0.1, 1.0) < float("inf")
    assert torch.equal(model.norm, before)


def test_learning_rate_schedule():
    rates = [learning_rate(step, 100, 1.0, 10, "cosine") for step in (1, 10, 55, 100)]
    assert rates == pytest.approx([0.1, 1.0, 0.5, 0.0])
    assert (
        learning_rate(100, 100, 1.0, 10, "constant") == 1.0
        and learning_rate(55, 100, 1.0, 10, "linear") == 0.5
    )


@pytest.mark.parametrize(
    "settings,factor",
    [
        (dict(), None),
        (dict(old_logprobs="trainer"), 1.0),
        (dict(old_logprobs="trainer", tis=2.0), 2.0),
    ],
)
def test_old_logprobs_of_the_trainer_and_truncated_importance_weights(settings, factor):
    """A sampler that gives every token a third of its probability: the ratio 3 is clipped away, or 1 when the trainer's own log-probs are the old
    ones, and then an importance weight of min(3, 2) doubles the gradient. The gap to the sampler is reported all the same."""
    import train
    from settings import Settings

    def step(made, **more):
        model = model_file.random_model(CONFIG, 1, std=0.3)
        run = build.Run(
            Settings(max_norm=0.0, **more),
            "cpu",
            *[None] * 4,
            model,
            make_optimizer(model),
            *[None] * 4,
        )
        train.score_again(run, made)
        return train.update(run, 1, made)

    def work(shift):
        made = sequences()
        for q, logprobs in zip(
            made, score(model_file.random_model(CONFIG, 1, std=0.3), made, 30, "cpu")
        ):
            q.logprobs, q.advantage = [p - shift for p in logprobs], abs(q.advantage)
        return made

    exact, off = step(work(0.0)), step(work(math.log(3)), **settings)
    assert off["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(3), rel=1e-4)
    assert (
        exact["sampling/sampling_logp_difference/max"] < 1e-5
        and exact["clip_ratio/high_mean"] == 0.0
    )
    assert off["clip_ratio/high_mean"] == (1.0 if factor is None else 0.0)
    assert off["grad_norm"] == pytest.approx((factor or 0.0) * exact["grad_norm"], rel=1e-4)


def test_epochs_and_minibatches_keep_the_old_logprobs_of_the_rollout():
    """With two epochs of two halves there are four updates, each group in one half of each, and later updates see ratios far from 1."""
    import train
    from settings import Settings

    def run(**more):
        model, made = model_file.random_model(CONFIG, 1, std=0.3), sequences(8)
        for i, (q, logprobs) in enumerate(zip(made, score(model, made, 10_000, "cpu"))):
            q.logprobs, q.group = logprobs, i // 2
        before = [list(q.logprobs) for q in made]
        state = build.Run(
            Settings(lr=0.02, warmup=1, **more),
            "cpu",
            *[None] * 4,
            model,
            make_optimizer(model),
            *[None] * 4,
        )
        metrics = train.update(state, 1, made)
        assert [q.logprobs for q in made] == before
        return (
            state.updates,
            metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"],
            metrics["num_train_tokens"],
        )

    one, four = run(), run(epochs=2, minibatches=2)
    assert one[:2] == (1, 0.0) and four[0] == 4 and four[1] > 0.05
    assert four[2] == 2 * one[2]  # every sequence once per epoch


def test_packed_forward_equals_each_sequence_alone():
    model, work = model_file.random_model(CONFIG, 2, std=0.3), sequences(4)
    whole = pack(work)
    together = model(whole.tokens, whole.positions, whole.cu_seqlens)
    alone = [model(b.tokens, b.positions, b.cu_seqlens) for b in (pack([q]) for q in work)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
