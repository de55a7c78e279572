"""Hugging Face folders, read and written.

config.json, safetensors, and the names that the parts of fused matrices have there.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import CheckpointError, Config, Model
from runtime.folder_check import (
    check_tensors,
    check_tied_head,
    open_weights,
    read_json,
    read_raw_config,
    require_finite,
)
from runtime.tokenizer import ChatTokenizer, keep_prompts_whole

# Hugging Face name of each part of a layer, in the order in which fused matrices are stacked.
LAYER_NAMES = {
    "input_norm": ["input_layernorm.weight"],
    "qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "qkv.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "q_norm": ["self_attn.q_norm.weight"],
    "k_norm": ["self_attn.k_norm.weight"],
    "o.weight": ["self_attn.o_proj.weight"],
    "post_norm": ["post_attention_layernorm.weight"],
    "gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "down.weight": ["mlp.down_proj.weight"],
}

# How the names of the files start that are copied along with a model.
TOKENIZER_FILES = (
    "tokenizer",
    "generation_config",
    "chat_template",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
)


def hugging_face_names(config):
    """Our parameter name -> the Hugging Face tensors whose rows, stacked, are that parameter."""
    names = {"embed.weight": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]}
    if not config.tie_word_embeddings:
        names["head"] = ["lm_head.weight"]
    absent = {"qwen2": ("q_norm", "k_norm"), "qwen3": ("qkv.bias",)}[config.model_type]
    layer = {ours: theirs for ours, theirs in LAYER_NAMES.items() if ours not in absent}
    for i in range(config.num_hidden_layers):
        for ours, theirs in layer.items():
            names[f"layers.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return names


def part_rows(config, ours):
    """Rows of each Hugging Face tensor inside our fused parameter, None when it is not fused."""
    if ".qkv." in ours:
        kv_rows = config.num_key_value_heads * config.head_dim
        return [config.num_attention_heads * config.head_dim, kv_rows, kv_rows]
    if ".gate_up." in ours:
        return [config.intermediate_size] * 2
    return None


def find_checkpoint(name):
    """A folder as it is; anything else is a hub id and is downloaded once (the hub's own cache)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"{name} is not a folder with a checkpoint "
            "(and not a hub id such as Qwen/Qwen2.5-Coder-0.5B-Instruct)"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as problem:
        # Network, unknown id, gated: the user needs the cause, not its traceback.
        raise CheckpointError(
            f"cannot get {name} from the hub ({type(problem).__name__}); "
            "check the name and the network, or give a local folder"
        ) from None


def lasting_name(name, folder):
    """What others can find a model by later: its hub id, or the absolute path of its folder.

    name: --model. folder: what find_checkpoint gave for it, or the built-in model's.
    """
    if name == "tiny" or Path(name).is_dir():
        return str(Path(folder).resolve())
    return name


def read_config(folder):
    """config.json of a checkpoint folder -> Config."""
    folder = Path(folder)
    return Config.from_dict(read_raw_config(folder), source=str(folder / "config.json"))


def load_model(name, dtype=torch.float32, device="cpu"):
    """Load a Qwen2 or Qwen3 checkpoint from a folder or a hub id -> Model in `dtype` on `device`.

    Sharded or not, tied or not. Raises CheckpointError for what is missing, damaged, quantised, not
    finite or another model than config.json says (runtime/folder_check.py).
    """
    folder = find_checkpoint(str(name))
    config = read_config(folder)
    stored = open_weights(folder)
    with torch.device("meta"):
        model = Model(config)
    check_tensors(folder, stored, stored_shapes(model), config.tie_word_embeddings)

    state = {}
    for ours, theirs in hugging_face_names(config).items():
        parts = []
        for name in theirs:
            part = stored[name].read().to(device=device, dtype=dtype)
            then = "the model is broken; use an earlier checkpoint, or copy it again"
            require_finite(part, f"{folder}: {name}", then)
            parts.append(part)
        # A single part is not copied.
        state[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        check_tied_head(folder, stored, state["embed.weight"])

    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def stored_shapes(model):
    """{Hugging Face tensor name: shape} of every tensor that a checkpoint of this model holds."""
    shapes = {}
    parameters = dict(model.named_parameters())
    for ours, theirs in hugging_face_names(model.config).items():
        rows, *rest = parameters[ours].shape
        counts = part_rows(model.config, ours) or [rows]
        for name, count in zip(theirs, counts, strict=True):
            shapes[name] = [count, *rest]
    return shapes


def save_model(state, config, folder, dtype=torch.bfloat16, tokenizer_from=None):
    """Write parameters (our names -> full tensors) as a folder that transformers and vLLM load.

    tokenizer_from: a checkpoint folder whose tokenizer, chat template and generation config are
    copied along. With a tokenizer its end marks are written where others look for them.
    Raises CheckpointError, and writes nothing, when a value is not finite.
    """
    tensors = {}
    for ours, theirs in hugging_face_names(config).items():
        whole = state[ours].detach().to(device="cpu", dtype=dtype)
        parts = whole.split(part_rows(config, ours)) if len(theirs) > 1 else [whole]
        for name, part in zip(theirs, parts):
            then = "such a model is not saved; go back to its last checkpoint, with a lower --lr"
            require_finite(part, name, then)
            tensors[name] = part.clone(memory_format=torch.contiguous_format)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # transformers 5 reads dtype, transformers 4 torch_dtype.
    name = str(dtype).removeprefix("torch.")
    written = config.to_dict() | {"dtype": name, "torch_dtype": name}
    write_json(folder / "config.json", written)

    if tokenizer_from:
        copy_tokenizer(Path(tokenizer_from), folder)
    if (folder / "tokenizer.json").exists():
        write_stop_ids(folder, ChatTokenizer(folder).stop_ids)


def copy_tokenizer(source, folder):
    """Copy the files that turn text into ids and back, prompts kept whole."""
    if source.resolve() == folder.resolve():
        return
    for path in source.glob("*"):
        if path.is_file() and path.name.startswith(TOKENIZER_FILES):
            shutil.copy(path, folder / path.name)
    path = source / "tokenizer.json"
    if path.exists():
        raw = read_json(path)
        if keep_prompts_whole(raw):
            write_json(folder / path.name, raw)


def write_stop_ids(folder, stop_ids):
    """Let others stop where our sampler stops.

    As Qwen's instruct models have it: the end of a turn in config.json, all end marks in
    generation_config.json, which generate() of transformers and vLLM read.
    """
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"eos_token_id": stop_ids[0]})

    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    generation.pop("_from_model_config", None)  # with it transformers 4 reads config.json
    write_json(path, generation | {"eos_token_id": list(stop_ids)})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
