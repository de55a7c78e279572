"""Checkpoints that survive: written under a temporary name, synced, renamed; verified before they are used.

checkpoints/step_N/ is itself a Hugging Face folder (fp32 master weights), plus optimizer.safetensors, state.json and
MANIFEST.json (size and CRC-32 of every file).
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runtime import distributed, hugging_face, lora

MOMENTS = ("exp_avg", "exp_avg_sq")


def _crc(path):
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def optimizer_tensors(model, optimizer):
    """(name, whole tensor) of AdamW's moments, 'exp_avg/NAME'. A collective."""
    for name, p in model.named_parameters():
        if state := optimizer.state.get(p):
            yield from ((f"{key}/{name}", distributed.full(state[key])) for key in MOMENTS)


def on_rank_0(tensors):
    """{name: tensor on the CPU} on rank 0 and nothing on the others, which only take part: eight copies of a 7B model would fill a machine's memory."""
    kept = {}
    for name, tensor in tensors:
        if distributed.rank() == 0:
            kept[name] = tensor.cpu()
    return kept


def save(folder, step, model, optimizer, state, tokenizer_from, keep, best=None, texts=None):
    """Write checkpoints/step_N with everything a resume needs; keep the newest `keep`, and the one of step `best`. A collective: every rank calls it.

    texts: {file name: text} of the task's own (self-play's buffers).

    A full disk raises OSError after the temporary folder is gone; earlier checkpoints are untouched, and an old one is
    only removed once its successor is whole.
    """
    weights, adapters = on_rank_0(lora.merged(model)), lora.tensors(model)
    moments = on_rank_0(optimizer_tensors(model, optimizer))
    problem = None
    if distributed.rank() == 0:
        try:
            _write(
                Path(folder),
                step,
                model,
                weights,
                adapters,
                moments,
                state,
                tokenizer_from,
                texts or {},
            )
            for old in sorted_checkpoints(folder)[keep:]:
                if old.name != f"step_{best}":
                    shutil.rmtree(old)
        except OSError as error:
            problem = error
    if problem := distributed.broadcast(
        problem
    ):  # every rank stops together, none waits in a collective for a dead one
        raise problem


def _write(folder, step, model, weights, adapters, moments, state, tokenizer_from, texts):
    temporary, final = folder / f".step_{step}.tmp", folder / f"step_{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        hugging_face.save_model(
            weights, model.config, temporary, dtype=torch.float32, tokenizer_from=tokenizer_from
        )
        if adapters:
            lora.save(adapters, model, temporary, tokenizer_from)
        save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
        manifest = {p.name: [p.stat().st_size, _crc(p)] for p in sorted(temporary.iterdir())}
        (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as its own error type; the caller should see one kind.
        raise (
            error
            if isinstance(error, OSError)
            else OSError(f"cannot write checkpoint {final}: {error}")
        ) from error


def sorted_checkpoints(folder):
    """Finished checkpoint folders, newest first."""
    found = [p for p in Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def damage(checkpoint):
    """'' when every file is as the manifest says, else one sentence."""
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    except (OSError, json.JSONDecodeError):
        return f"{checkpoint} has no readable MANIFEST.json"
    for name, (size, crc) in manifest.items():
        path = checkpoint / name
        if not path.exists() or path.stat().st_size != size:
            return f"{path} is missing or has the wrong size"
        if _crc(path) != crc:
            return f"{path} is damaged (CRC differs)"
    return ""


def newest(folder):
    """The newest whole checkpoint, or None; damaged ones are named on stderr and passed over, never deleted."""
    for checkpoint in sorted_checkpoints(folder):
        problem = damage(checkpoint)
        if not problem:
            return checkpoint
        print(f"{problem}: using the checkpoint before it", file=sys.stderr)
    return None


def restore(checkpoint, model, optimizer):
    """Load weights (with LoRA the adapters: the base stays what it is) and moments into a (sharded) model and its optimizer -> the saved
    state. A collective: rank 0 reads and the others get their share from it, so checkpoints need not be on every machine."""
    first = distributed.rank() == 0
    state = distributed.broadcast(
        json.loads((checkpoint / "state.json").read_text()) if first else None
    )
    moments = load_file(checkpoint / "optimizer.safetensors") if first else {}
    kept = set(distributed.broadcast(list(moments)))
    weights = dict(hugging_face.load_model(checkpoint).named_parameters()) if first else {}
    adapters = lora.read(checkpoint, model) if first and lora.attached(model) else {}
    for name, parameter in model.named_parameters():
        if not lora.attached(model) or ".adapter." in name:
            with torch.no_grad():
                parameter.copy_(
                    distributed.shard_like(adapters.get(name, weights.get(name)), parameter)
                )
        if f"exp_avg/{name}" in kept:
            values = {
                key: distributed.shard_like(moments.get(f"{key}/{name}"), parameter)
                for key in MOMENTS
            }
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["updates"]), device=parameter.device),
                **values,
            }
    return state
