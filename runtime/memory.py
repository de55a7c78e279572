"""Memory plan of a run, per rank, before anything large is allocated.

An upper estimate from shapes alone: what FSDP2 shards is divided by the ranks, what every rank
holds is not. `python -m bench.memory` prints the tables of BENCHMARKS.md.
"""

import os
import time

import torch

from model import Config, Model
from runtime import distributed

GB = 1e9
# A100 and H100/H200: dense bf16 rates of their data sheets, for the MFU that people compare.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# hidden, intermediate, layers, heads, key-value heads, tied: config.json of Qwen2.5-Coder.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
}


def qwen(size):
    """Config of a Qwen2.5-Coder size."""
    hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[size]
    return Config.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": 151_936 if size in ("0.5B", "1.5B", "3B") else 152_064,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
        }
    )


def parameters(config):
    """(all parameters, those of one layer, those of the embedding and the head)."""
    with torch.device("meta"):
        model = Model(config)
    everything = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layers[0].parameters())
    return everything, layer, everything - layer * config.num_hidden_layers


def adapter_parameters(config, rank):
    """LoRA on q, k, v, o, gate, up, down: rank * (in + out) each."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    q_and_o = 2 * (hidden + heads)
    k_and_v = 2 * (hidden + kv_heads)
    mlp = 3 * (hidden + intermediate)
    return rank * config.num_hidden_layers * (q_and_o + k_and_v + mlp)


def layer_activations(config):
    """Values that one layer keeps per token for its backward pass."""
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    norms = 4 * config.hidden_size
    qkv = 2 * (heads + 2 * kv_heads)  # before and after the rotation
    mlp = 3 * config.intermediate_size  # gate, up, and what SwiGLU makes of them
    return norms + qkv + heads + mlp


def plan(config, settings, ranks, cuda):
    """{part: bytes on one rank} of a training step; the sampler's pages take what is left.

    fp32 masters, gradients and AdamW moments are sharded; compute copies, activations and the
    sampler's weights are not.
    cuda: 16-bit compute and sampler; else fp32, and one plain process samples with the trainer's
    own weights.
    """
    everything, layer, ends = parameters(config)
    lora = bool(settings.lora_rank)
    width = 2 if cuda else 4  # bytes of a compute value
    parts = {}

    # What is trained, sharded, in fp32.
    trained = adapter_parameters(config, settings.lora_rank) if lora else everything
    masters = everything + trained if lora else everything
    parts["masters"] = 4 * masters / ranks
    parts["gradients"] = 4 * trained / ranks
    parts["optimizer"] = 8 * trained / ranks

    # FSDP gathers two layers and the ends at a time in 16 bits, and holds their full gradients
    # before it reduces them in fp32.
    gathered = 2 * layer + ends
    if cuda:
        parts["gathered"] = (2 if lora else 8) * gathered
    else:
        parts["gathered"] = 8 * gathered if ranks > 1 else 0

    # A checkpointed layer keeps its input, and one at a time is computed again.
    if settings.gradient_checkpointing:
        kept = 2 * config.hidden_size * config.num_hidden_layers + layer_activations(config)
    else:
        kept = layer_activations(config) * config.num_hidden_layers
    # The torch references keep more than the kernels: 1.56 times (tests/test_plan.py).
    more = 1 if cuda else 1.6
    parts["activations"] = settings.token_budget * kept * width * more

    # The loss: one chunk of logits in fp32 and its gradient, and the head's gradient in fp32.
    chunk = 4096 * 151_936 if cuda else 1 << 24
    logits = min(settings.token_budget * config.vocab_size, chunk)
    parts["loss"] = logits * (4 + width) + 4 * config.vocab_size * config.hidden_size

    samples_in_place = not cuda and ranks == 1 and not lora
    parts["sampler"] = 0 if samples_in_place else width * everything
    if settings.kl_coef and not lora:
        parts["reference"] = width * everything / ranks
    return parts


def pages_needed(config, settings, width):
    """Bytes of keys and values of the longest rollout of one slot, `width` bytes a value.

    Below that nothing can be sampled.
    """
    layer_values = 2 * config.num_key_value_heads * config.head_dim
    token_bytes = width * config.num_hidden_layers * layer_values
    return token_bytes * (settings.max_prompt_tokens + settings.max_new_tokens)


def capacity(device):
    """Bytes that this rank may use: the GPU's, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine / distributed.local_world_size()


def check(config, settings, device, report):
    """Print the plan of this run, and refuse one that does not fit."""
    ranks = distributed.world_size()
    cuda = device.type == "cuda"
    parts = plan(config, settings, ranks, cuda)
    total = sum(parts.values())
    least = pages_needed(config, settings, 2 if cuda else 4)
    room = capacity(device)

    text = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    report(
        f"memory per rank, GB: {text}; in all {total / GB:.1f} of {room / GB:.0f}, "
        f"and at least {least / GB:.2f} for keys and values"
    )
    if total + least > 0.95 * room:
        raise SystemExit(
            f"this run needs {(total + least) / GB:.1f} GB on each rank and {room / GB:.0f} are "
            f"there: {advice(parts, settings, ranks)}"
        )


def advice(parts, settings, ranks):
    """What to change, the largest saving first."""
    sharded = parts["masters"] + parts["gradients"] + parts["optimizer"]
    ways = [
        (sharded / 2, f"use more than {ranks} ranks"),
        (parts["activations"] / 2, f"halve --token_budget ({settings.token_budget})"),
    ]
    if not settings.gradient_checkpointing:
        ways.append((parts["activations"] * 0.8, "set --gradient_checkpointing true"))
    if not settings.lora_rank:
        ways.append((parts["gradients"] + parts["optimizer"], "set --lora_rank 32"))
    return "; or ".join(text for _, text in sorted(ways, reverse=True))


def peak_flops(device):
    """Matrix rate for MFU, flop/s.

    The data sheet's for a known GPU, else measured once (fp32 on CPU, bf16 on CUDA).
    """
    cuda = device.type == "cuda"
    if cuda:
        for name, rate in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return rate

    size, dtype = (8192, torch.bfloat16) if cuda else (768, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.matmul(a, a)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
