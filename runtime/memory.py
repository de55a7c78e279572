"""Memory plan of a run, per rank, before anything large is allocated.

An upper estimate from shapes alone, for the longest samples that the settings allow: what FSDP2
shards is divided by the ranks, what every rank holds is not. `python -m bench.memory` prints the
tables of BENCHMARKS.md.
"""

import functools
import time
from dataclasses import dataclass, replace

import torch

from kernels import native
from kernels.linear import product
from model import Config, Model
from runtime import distributed, machine
from runtime.hugging_face import find_checkpoint, read_config

GB = 1e9
# Prompt tokens per prefill pass of the sampler; bounds its activations (135M in fp32: 0.3 GB).
PREFILL_TOKENS = 8192
# A100 and H100/H200: dense bf16 rates of their data sheets, for the MFU that people compare.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# Share of the memory that a plan fills; the rest is for fragments, graphs and libraries.
USABLE = 0.85
FULL = 0.95  # a run that needs more is refused
# Tokens of a micro-batch that a plan chooses: on an H200 65,536 hide the host.
MOST_TOKENS = 65_536
FEWEST_TOKENS = 4096
# With so many, a smaller micro-batch costs less than computing activations twice: 0.84 and 0.82 s
# at 16,384 tokens and at 65,536 with checkpointing (0.5B, H200), of which 0.2 s were waits.
ENOUGH_TOKENS = 16_384
TOKENS_ON_CPU = 16_384
# Sampled at a time on a GPU where --slots does not say: the most that were measured.
MOST_ROWS = 1024
# On a CPU: beyond a few dozen a step takes hardly less per row.
ROWS_ON_CPU = 256
# Of free memory the sampler takes this share for keys and values; the rest is for prefill, graphs
# and, in the same process, the training.
FREE_SHARE = 0.5
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


def layer_activations(config, keys=1.0):
    """Values that one layer keeps per token for its backward pass.

    keys: rows of keys and values per token; more than 1 where completions see a shared prompt.
    """
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    norms = 4 * config.hidden_size
    attention = 2 * heads + 2 * kv_heads * keys  # q and what comes out; k and v
    mlp = 3 * config.intermediate_size  # gate, up, and what SwiGLU makes of them
    return norms + attention + mlp


def keys_per_token(settings):
    """Rows of keys that attention reads, per token of the update, where prompts are shared.

    16 completions of 256 tokens on a prompt of 512: (512 + 16 * 768) / (512 + 16 * 256) = 2.8.
    Planned with completions half as long as they may be.
    """
    if not settings.share_prompts:
        return 1.0
    prompt, new = settings.max_prompt_tokens, settings.max_new_tokens / 2
    seen = prompt + settings.samples * (prompt + new)
    return seen / (prompt + settings.samples * new)


def plan(config, settings, ranks, cuda, sharded=None):
    """{part: bytes on one rank} of a training step; peak() says what they take together.

    fp32 masters, gradients and AdamW moments are sharded; compute copies, activations and the
    sampler's weights are not.
    cuda: 16-bit compute and sampler, whose pages take what is left; else fp32. One process samples
    with the trainer's own weights. sharded: by FSDP; None = with more than one rank.
    """
    sharded = ranks > 1 if sharded is None else sharded
    everything, layer, ends = parameters(config)
    lora = bool(settings.lora_rank)
    width = 2 if cuda else 4  # bytes of a compute value
    parts = {}

    # What is trained, sharded, in fp32.
    trained = adapter_parameters(config, settings.lora_rank) if lora else everything
    masters = everything + trained if lora else everything
    parts["masters"] = 4 * masters / ranks
    copies = 2 if settings.gepo else 1  # RL's is held aside while GEPO's is computed
    parts["gradients"] = 4 * trained / ranks * copies
    parts["optimizer"] = 8 * trained / ranks

    # FSDP gathers two layers and the ends at a time in 16 bits, and holds their full gradients
    # before it reduces them in fp32. One GPU has the whole model in 16 bits.
    gathered = 2 * layer + ends
    parts["gathered"] = 0
    if sharded:
        parts["gathered"] = (2 if cuda and lora else 8) * gathered
    elif cuda:
        parts["model"] = width * everything

    # A checkpointed layer keeps its input. Around the layers: the last hidden state, the rows that
    # predict, and the gradient of each.
    layer_values = layer_activations(config, keys_per_token(settings))
    kept = 2 * config.hidden_size if settings.gradient_checkpointing else layer_values
    kept = kept * config.num_hidden_layers + 8 * config.hidden_size
    more = 1
    if not cuda:
        # torch's references keep more than the kernels do (tests/test_plan.py); a layer that is
        # made again is counted beside the loss.
        kept += layer_values if settings.gradient_checkpointing else 0
        widths = (config.hidden_size, config.intermediate_size, config.head_dim)
        more = 1.05 if native.takes(*widths) else 1.6
    tokens = micro_batch_tokens(settings, ranks)
    parts["activations"] = tokens * kept * width * more

    # Beside them either the loss: one chunk of logits in fp32 and its gradient, and the head's
    # gradient in fp32; or later one layer: made again, and the gradients in its MLP.
    chunk = 4096 * 151_936 if cuda else 1 << 24
    logits = min(tokens * config.vocab_size, chunk)
    loss = logits * (4 + width) + 4 * config.vocab_size * config.hidden_size
    again = layer_values if settings.gradient_checkpointing else 0
    one_layer = tokens * (again + 3 * config.intermediate_size) * width
    parts["loss"] = max(loss, one_layer)

    samples_in_place = not sharded and not lora
    parts["sampler"] = 0 if samples_in_place else width * everything
    if settings.teacher:
        parts["teacher"] = width * parameters_of(settings.teacher) / ranks
    elif settings.kl_coef and not lora:
        parts["reference"] = width * everything / ranks
    if not cuda:
        longest = settings.max_prompt_tokens + settings.max_new_tokens
        parts |= sampling_parts(config, longest)
    return parts


@functools.cache
def parameters_of(name):
    """Parameters of a checkpoint folder or hub id."""
    everything, _, _ = parameters(read_config(find_checkpoint(name)))
    return everything


def micro_batch_tokens(settings, ranks):
    """Most tokens of a rank's micro-batch: --token_budget (0: the most that a plan chooses), or all
    tokens of a shorter step.

    A sequence that is longer than the budget goes alone.
    4 prompts of 100 tokens, shared, with 8 samples of 50 each: 4 * (100 + 8 * 50) = 2,000.
    """
    prompt, new = settings.max_prompt_tokens, settings.max_new_tokens
    budget = settings.token_budget or MOST_TOKENS
    if settings.task == "selfplay" or settings.gepo:  # also trains on other things
        return max(budget, prompt + new)
    prompts = -(-settings.prompts // ranks)
    group = settings.samples * (prompt + new)
    if settings.share_prompts:
        group = prompt + settings.samples * new
    return max(min(budget, prompts * group), prompt + new)


def sampling_parts(config, longest):
    """{part: bytes} that sampling in fp32 on a CPU needs beside the weights: there is no less.

    longest: tokens of a prompt with its completion.
    """
    everything, _, ends = parameters(config)
    packed = everything - ends + config.vocab_size * config.hidden_size  # every matrix product
    # A layer's input, its products and what SwiGLU makes of them.
    values = 3 * config.hidden_size + 3 * config.intermediate_size
    return {
        "packed": 4 * packed,
        "prefill": 4 * PREFILL_TOKENS * values,
        "pages": page_bytes(config, longest, width=4),
    }


def page_tokens(config):
    """Tokens of a page of the sampler on a GPU: 64 KB in 16 bits for keys and values of a head."""
    return 8192 // config.head_dim


def page_bytes(config, tokens, width):
    """Bytes of the keys and values of so many tokens, `width` bytes a value."""
    layer_values = 2 * config.num_key_value_heads * config.head_dim
    return tokens * width * config.num_hidden_layers * layer_values


def peak(parts):
    """Most bytes of a plan at any time.

    On a CPU the sampler lets go of what it needs before the update begins (train.py), and the
    update of its own when it ends: only the larger of the two is held.
    """
    updating = sum(parts.get(name, 0) for name in ("gradients", "activations", "loss"))
    sampling = 0
    if "packed" in parts:
        sampling = sum(parts[name] for name in ("packed", "prefill", "pages"))
    return sum(parts.values()) - min(updating, sampling)


def pages_of_rows(parts, rows, room):
    """Bytes that the sampler takes for keys and values of `rows` samples (sampler.py).

    parts: of a plan with the pages of one sample. room: bytes, None where nobody knows.
    8 GB with 2 of weights: at most 3 for pages; 10 rows of 0.2 GB take 2.
    """
    one = parts["pages"]
    if room is None:
        return rows * one
    held = sum(parts.values()) - one
    held -= sum(parts.get(name, 0) for name in ("gradients", "activations", "loss"))
    return max(one, min(rows * one, FREE_SHARE * (room - held)))


def fit(config, settings, device):
    """(settings with the micro-batches that this run has, bytes for the sampler's keys and values).

    On GPUs `fitted` to the rank with the least memory. On a CPU, where other programs come and go,
    16,384 tokens and checkpointing as it is said, and None: the sampler looks at what is free.
    A collective.
    """
    if device.type == "cpu":
        return replace(settings, token_budget=settings.token_budget or TOKENS_ON_CPU), None
    ranks, memory = distributed.world_size(), room_of(device)
    found = fitted(config, settings, ranks, memory)
    found = replace(
        found,
        token_budget=-distributed.largest(-found.token_budget),
        gradient_checkpointing=bool(distributed.largest(int(found.gradient_checkpointing))),
    )
    return found, int(step_pages(config, settings, ranks, memory))


def fitted(config, settings, ranks, memory):
    """Settings with the micro-batch size and the checkpointing for `memory` bytes of a GPU.

    token_budget 0: as many tokens as the plan has room for. gradient_checkpointing true: only where
    activations do not fit otherwise; false: never. Decided by shapes and the size of the memory
    alone, so that a resumed run has the same.
    """
    room = USABLE * memory - step_pages(config, settings, ranks, memory)

    def fits(tokens, checkpointing):
        tried = replace(settings, token_budget=tokens, gradient_checkpointing=checkpointing)
        return peak(plan(config, tried, ranks, cuda=True)) <= room

    def largest(checkpointing):
        tokens = MOST_TOKENS
        while tokens > FEWEST_TOKENS and not fits(tokens, checkpointing):
            tokens -= 1024
        return tokens

    tokens = settings.token_budget
    recomputes = settings.gradient_checkpointing and not fits(tokens, False)
    if not tokens:
        tokens = largest(False)
        recomputes = settings.gradient_checkpointing and tokens < ENOUGH_TOKENS
        tokens = largest(True) if recomputes else tokens
    return replace(settings, token_budget=tokens, gradient_checkpointing=recomputes)


def step_pages(config, settings, ranks, memory):
    """Bytes that the sampler may take of a GPU for keys and values: of a step's longest samples.

    At most half of what training leaves with the smallest micro-batch: the other half makes that
    larger. Enough for one sample.

    A prompt's pages (but its last token's) are there once for its samples; each sample copies the
    last of them, if it is not full. 64 prompts of 1,024 tokens with 16 samples of 1,024 each, pages
    of 128 tokens: 64 * 1,024 + 1,024 * (1,024 + 128) tokens.
    """
    rows = min(step_rows(settings, ranks), rows_at_once(settings.slots, cuda=True))
    prompts = min(step_rows(replace(settings, samples=1), ranks), rows)
    page = page_tokens(config)
    prompt = -(-(settings.max_prompt_tokens - 1) // page) * page
    run = -(-(settings.max_new_tokens + page - 1) // page) * page
    asked = page_bytes(config, prompts * prompt + rows * run, width=2)
    one = page_bytes(config, prompt + run, width=2)

    tokens = settings.token_budget or FEWEST_TOKENS
    smallest = plan(config, replace(settings, token_budget=tokens), ranks, cuda=True)
    left = FULL * memory - peak(smallest)
    return max(one, min(asked, left / 2))


def step_rows(settings, ranks):
    """Samples of a rank's rollout."""
    rows = -(-settings.prompts * settings.samples // ranks)
    return 6 * rows if settings.task == "selfplay" else rows  # for three tasks and two roles


@dataclass
class Need:
    """Bytes that a rank takes at most and can have, both with what it has already."""

    most: float
    room: float | None  # None where no file says it (macOS)
    smaller: str  # what to change to need less

    def __str__(self):
        text = f"at most {self.most / GB:.1f} GB"
        return text if self.room is None else f"{text} of {self.room / GB:.1f} GB at hand"


def room_of(device):
    """Bytes that this rank can have, with what it has already; None where no file says it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if machine.at_hand() is None:
        return None
    return machine.free_bytes(device) + machine.resident_bytes()


def check(config, settings, device, report, adapters=True, pages=None):
    """Print the plan of this run, and refuse one that does not fit -> Need. A collective.

    adapters: whether the command has --lora_rank.
    pages: bytes that the sampler may take of a GPU (`fit`).
    """
    ranks = distributed.world_size()
    cuda = device.type == "cuda"
    parts = plan(config, settings, ranks, cuda)
    needed = peak(parts)
    if cuda:  # below that nothing can be sampled
        longest = settings.max_prompt_tokens + settings.max_new_tokens
        one = page_bytes(config, longest, width=2)
        needed += one
        parts["pages"] = max(one, pages or 0)
    layers = "computed twice" if settings.gradient_checkpointing else "kept"
    tokens = micro_batch_tokens(settings, ranks)
    report(f"micro-batches of at most {tokens:,} tokens, activations {layers}")
    rows = max(step_rows(settings, ranks), settings.eval_problems * settings.eval_samples // ranks)
    smaller = advice(config, settings, ranks, cuda, adapters)
    return require(
        parts, needed, min(rows, rows_at_once(settings.slots, cuda)), device, smaller, report
    )


def rows_at_once(slots, cuda):
    """Samples decoded together, at most: as --slots says, or what it means by 0."""
    return slots or (MOST_ROWS if cuda else ROWS_ON_CPU)


def check_sampling(config, longest, rows, device, report):
    """check() of an evaluation, which only samples.

    longest: tokens of a prompt with its completion. rows: samples at a time.
    """
    everything, _, _ = parameters(config)
    cuda = device.type == "cuda"
    parts = {"weights": (2 if cuda else 4) * everything}
    if cuda:
        parts["pages"] = page_bytes(config, longest, width=2)
    else:
        parts |= sampling_parts(config, longest)
    needed = sum(parts.values())
    if cuda:
        parts["pages"] = pages_of_rows(parts, rows, room_of(device))
    return require(parts, needed, rows, device, "take a smaller model", report)


def require(parts, needed, rows, device, smaller, report):
    """Print a plan; SystemExit with one sentence where not even the `needed` bytes are there.

    rows: samples at a time, for which the sampler makes room if it can.
    """
    need = Need(needed, room_of(device), smaller)
    if device.type == "cpu":
        process = machine.resident_bytes()  # Python, torch, data
        parts = {"process": process} | parts
        needed += process
        parts["pages"] = pages_of_rows(parts, rows, need.room)
    need.most = max(needed, peak(parts))

    text = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    report(f"memory per rank, GB: {text}; {need}")
    refusal = None
    if need.room is not None and needed > FULL * need.room:
        refusal = (
            f"too little memory: this needs up to {needed / GB:.1f} GB on each rank and "
            f"{need.room / GB:.1f} GB are at hand; {smaller}"
        )
    distributed.stop_together(refusal)
    return need


def advice(config, settings, ranks, cuda, adapters=True):
    """What to make smaller, the largest saving first, and what is needed then."""
    tokens = micro_batch_tokens(settings, ranks)
    longest = settings.max_prompt_tokens + settings.max_new_tokens
    before = peak(plan(config, settings, ranks, cuda))
    found = []

    def consider(text, ranks=ranks, **changes):
        after = peak(plan(config, replace(settings, **changes), ranks, cuda))
        if before - after > max(0.03 * before, 0.05 * GB):
            found.append((after, f"{text} saves {(before - after) / GB:.1f} GB"))

    if cuda:  # more ranks of one machine share its memory
        consider(f"use more than {ranks} ranks: twice as many", ranks=2 * ranks)
    if adapters and not settings.lora_rank:
        consider("--lora_rank 32", lora_rank=32)
    if not settings.gradient_checkpointing:
        consider("--gradient_checkpointing true", gradient_checkpointing=True)
    if tokens > longest:
        smaller = max(tokens // 2, longest)
        consider(f"--token_budget {smaller}", token_budget=smaller)
    elif adapters:
        half = settings.max_new_tokens // 2
        consider(f"--max_new_tokens {half}", max_new_tokens=half, token_budget=1)
    return "; ".join([text for _, text in sorted(found)] or ["take a smaller model"])


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
        product(a, a)  # as training multiplies
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
