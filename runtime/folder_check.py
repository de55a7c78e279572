"""Is a model folder what it says it is? If not, one sentence that names the cause.

read_raw_config -> open_weights -> check_tensors look at names, number types and shapes alone, which
stand in the headers of safetensors files. require_finite looks at the values, where they are read
and where they are written.
"""

import json
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from model import CheckpointError

# safetensors' names of the number types in which a plain checkpoint stores its weights.
PLAIN_TYPES = ("BF16", "F16", "F32", "F64")

# What the tensors are called that quantisation leaves beside (or in place of) a weight.
QUANTISED = {
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or int8",
    "weight_packed": "compressed-tensors",
    "SCB": "bitsandbytes int8",
    "absmax": "bitsandbytes 4-bit",
    "qweight": "GPTQ or AWQ",
}

TAKE_PLAIN = "use the plain checkpoint in bf16, fp16 or fp32 that they were made from"

# Rotation frequencies that old versions of transformers saved: computed from config.json here too.
LEFT_OVER = "rotary_emb.inv_freq"

# Weights in formats that are not read: a .bin is a pickle, which can run code when it is opened.
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def read_json(path):
    """A JSON file that holds an object -> dict."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as problem:
        raise CheckpointError(f"{path} is not valid JSON (line {problem.lineno})") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not a text file: copy or download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy or download it again")
    return found


# ---- config.json ----


def read_raw_config(folder):
    """config.json of a folder that claims to be a whole, plain model -> dict."""
    path = folder / "config.json"
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        refuse_adapter(folder, read_json(adapter), path.exists())
    if not path.exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")

    raw = read_json(path)
    how = raw.get("quantization_config") or raw.get("compression_config")
    if how:
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise CheckpointError(
            f"{path} says that the weights are quantised (quantization_config: {method}); "
            f"{TAKE_PLAIN}"
        )
    return raw


def refuse_adapter(folder, adapter, has_config):
    """An adapter is not a model, and beside a model nobody can tell whether it is in its weights.

    But for checkpoints that rarecode wrote before adapters had a folder of their own: they hold
    state.json, and their weights are merged.
    """
    if (folder / "state.json").exists():
        return
    base = adapter.get("base_model_name_or_path")
    if has_config:
        raise CheckpointError(
            f"{folder} holds a model and a LoRA adapter (adapter_config.json): if the weights are "
            "merged, move the adapter's two files away; if not, merge them with peft first"
        )
    if (folder.parent / "config.json").exists():
        raise CheckpointError(
            f"{folder} is a LoRA adapter alone: give {folder.parent}, whose weights have it merged"
        )
    raise CheckpointError(
        f"{folder} is a LoRA adapter alone, of {base}: merge it with peft (merge_and_unload, then "
        "save_pretrained) and give the folder of the result"
    )


# ---- the tensors ----


@dataclass
class Stored:
    """A tensor of a safetensors file, not yet read."""

    file: object  # as safe_open gives it
    name: str
    dtype: str  # safetensors' name
    shape: list[int]

    def read(self):
        return self.file.get_tensor(self.name)


def open_weights(folder):
    """{Hugging Face tensor name: Stored} of model.safetensors, or of the shards of its index."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return open_file(single, folder)

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: copy or download it again")
    files = set(weight_map.values())
    if single.exists() and single.name not in files:
        raise CheckpointError(
            f"{folder} holds two sets of weights, {single.name} and the shards of {index.name}: "
            "move the one away that is not meant"
        )

    found = {}
    for name in sorted(files):
        for tensor, stored in open_file(folder / name, folder).items():
            if weight_map.get(tensor) != name:
                place = weight_map.get(tensor, "nowhere")
                raise CheckpointError(
                    f"{index} and the files disagree: {tensor} is in {name}, the index says "
                    f"{place}; copy or download the checkpoint again"
                )
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found:
            raise CheckpointError(
                f"{index} and the files disagree: {tensor} is not in {name}; "
                "copy or download the checkpoint again"
            )
    return found


def open_file(path, folder):
    """{tensor name: Stored} of one safetensors file; only its header is read."""
    if not path.exists():
        raise CheckpointError(missing_weights(path, folder))
    try:
        opened = safe_open(path, framework="pt")
        found = {}
        for name in opened.keys():
            header = opened.get_slice(name)
            found[name] = Stored(opened, name, header.get_dtype(), header.get_shape())
        return found
    except (SafetensorError, OSError) as problem:
        with open(path, "rb") as file:
            if file.read(19) == b"version https://git":
                raise CheckpointError(
                    f"{path} is a git-lfs pointer, not the weights: run git lfs pull there"
                ) from None
        raise CheckpointError(f"{path} is damaged ({problem}): copy or download it again") from None


def missing_weights(path, folder):
    """Why there is no file of weights, as far as the folder tells."""
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS)
    if shards:
        return (
            f"{path} is missing (there is {shards[0]}): "
            "the checkpoint is not complete, copy or download it again"
        )
    if others:
        return (
            f"{path} is missing: the weights are in {others[0]}, and only safetensors is read; "
            "load the folder with transformers and write it again with save_pretrained"
        )
    return (
        f"{path} is missing: the checkpoint is not complete (or the hub has it in another "
        "format, which is not downloaded); copy or download it again"
    )


def check_tensors(folder, stored, shapes, tied):
    """Compare what is stored with what config.json describes.

    shapes: {Hugging Face tensor name: shape} of every tensor that the model needs.
    tied: the output is the embedding, so lm_head.weight may be there, but only as its copy
    (check_tied_head).
    """
    missing = [name for name in shapes if name not in stored]
    unasked = [name for name in stored if name not in shapes and not name.endswith(LEFT_OVER)]
    if tied and "lm_head.weight" in unasked:
        unasked.remove("lm_head.weight")

    # What is known to lead to missing tensors, other names and other shapes comes first.
    refuse_quantised(folder, stored, unasked)
    if missing:
        instead = f" (but {unasked[0]})" if unasked else ""
        raise CheckpointError(
            f"{folder} has no tensor {missing[0]}{instead}: "
            "it is not the checkpoint that its config.json describes"
        )
    if unasked:
        raise CheckpointError(
            f"{folder} has {len(unasked)} tensors that its config.json does not describe, such as "
            f"{unasked[0]}: without them it would be another model"
        )
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {stored[name].shape}, config.json asks for {shape}"
            )


def refuse_quantised(folder, stored, unasked):
    """Weights that mean something only with what lies beside them, or that are not plain numbers.

    unasked: names of stored tensors that the model does not have.
    """
    for name in unasked:
        parts = name.split(".")
        for mark, method in QUANTISED.items():
            if mark in parts:
                raise CheckpointError(
                    f"{folder} holds quantised weights ({method}: it has {name}); {TAKE_PLAIN}"
                )
        if "base_layer" in parts or "lora_" in name:
            raise CheckpointError(
                f"{folder} holds a LoRA adapter that is not merged (it has {name}): "
                "merge it with peft (merge_and_unload, then save_pretrained)"
            )
    for name in stored:
        if name not in unasked and stored[name].dtype not in PLAIN_TYPES:
            raise CheckpointError(
                f"{folder} stores {name} as {stored[name].dtype}: "
                f"the weights are quantised; {TAKE_PLAIN}"
            )


def check_tied_head(folder, stored, embedding):
    """A tied model's lm_head.weight, where it is stored, must be the embedding."""
    head = stored["lm_head.weight"].read().to(embedding)
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{folder}: lm_head.weight is not the embedding, but config.json ties the two; if the "
            "model has an output matrix of its own, set tie_word_embeddings to false there"
        )


def require_finite(tensor, what, then):
    """Every value is a number. what: whose values, then: what to do, for the sentence.

    The extremes are NaN where any value is: one pass over the weights, 0.1 s for 0.5B in bf16.
    """
    lowest, highest = torch.aminmax(tensor)
    if lowest.isfinite() and highest.isfinite():
        return
    count = int((~tensor.isfinite()).sum())
    raise CheckpointError(
        f"{what} holds NaN or infinity in {count} of {tensor.numel()} values: {then}"
    )
