"""Adapters: only they train, the sampler sees them, and they travel as peft's files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model as model_file
from batches import make_optimizer, pack, take_step
from runs import SMALL, needs_prolog, whole_run
from runtime import checkpoint, hugging_face, lora
from test_update import CONFIG, gradient, sequences


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
    return model.hidden(batch.tokens, batch.positions, batch.segments).detach()


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
    base = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    checkpoint.save(tmp_path, 2, model, optimizer, {"updates": 2}, None, keep=1, base=base)
    folder = tmp_path / "step_2"
    assert checkpoint.damage(folder) == ""
    assert sorted(path.name for path in folder.glob("*adapter*")) == ["adapter"]

    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    assert config["r"] == 4
    assert config["lora_alpha"] == 8.0
    assert "gate_proj" in config["target_modules"]

    matrices = load_file(folder / "adapter/adapter_model.safetensors")
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


def trained_checkpoint(folder, **options):
    """step_1 of a LoRA run of one update; returns its folder and the adapted model."""
    model = adapted_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, steps=2)
    checkpoint.save(folder, 1, model, optimizer, {"updates": 2}, None, keep=1, **options)
    return folder / "step_1", model


def test_a_damaged_adapter_is_damage_of_its_checkpoint(tmp_path):
    folder, _ = trained_checkpoint(tmp_path)
    path = folder / "adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "adapter_model.safetensors is damaged" in checkpoint.damage(folder)


def test_an_older_checkpoint_with_the_adapter_beside_the_weights_resumes(tmp_path):
    folder, model = trained_checkpoint(tmp_path)
    for path in (folder / "adapter").iterdir():
        path.rename(folder / path.name)
    (folder / "adapter").rmdir()
    again = adapted_model()
    checkpoint.restore(folder, again, make_optimizer(again))
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name


def test_an_adapter_that_does_not_fit_is_one_sentence(tmp_path):
    folder, _ = trained_checkpoint(tmp_path)
    wider = plain_model()
    lora.attach(wider, rank=8, alpha=8.0)
    with pytest.raises(model_file.CheckpointError, match="rank 4, not 8: .*--lora_rank 4"):
        checkpoint.restore(folder, wider, make_optimizer(wider))

    shutil.rmtree(folder / "adapter")
    again = adapted_model()
    with pytest.raises(model_file.CheckpointError, match="has no adapter"):
        checkpoint.restore(folder, again, make_optimizer(again))


def logits(peer, tokens):
    with torch.no_grad():
        return peer(torch.tensor([tokens])).logits[0]


def test_transformers_and_peft_apply_an_adapter_once(tmp_path):
    """step_1 is the merged model, base + step_1/adapter the same one, under the base's own name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base_model = plain_model()
    hugging_face.save_model(
        dict(base_model.named_parameters()), CONFIG, tmp_path / "base", dtype=torch.float32
    )
    base = hugging_face.lasting_name(str(tmp_path / "base"), tmp_path / "base")
    folder, model = trained_checkpoint(tmp_path, base=base)

    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    positions, segments = torch.arange(8), model_file.make_segments([8])
    ours = model.hidden(torch.tensor(tokens), positions, segments).detach() @ model.head_weight.T
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    assert (logits(plain, tokens) - ours).abs().max() > 0.1
    torch.testing.assert_close(logits(merged, tokens), ours.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(adapted, tokens), ours.detach(), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_peft_is_read(tmp_path):
    """init_lora_weights=False: B is not zero, so that a mistake shows."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    weights = dict(plain_model().named_parameters())
    hugging_face.save_model(weights, CONFIG, tmp_path / "base", dtype=torch.float32)
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peer = peft.get_peft_model(plain, config).eval()
    peer.save_pretrained(tmp_path / "adapter")

    model = adapted_model()
    matrices = lora.read(tmp_path / "adapter", model)
    model.load_state_dict(matrices, strict=False)
    assert matrices.keys() == adapter_names("ab")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    segments = model_file.make_segments([8])
    ours = model.hidden(torch.tensor(tokens), torch.arange(8), segments) @ model.head_weight.T
    torch.testing.assert_close(logits(peer, tokens), ours.detach(), atol=1e-4, rtol=1e-4)


@needs_prolog
@pytest.mark.slow
def test_a_lora_run_of_train_is_one_model_in_both_forms(tmp_path):
    """The built-in model; its run's folder is what both forms are found by."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    run = whole_run(tmp_path, *SMALL, "--lora_rank", "4", "--lr", "0.01", name="lora")
    step = run / "checkpoints/step_4"
    config = json.loads((step / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "warm_start")
    assert json.loads((step / "generation_config.json").read_text())["eos_token_id"] == [2, 0]

    plain = transformers.AutoModelForCausalLM.from_pretrained(run / "warm_start").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(step).eval()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(step / "adapter").eval()
    tokens = [1, 300, 301, 2]
    assert (logits(merged, tokens) - logits(plain, tokens)).abs().max() > 0.1
    torch.testing.assert_close(
        logits(adapted, tokens), logits(merged, tokens), atol=1e-3, rtol=1e-4
    )


def test_the_base_is_named_so_that_others_find_it(tmp_path, monkeypatch):
    """A hub id as it is, not the folder of its cache; a folder by its absolute path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    cache = tmp_path / "cache/models--Qwen--Qwen2.5-Coder-0.5B/snapshots/1"
    hub_id = "Qwen/Qwen2.5-Coder-0.5B"
    assert hugging_face.lasting_name(hub_id, cache) == hub_id
    assert hugging_face.lasting_name("mine", Path("mine")) == str(tmp_path / "mine")
    assert hugging_face.lasting_name("tiny", Path("runs/a/warm_start")) == str(
        tmp_path / "runs/a/warm_start"
    )
