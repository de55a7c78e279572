"""Adapters: only they train, the sampler sees them, and they travel as peft's files."""

import json

import torch
from safetensors.torch import load_file
from test_update import CONFIG, gradient, sequences

import model as model_file
from batches import make_optimizer, pack, take_step
from runtime import checkpoint, hugging_face, lora


def adapted(seed=1):
    model = model_file.random_model(CONFIG, seed, std=0.3)
    lora.attach(model, rank=4, alpha=8.0)
    return model


def step(model, optimizer, work):
    gradient(work, 10_000, model=model)
    return take_step(model, optimizer, 0.05, 0.0)


def hidden(model):
    batch = pack(sequences(3))
    return model.hidden(batch.tokens, batch.positions, batch.cu_seqlens).detach()


def test_only_adapters_train_and_a_fresh_one_changes_nothing():
    plain, model = model_file.random_model(CONFIG, 1, std=0.3), adapted()
    assert torch.equal(hidden(model), hidden(plain))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model)
    step(model, optimizer, sequences())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        f"layers.{i}.{m}.adapter.b" for i in range(2) for m in lora.MATRICES
    }  # A has no gradient while B is 0
    step(model, optimizer, sequences())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {
        f"layers.{i}.{m}.adapter.{x}" for i in range(2) for m in lora.MATRICES for x in "ab"
    }
    with lora.disabled(model) as base:
        assert torch.equal(hidden(base), hidden(plain))


def test_merged_weights_are_the_adapted_model_and_what_peft_means():
    """alpha / rank * B A, computed here from the saved peft files, part by part of each fused matrix."""
    model = adapted()
    optimizer = make_optimizer(model)
    for _ in range(3):
        step(model, optimizer, sequences())
    merged = model_file.Model(CONFIG)
    merged.load_state_dict(dict(lora.merged(model)))
    assert not torch.allclose(
        hidden(merged), hidden(model_file.random_model(CONFIG, 1, std=0.3)), atol=1e-2
    )
    torch.testing.assert_close(hidden(merged), hidden(model), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_holds_both_forms_and_resumes_exactly(tmp_path):
    model = adapted()
    optimizer = make_optimizer(model)
    step(model, optimizer, sequences())
    step(model, optimizer, sequences())
    checkpoint.save(tmp_path, 2, model, optimizer, {"updates": 2}, None, keep=1)
    folder = tmp_path / "step_2"
    peft, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    base, names = (
        model_file.random_model(CONFIG, 1, std=0.3),
        "base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight",
    )
    parts = [8.0 / 4 * peft[names.format(x, "B")] @ peft[names.format(x, "A")] for x in "qkv"]
    torch.testing.assert_close(
        hugging_face.load_model(folder).layers[1].qkv.weight,
        base.layers[1].qkv.weight + torch.cat(parts),
    )
    assert (
        config["r"] == 4
        and config["lora_alpha"] == 8.0
        and "gate_proj" in config["target_modules"]
        and len(peft) == 2 * 7 * 2
    )
    again = adapted()
    other = make_optimizer(again)
    checkpoint.restore(folder, again, other)
    for one, two in ((model, optimizer), (again, other)):
        step(one, two, sequences())
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
