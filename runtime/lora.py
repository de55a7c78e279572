"""LoRA (arXiv 2106.09685): a low-rank update beside every linear layer of the decoder; the base stays frozen.

A fused matrix (q, k, v; gate, up) has one adapter per part, as Hugging Face's peft has, so that adapters travel both ways.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runtime import distributed
from runtime.hugging_face import LAYER_NAMES, part_rows

MATRICES = ("qkv", "o", "gate_up", "down")


class Adapter(nn.Module):
    """x [T, in] -> [T, out]: alpha / rank * B_i (A_i x) for every part i of a fused matrix. a [parts * rank, in], b [out, rank]; B starts at 0."""

    def __init__(self, inputs, outputs, rank, alpha, generator):
        super().__init__()
        self.outputs, self.rank, self.scale, self.enabled = outputs, rank, alpha / rank, True
        bound = inputs**-0.5  # peft's kaiming_uniform(a=sqrt 5)
        self.a = nn.Parameter(
            torch.empty(len(outputs) * rank, inputs).uniform_(-bound, bound, generator=generator)
        )
        self.b = nn.Parameter(torch.zeros(sum(outputs), rank))

    def forward(self, x):
        inner = (x @ self.a.T).split(self.rank, dim=1)
        return self.scale * torch.cat(
            [h @ b.T for h, b in zip(inner, self.b.split(self.outputs))], dim=1
        )


def attach(model, rank, alpha, seed=0):
    """Freeze the model and give every linear layer a fresh adapter (the same for the same seed). Before distributed.shard."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(model.layers):
        for name in MATRICES:
            linear = getattr(layer, name)
            outputs = part_rows(model.config, f"layers.{i}.{name}.weight") or [
                linear.weight.shape[0]
            ]
            linear.adapter = Adapter(linear.weight.shape[1], outputs, rank, alpha, generator)


@contextmanager
def disabled(model):
    """The frozen base inside the block: the reference model of a KL term, at no cost in memory."""
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield model
    finally:
        for adapter in adapters:
            adapter.enabled = True


def delta(a, b, adapter):
    """The update [out, in] that an adapter with (whole) matrices a, b adds to its weight."""
    parts = zip(a.split(adapter.rank), b.split(adapter.outputs))
    return adapter.scale * torch.cat([b_i @ a_i for a_i, b_i in parts])


def merged(model):
    """(name, whole tensor) of every parameter of the base, with the adapters added: what the sampler and a checkpoint need. One tensor at a time; a
    collective. Without adapters these are simply the parameters."""
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            continue
        whole, adapter = (
            distributed.full(parameter),
            adapters.get(name.removesuffix("weight") + "adapter"),
        )
        if adapter is not None:
            whole = whole + delta(distributed.full(adapter.a), distributed.full(adapter.b), adapter)
        yield name, whole


def tensors(model):
    """Adapter matrices under peft's names, whole, fp32, on the CPU; empty without adapters. A collective."""
    found = {}
    for i, layer in enumerate(model.layers):
        for name in MATRICES:
            adapter = getattr(layer, name).adapter
            if adapter is not None:
                a, b = (
                    distributed.full(adapter.a).cpu().split(adapter.rank),
                    distributed.full(adapter.b).cpu().split(adapter.outputs),
                )
                for theirs, a_i, b_i in zip(LAYER_NAMES[f"{name}.weight"], a, b):
                    prefix = f"base_model.model.model.layers.{i}.{theirs.removesuffix('.weight')}"
                    found[f"{prefix}.lora_A.weight"], found[f"{prefix}.lora_B.weight"] = (
                        a_i.contiguous(),
                        b_i.contiguous(),
                    )
    return found


def save(matrices, model, folder, base):
    """adapter_model.safetensors and adapter_config.json, which peft loads on top of `base`."""
    adapter = model.layers[0].qkv.adapter
    targets = sorted(
        {name.split(".")[-2] for part in MATRICES for name in LAYER_NAMES[f"{part}.weight"]}
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
    }
    config |= {
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(matrices, Path(folder) / "adapter_model.safetensors")


def attached(model):
    return model.layers[0].qkv.adapter is not None


def read(folder, model):
    """The adapters that save() or peft wrote, as {our parameter name: whole matrix}; the model must have adapters of the same rank."""
    saved, found = load_file(Path(folder) / "adapter_model.safetensors"), {}
    for i in range(len(model.layers)):
        for name in MATRICES:
            prefixes = [
                f"base_model.model.model.layers.{i}.{t.removesuffix('.weight')}"
                for t in LAYER_NAMES[f"{name}.weight"]
            ]
            for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
                found[f"layers.{i}.{name}.adapter.{ours}"] = torch.cat(
                    [saved[f"{prefix}.{theirs}.weight"] for prefix in prefixes]
                )
    return found
