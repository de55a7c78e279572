"""LoRA (arXiv 2106.09685): a low-rank update beside every linear layer of the decoder.

The base stays frozen. A fused matrix (q, k, v; gate, up) has one adapter per part, as Hugging
Face's peft has, so that adapters travel both ways.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model import CheckpointError
from runtime import distributed
from runtime.hugging_face import LAYER_NAMES, part_rows

MATRICES = ("qkv", "o", "gate_up", "down")


class Adapter(nn.Module):
    """x [T, in] -> [T, out]: alpha / rank * B_i (A_i x) for every part i of a fused matrix.

    a [parts * rank, in], b [out, rank]; B starts at 0. outputs: the rows of each part.
    """

    def __init__(self, inputs, outputs, rank, alpha, generator):
        super().__init__()
        self.outputs = outputs
        self.rank = rank
        self.scale = alpha / rank
        self.enabled = True
        bound = inputs**-0.5  # peft's kaiming_uniform(a=sqrt 5)
        a = torch.empty(len(outputs) * rank, inputs)
        self.a = nn.Parameter(a.uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(sum(outputs), rank))

    def forward(self, x):
        inner = (x @ self.a.T).split(self.rank, dim=1)
        parts = [h @ b.T for h, b in zip(inner, self.b.split(self.outputs))]
        return self.scale * torch.cat(parts, dim=1)


def attach(model, rank, alpha, seed=0):
    """Freeze the model and give every linear layer a fresh adapter, the same for the same seed.

    Before distributed.shard.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(model.layers):
        for name in MATRICES:
            linear = getattr(layer, name)
            rows, inputs = linear.weight.shape
            outputs = part_rows(model.config, f"layers.{i}.{name}.weight") or [rows]
            linear.adapter = Adapter(inputs, outputs, rank, alpha, generator)


def attached(model):
    """Whether the model has adapters: all of its linear layers have one, or none."""
    return model.layers[0].qkv.adapter is not None


@contextmanager
def disabled(model):
    """The frozen base inside the block: the reference model of a KL term, at no cost in memory."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield model
    finally:
        for adapter in adapters:
            adapter.enabled = True


def merged(model):
    """(name, whole tensor) of every parameter of the base, with the adapters added.

    This is what the sampler and a checkpoint need; without adapters it is simply the parameters.
    One tensor at a time; a collective.
    """
    adapters = {}
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            adapters[name] = module

    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            continue
        whole = distributed.full(parameter)
        adapter = adapters.get(name.removesuffix("weight") + "adapter")
        if adapter is not None:
            whole = whole + delta(distributed.full(adapter.a), distributed.full(adapter.b), adapter)
        yield name, whole


def delta(a, b, adapter):
    """The update [out, in] that an adapter with (whole) matrices a, b adds to its weight."""
    parts = zip(a.split(adapter.rank), b.split(adapter.outputs))
    return adapter.scale * torch.cat([b_i @ a_i for a_i, b_i in parts])


def tensors(model):
    """Adapter matrices under peft's names, whole, fp32, on the CPU; empty without adapters.

    A collective.
    """
    found = {}
    if not attached(model):
        return found
    for i, layer in enumerate(model.layers):
        for name in MATRICES:
            adapter = getattr(layer, name).adapter
            a = distributed.full(adapter.a).cpu().split(adapter.rank)
            b = distributed.full(adapter.b).cpu().split(adapter.outputs)
            for prefix, a_i, b_i in zip(_peft_names(i, name), a, b):
                found[f"{prefix}.lora_A.weight"] = a_i.contiguous()
                found[f"{prefix}.lora_B.weight"] = b_i.contiguous()
    return found


def _peft_names(layer, name):
    """What peft calls the parts of a fused matrix."""
    names = []
    for theirs in LAYER_NAMES[f"{name}.weight"]:
        names.append(f"base_model.model.model.layers.{layer}.{theirs.removesuffix('.weight')}")
    return names


def save(matrices, model, folder, base):
    """A folder of adapter_model.safetensors and adapter_config.json, which peft loads on `base`.

    Of its own: beside merged weights transformers would add the adapter a second time.
    base: hub id or absolute path of the model that the adapter was trained on.
    """
    targets = set()
    for name in MATRICES:
        for theirs in LAYER_NAMES[f"{name}.weight"]:
            targets.add(theirs.split(".")[-2])  # self_attn.q_proj.weight -> q_proj

    adapter = model.layers[0].qkv.adapter
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read(folder, model):
    """The adapters that save() or peft wrote, as {our parameter name: whole matrix}.

    CheckpointError when the model's have another rank.
    """
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    found = {}
    for i in range(len(model.layers)):
        for name in MATRICES:
            prefixes = _peft_names(i, name)
            for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
                parts = [saved[f"{prefix}.{theirs}.weight"] for prefix in prefixes]
                found[f"layers.{i}.{name}.adapter.{ours}"] = torch.cat(parts)

    rank = model.layers[0].qkv.adapter.rank
    saved_rank = found["layers.0.qkv.adapter.b"].shape[1]
    if saved_rank != rank:
        raise CheckpointError(
            f"{folder} holds an adapter of rank {saved_rank}, not {rank}: "
            f"resume with --lora_rank {saved_rank}"
        )
    return found
