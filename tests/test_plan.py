"""The memory plan counts what is there, and refuses what does not fit before anything is loaded."""

import pytest
import torch
from test_update import CONFIG

import model as model_file
from runtime import lora, memory
from settings import Settings


def test_parameters_are_those_of_the_model_and_its_adapters():
    model = model_file.random_model(CONFIG)
    everything, layer, ends = memory.parameters(CONFIG)
    assert everything == sum(p.numel() for p in model.parameters()) == 2 * layer + ends
    lora.attach(model, 8, 8.0)
    assert memory.adapter_parameters(CONFIG, 8) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    # Qwen2.5-Coder's published sizes
    assert [
        round(memory.parameters(memory.qwen(size))[0] / 1e9, 2)
        for size in ("0.5B", "1.5B", "3B", "7B")
    ] == [0.49, 1.54, 3.09, 7.62]


def test_activation_estimate_bounds_what_a_step_keeps():
    """Bytes saved for the backward pass, counted by autograd's own hooks on CPU."""
    model, kept = model_file.random_model(CONFIG), {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def save(x):
        if x.data_ptr() not in parameters and x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = torch.arange(40) % 50
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model.hidden(tokens, torch.arange(40), torch.tensor([0, 40], dtype=torch.int32))
    planned = memory.plan(
        CONFIG, Settings(token_budget=40, gradient_checkpointing=False), 1, cuda=False
    )["activations"]
    assert 0.8 * planned < sum(kept.values()) < 1.05 * planned


def test_a_plan_that_does_not_fit_is_refused_with_what_to_change(capsys):
    s = Settings(token_budget=16384, max_new_tokens=1024)
    seven = memory.plan(memory.qwen("7B"), s, 1, cuda=True)
    assert (
        sum(seven.values()) > 80e9 > sum(memory.plan(memory.qwen("7B"), s, 8, cuda=True).values())
    )
    assert sum(memory.plan(memory.qwen("3B"), s, 1, cuda=True).values()) < 80e9
    assert sum(memory.plan(memory.qwen("7B"), Settings(lora_rank=32), 1, cuda=True).values()) < 80e9
    with pytest.raises(SystemExit, match="use more than 1 ranks"):
        memory.check(memory.qwen("32B"), s, torch.device("cpu"), print)
    assert "memory per rank" in capsys.readouterr().out
