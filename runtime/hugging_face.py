"""Hugging Face folders, read and written.

config.json, safetensors, and the names that the parts of fused matrices have there.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import CheckpointError, Config, Model

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


def read_config(folder):
    """config.json of a checkpoint folder -> Config."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        return Config.from_dict(json.loads(path.read_text()), source=str(path))
    except json.JSONDecodeError as problem:
        raise CheckpointError(f"{path} is not valid JSON (line {problem.lineno})") from None


def load_model(name, dtype=torch.float32, device="cpu"):
    """Load a Qwen2 or Qwen3 checkpoint from a folder or a hub id -> Model in `dtype` on `device`.

    Sharded or not, tied or not. Raises CheckpointError for what is missing, damaged or of another
    shape than config.json says.
    """
    folder = find_checkpoint(str(name))
    config = read_config(folder)
    readers = _open_tensors(folder)

    state = {}
    for ours, theirs in hugging_face_names(config).items():
        for part in theirs:
            if part not in readers:
                raise CheckpointError(
                    f"{folder} has no tensor {part}: "
                    "it is not the checkpoint that its config.json describes"
                )
        parts = [readers[part](part) for part in theirs]
        # A single part is not copied.
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[ours] = whole.to(device=device, dtype=dtype)

    with torch.device("meta"):
        model = Model(config)
    for ours, parameter in model.named_parameters():
        if state[ours].shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {ours} has shape {list(state[ours].shape)}, "
                f"config.json asks for {list(parameter.shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def _open_tensors(folder):
    """Hugging Face tensor name -> function that reads it; one file or many."""
    files = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))

    readers = {}
    for name in files:
        path = folder / name
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the checkpoint is not complete, copy or download it again"
            )
        try:
            opened = safe_open(path, framework="pt")
            for key in opened.keys():
                readers[key] = opened.get_tensor
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(
                f"{path} is damaged ({problem}): copy or download it again"
            ) from None
    return readers


def save_model(state, config, folder, dtype=torch.bfloat16, tokenizer_from=None):
    """Write parameters (our names -> full tensors) as a folder that transformers and vLLM load.

    tokenizer_from: a checkpoint folder whose tokenizer, chat template and generation config are
    copied along.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for ours, theirs in hugging_face_names(config).items():
        whole = state[ours].detach().to(device="cpu", dtype=dtype)
        parts = whole.split(part_rows(config, ours)) if len(theirs) > 1 else [whole]
        for name, part in zip(theirs, parts):
            tensors[name] = part.clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # transformers 5 reads dtype, transformers 4 torch_dtype.
    name = str(dtype).removeprefix("torch.")
    written = config.to_dict() | {"dtype": name, "torch_dtype": name}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")

    if tokenizer_from:
        for path in Path(tokenizer_from).glob("*"):
            is_elsewhere = path.resolve().parent != folder.resolve()
            if path.name.startswith(TOKENIZER_FILES) and is_elsewhere:
                shutil.copy(path, folder / path.name)
