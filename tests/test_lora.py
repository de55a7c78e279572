"""Adapters: only they train, the sampler sees them, and they travel as peft's files."""

import json

import torch
from safetensors.torch import load_file
from test_update import CONFIG, gradient, sequences

import model as model_file
from batches import make_optimizer, pack, take_step
from runtime import checkpoint, hugging_face, lora


def plain_model():
    return model_file.random_model(CONFIG, 1, std=0.3)


def adapted_model():
    model = plain_model()
    lora.attach(model, rank=4, alpha=8.0)
    return model


def train(model, optimizer, steps):
    for _ in range(steps):
        gradient(sequences(), 10_000, model=model)
        take_step(model, optimizer, 0.05, 0.0)


def hidden(model):
    batch = pack(sequences(3))
    return model.hidden(batch.tokens, batch.positions, batch.cu_seqlens).detach()


def adapter_names(matrices):
    """Parameters of the adapters of both layers; matrices: a, b or both."""
    names = set()
    for layer in range(2):
        for linear in lora.MATRICES:
            names |= {f"layers.{layer}.{linear}.adapter.{matrix}" for matrix in matrices}
    return names


def test_a_fresh_adapter_changes_nothing_and_only_adapters_train():
    plain = plain_model()
    model = adapted_model()
    assert torch.equal(hidden(model), hidden(plain))

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model)

    def changed():
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    train(model, optimizer, steps=1)
    assert changed() == adapter_names("b")  # A has no gradient while B is 0
    train(model, optimizer, steps=1)
    assert changed() == adapter_names("ab")
    with lora.disabled(model) as base:
        assert torch.equal(hidden(base), hidden(plain))


def test_merged_weights_are_the_adapted_model():
    model = adapted_model()
    train(model, make_optimizer(model), steps=3)
    merged = model_file.Model(CONFIG)
    merged.load_state_dict(dict(lora.merged(model)))
    assert not torch.allclose(hidden(merged), hidden(plain_model()), atol=1e-2)
    torch.testing.assert_close(hidden(merged), hidden(model), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_holds_both_forms_and_resumes_exactly(tmp_path):
    """The merged weights, and peft's files, whose update is alpha / rank * B A part by part."""
    model = adapted_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, steps=2)
    checkpoint.save(tmp_path, 2, model, optimizer, {"updates": 2}, None, keep=1)
    folder = tmp_path / "step_2"

    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 8.0
    assert "gate_proj" in config["target_modules"]

    matrices = load_file(folder / "adapter_model.safetensors")
    assert len(matrices) == 2 * 7 * 2  # layers, matrices of a layer, A and B
    parts = []
    for part in "qkv":
        prefix = f"base_model.model.model.layers.1.self_attn.{part}_proj"
        a, b = matrices[f"{prefix}.lora_A.weight"], matrices[f"{prefix}.lora_B.weight"]
        parts.append(8.0 / 4 * b @ a)
    expected = plain_model().layers[1].qkv.weight + torch.cat(parts)
    loaded = hugging_face.load_model(folder)
    torch.testing.assert_close(loaded.layers[1].qkv.weight, expected)

    again = adapted_model()
    other = make_optimizer(again)
    checkpoint.restore(folder, again, other)
    train(model, optimizer, steps=1)
    train(again, other, steps=1)
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
