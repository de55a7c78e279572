"""The memory plan counts what is there, and refuses what does not fit before anything is loaded."""

import pytest
import torch

import model as model_file
from runtime import lora, memory
from settings import Settings
from test_update import CONFIG


def test_parameters_are_those_of_the_model_and_its_adapters():
    model = model_file.random_model(CONFIG)
    everything, layer, ends = memory.parameters(CONFIG)
    assert everything == sum(p.numel() for p in model.parameters())
    assert everything == 2 * layer + ends

    lora.attach(model, 8, 8.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.adapter_parameters(CONFIG, 8) == trained


# Billions of parameters that Qwen2.5-Coder's model cards say.
@pytest.mark.parametrize(
    "size, published", [("0.5B", 0.49), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.62)]
)
def test_parameters_are_the_published_ones(size, published):
    everything, _, _ = memory.parameters(memory.qwen(size))
    assert round(everything / 1e9, 2) == published


def test_activation_estimate_bounds_what_a_step_keeps():
    """Bytes saved for the backward pass, counted by autograd's own hooks on CPU."""
    model = model_file.random_model(CONFIG)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def save(x):
        if x.data_ptr() not in parameters and x.is_floating_point():
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.arange(40)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model.hidden(tokens, tokens, torch.tensor([0, 40], dtype=torch.int32))
    longest = dict(max_prompt_tokens=30, max_new_tokens=10)
    settings = Settings(token_budget=40, gradient_checkpointing=False, **longest)
    planned = memory.plan(CONFIG, settings, ranks=1, cuda=False)["activations"]
    assert 0.8 * planned < sum(kept.values()) < 1.05 * planned


def gigabytes(size, ranks, **changes):
    """The plan of a run on GPUs."""
    settings = Settings(**{"token_budget": 16384, "max_new_tokens": 1024} | changes)
    parts = memory.plan(memory.qwen(size), settings, ranks, cuda=True)
    return sum(parts.values()) / 1e9


def test_what_fits_an_80_gb_card():
    assert gigabytes("3B", ranks=1) < 80
    assert gigabytes("7B", ranks=1) > 80
    assert gigabytes("7B", ranks=8) < 80
    assert gigabytes("7B", ranks=1, lora_rank=32) < 80


def test_a_plan_that_does_not_fit_is_refused_with_what_to_change(capsys):
    with pytest.raises(SystemExit, match="use more than 1 ranks"):
        memory.check(memory.qwen("32B"), Settings(), torch.device("cpu"), print)
    assert "memory per rank" in capsys.readouterr().out
