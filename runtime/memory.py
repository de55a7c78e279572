"""Memory plan of a run, per rank, before anything large is allocated; `python -m runtime.memory` prints the table of the README.

An upper estimate from shapes alone: what FSDP2 shards is divided by the ranks, what every rank holds is not.
"""

import os

import torch

from model import Config, Model
from runtime import distributed

GB = 1e9
# A100 and H100/H200: dense bf16 rates of their data sheets, for the MFU that people compare.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, tied: config.json of Qwen2.5-Coder
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
}


def qwen(size):
    """Config of a Qwen2.5-Coder size."""
    hidden, intermediate, layers, heads, kv, tied = SHAPES[size]
    vocabulary = 151_936 if size in ("0.5B", "1.5B", "3B") else 152_064
    shapes = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
    )
    return Config.from_dict(
        {
            "model_type": "qwen2",
            **shapes,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "tie_word_embeddings": tied,
        }
    )


def parameters(config):
    """(all parameters, those of one layer, those of the embedding and the head)."""
    with torch.device("meta"):
        model = Model(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    everything, layer = count(model), count(model.layers[0])
    return everything, layer, everything - layer * config.num_hidden_layers


def adapter_parameters(config, rank):
    """LoRA on q, k, v, o, gate, up, down: rank * (in + out) each."""
    c, kv, heads = (
        config,
        config.num_key_value_heads * config.head_dim,
        config.num_attention_heads * config.head_dim,
    )
    sizes = [
        (c.hidden_size, heads),
        *[(c.hidden_size, kv)] * 2,
        (heads, c.hidden_size),
        *[(c.hidden_size, c.intermediate_size)] * 2,
        (c.intermediate_size, c.hidden_size),
    ]
    return rank * c.num_hidden_layers * sum(a + b for a, b in sizes)


def layer_activations(config):
    """Values that one layer keeps per token for its backward pass: two norms, qkv before and after the rotation, attention out, gate-up, SwiGLU."""
    c = config
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return 4 * c.hidden_size + 2 * (heads + 2 * kv) + heads + 3 * c.intermediate_size


def plan(config, s, ranks, cuda):
    """{part: bytes on one rank} of a training step with settings s; the sampler's pages take what is left.

    fp32 masters, gradients and AdamW moments are sharded; compute copies, activations and the sampler's weights are not. cuda: 16-bit
    compute and sampler; else fp32, and one plain process samples with the trainer's own weights.
    """
    everything, layer, ends = parameters(config)
    width = 2 if cuda else 4
    trained = adapter_parameters(config, s.lora_rank) if s.lora_rank else everything
    tokens, hidden, layers = s.token_budget, config.hidden_size, config.num_hidden_layers
    kept = (
        2 * hidden * layers + layer_activations(config)
        if s.gradient_checkpointing
        else layer_activations(config) * layers
    )
    chunk = 4096 * 151_936 if cuda else 1 << 24
    parts = {
        "masters": 4 * (everything + (trained if s.lora_rank else 0)) / ranks,
        "gradients": 4 * trained / ranks,
        "optimizer": 8 * trained / ranks,
        # FSDP gathers two layers and the ends at a time in 16 bits, and holds their full gradients before it reduces them in fp32
        "gathered": ((2 + 6 * (not s.lora_rank)) * (2 * layer + ends))
        if cuda
        else (8 * (2 * layer + ends) if ranks > 1 else 0),
        "activations": tokens
        * kept
        * width
        * (
            1 if cuda else 1.6
        ),  # the torch references keep more than the kernels: 1.56 times (tests/test_plan.py)
        # the fused loss: one chunk of logits in fp32 and its gradient, and the head's gradient in fp32
        "loss": min(tokens * config.vocab_size, chunk) * (4 + width)
        + 4 * config.vocab_size * hidden,
        "sampler": 0 if not cuda and ranks == 1 and not s.lora_rank else width * everything,
    }
    if s.kl_coef and not s.lora_rank:
        parts["reference"] = width * everything / ranks
    return parts


def capacity(device):
    """Bytes that this rank may use: the GPU's, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / distributed.local_world_size()


def pages_needed(config, s, width):
    """Bytes of keys and values of the longest rollout of one slot: below that nothing can be sampled."""
    return (
        2
        * width
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * (s.max_prompt_tokens + s.max_new_tokens)
    )


def check(config, s, device, report):
    """Print the plan of this run, and refuse one that does not fit."""
    ranks, cuda = distributed.world_size(), device.type == "cuda"
    parts, room = plan(config, s, ranks, cuda), capacity(device)
    total, least = sum(parts.values()), pages_needed(config, s, 2 if cuda else 4)
    text = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    report(
        f"memory per rank, GB: {text}; in all {total / GB:.1f} of {room / GB:.0f}, and at least {least / GB:.2f} for keys and values"
    )
    if total + least > 0.95 * room:
        raise SystemExit(
            f"this run needs {(total + least) / GB:.1f} GB on each rank and {room / GB:.0f} are there: {advice(parts, s, ranks)}"
        )


def advice(parts, s, ranks):
    """What to change, the largest saving first."""
    sharded = parts["masters"] + parts["gradients"] + parts["optimizer"]
    ways = [
        (sharded / 2, f"use more than {ranks} ranks"),
        (parts["activations"] / 2, f"halve --token_budget ({s.token_budget})"),
    ]
    if not s.gradient_checkpointing:
        ways.append((parts["activations"] * 0.8, "set --gradient_checkpointing true"))
    if not s.lora_rank:
        ways.append((parts["gradients"] + parts["optimizer"], "set --lora_rank 32"))
    return "; or ".join(text for _, text in sorted(ways, reverse=True))


def peak_flops(device):
    """Matrix rate for MFU: the data sheet's for a known GPU, else measured once (fp32 on CPU, bf16 on CUDA), flop/s."""
    if device.type == "cuda":
        known = [
            rate for name, rate in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)
        ]
        if known:
            return known[0]
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return max(2 * size**3 / _seconds(lambda: a @ a, device) for _ in range(5))


def _seconds(run, device):
    import time

    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def network_bytes(config, passes, ranks):
    """What one rank sends and receives in a step: per micro-batch two gathers in 16 bits and a reduction in fp32, and the sampler's weights from fp32."""
    everything = parameters(config)[0]
    return (passes * (2 + 2 + 4) + 4) * everything * (ranks - 1) / ranks


def main():
    """The README's tables: the settings of recipes/gsm8k.toml, and the network of a step of 256 samples of 1,024 tokens on each rank."""
    from settings import RECIPES, Settings, read_recipe

    s = Settings(**read_recipe(RECIPES / "gsm8k.toml"))
    print(
        "| model | ranks | masters + gradients + optimizer | gathered | activations | loss | sampler | in all | left of 80 GB |\n"
        + "| --- " * 9
        + "|"
    )
    for size, ranks in (
        ("0.5B", 1),
        ("1.5B", 1),
        ("3B", 1),
        ("3B", 8),
        ("7B", 8),
        ("14B", 16),
        ("32B", 64),
    ):
        parts = plan(qwen(size), s, ranks, cuda=True)
        sharded, total = (
            parts["masters"] + parts["gradients"] + parts["optimizer"],
            sum(parts.values()),
        )
        row = [
            sharded,
            parts["gathered"],
            parts["activations"],
            parts["loss"],
            parts["sampler"],
            total,
            80e9 - total,
        ]
        print(f"| {size} | {ranks} | " + " | ".join(f"{value / GB:.1f}" for value in row) + " |")
    print(
        "\n| model | ranks | micro-batches a rank | GB through each rank's links | seconds at 50 GB/s | seconds of arithmetic at 400 TFLOP/s |\n"
        + "| --- " * 6
        + "|"
    )
    for size, ranks in (("7B", 8), ("7B", 64), ("14B", 16), ("32B", 64)):
        tokens, everything = 256 * 1024, parameters(qwen(size))[0]
        passes = tokens // s.token_budget
        sent = network_bytes(qwen(size), passes, ranks)
        print(
            f"| {size} | {ranks} | {passes} | {sent / GB:.0f} | {sent / 50e9:.1f} | {8 * everything * tokens / 400e12:.1f} |"
        )  # 8: the forward is made twice


if __name__ == "__main__":
    main()
