"""Checkpoints that survive: written under a temporary name, synced, renamed; verified before use.

checkpoints/step_N/ is itself a Hugging Face folder (fp32 master weights), with
optimizer.safetensors, state.json and MANIFEST.json (size and CRC-32 of every file). With LoRA its
weights are merged, and step_N/adapter/ is the adapter alone.
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model import CheckpointError
from runtime import distributed, folder_check, hugging_face, lora, memory

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
ADAPTER = "adapter"  # the folder of the adapter in a checkpoint

# ---- writing ----


def require_room(folder, config, settings):
    """SystemExit with one sentence where the disk is too small for what a run will save.

    A collective. A new checkpoint is there before an old one goes, so that --keep 2 needs room for
    3, and for the best one on validation problems. Weights and two moments in fp32 are 12 bytes a
    parameter: 5.9 GB of the 0.5B.
    """
    problem = None
    if distributed.rank() == 0:
        size = size_of(config, settings.lora_rank)
        there = sorted_checkpoints(folder)
        done = int(there[0].name[5:]) if there else 0
        to_come = -(-(settings.steps - done) // settings.save_every)
        most = settings.keep + 1 + bool(settings.eval_every and settings.validation_problems)
        count = min(to_come, max(1, most - len(there)))
        disk = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(disk).free
        if count * size > free:
            problem = (
                f"too little room for checkpoints: {count} of {size / 1e9:.1f} GB each will be in "
                f"{folder} at a time and {free / 1e9:.1f} GB are free there: free some, lower --keep "
                "(one more is there while the next is written), or take --lora_rank 32"
            )
    distributed.stop_together(problem)


def size_of(config, lora_rank):
    """Bytes of a checkpoint: merged weights, and what is trained with its two moments, fp32."""
    everything, _, _ = memory.parameters(config)
    if not lora_rank:
        return 12 * everything
    return 4 * everything + 12 * memory.adapter_parameters(config, lora_rank)


def save(
    folder,
    step,
    model,
    optimizer,
    state,
    tokenizer_from,
    keep,
    best=None,
    texts=None,
    base=None,
):
    """Write folder/step_N with everything a resume needs. A collective: every rank calls it.

    state: what else the run must remember, as JSON. tokenizer_from: a checkpoint folder.
    keep: newest checkpoints that stay. best: the step of one more that stays.
    texts: {file name: text} of the task's own (self-play's buffers).
    base: with LoRA, hub id or absolute path of the model under the adapter.

    A full disk raises OSError after the temporary folder is gone, and values that are not finite
    raise CheckpointError; earlier checkpoints are untouched, and an old one is only removed once
    its successor is whole.
    """
    folder = Path(folder)
    weights = on_rank_0(lora.merged(model))
    adapters = lora.tensors(model)
    moments = on_rank_0(moments_of(model, optimizer))
    problem = None
    if distributed.rank() == 0:
        try:
            temporary = folder / f".step_{step}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            hugging_face.save_model(weights, model.config, temporary, torch.float32, tokenizer_from)
            if adapters:
                lora.save(adapters, model, temporary / ADAPTER, base)
            for name, moment in moments.items():
                then = "AdamW cannot go on from it; resume the last checkpoint with a lower --lr"
                folder_check.require_finite(moment, name, then)
            save_file(moments, temporary / "optimizer.safetensors")
            state = json.dumps({"step": step, **state}, indent=2) + "\n"
            for name, text in {"state.json": state, **(texts or {})}.items():
                (temporary / name).write_text(text, "utf-8")
            seal(temporary, folder / f"step_{step}")
            remove_old(folder, keep, best)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # safetensors reports a full disk as its own error type; the caller should see one kind.
            if isinstance(error, (OSError, CheckpointError)):
                problem = error
            else:
                problem = OSError(f"cannot write checkpoint {folder}/step_{step}: {error}")
    # Every rank stops together, none waits in a collective for a dead one.
    if problem := distributed.broadcast(problem):
        raise problem


def on_rank_0(tensors):
    """{name: tensor on the CPU} on rank 0 and nothing on the others, which only take part.

    Eight copies of a 7B model would fill a machine's memory.
    """
    kept = {}
    for name, tensor in tensors:
        if distributed.rank() == 0:
            kept[name] = tensor.cpu()
    return kept


def moments_of(model, optimizer):
    """(name, whole tensor) of AdamW's moments, 'exp_avg/NAME'. A collective."""
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(distributed.master(parameter))
        if not state:
            continue
        for moment in MOMENTS:
            yield f"{moment}/{name}", distributed.full(state[moment])


def seal(temporary, final):
    """Add the manifest, bring everything to the disk, and give the folder its name."""
    manifest = {}
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            name = path.relative_to(temporary).as_posix()
            manifest[name] = [path.stat().st_size, crc(path)]
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync(final.parent)


def remove_old(folder, keep, best):
    for old in sorted_checkpoints(folder)[keep:]:
        if old.name != f"step_{best}":
            shutil.rmtree(old)


def crc(path):
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- finding and reading ----


def newest(folder):
    """The newest whole checkpoint, or None.

    Damaged ones are named on stderr and passed over, never deleted.
    """
    for checkpoint in sorted_checkpoints(folder):
        problem = damage(checkpoint)
        if not problem:
            return checkpoint
        print(f"{problem}: using the checkpoint before it", file=sys.stderr)
    return None


def sorted_checkpoints(folder):
    """Finished checkpoint folders, newest first."""
    found = [path for path in Path(folder).glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def damage(checkpoint):
    """'' when every file is as the manifest says, else one sentence."""
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    except (OSError, json.JSONDecodeError):
        return f"{checkpoint} has no readable MANIFEST.json"
    for name, (size, expected) in manifest.items():
        path = checkpoint / name
        if not path.exists() or path.stat().st_size != size:
            return f"{path} is missing or has the wrong size"
        if crc(path) != expected:
            return f"{path} is damaged (CRC differs)"
    return ""


def restore(checkpoint, model, optimizer):
    """Load weights and moments into a (sharded) model and its optimizer; returns the saved state.

    With LoRA the adapters: the base stays what it is. A collective: rank 0 reads and the others get
    their share from it, so checkpoints need not be on every machine.
    """
    state, moments, weights = None, {}, {}
    if distributed.rank() == 0:
        state = json.loads((checkpoint / "state.json").read_text())
        moments = load_file(checkpoint / "optimizer.safetensors")
        if lora.attached(model):
            weights = lora.read(adapter_folder(checkpoint), model)
        else:
            weights = dict(hugging_face.load_model(checkpoint).named_parameters())
    state = distributed.broadcast(state)
    known = set(distributed.broadcast(list(moments)))

    for name, parameter in model.named_parameters():
        parameter = distributed.master(parameter)
        if not lora.attached(model) or ".adapter." in name:
            with torch.no_grad():
                parameter.copy_(distributed.shard_like(weights.get(name), parameter))
        if f"exp_avg/{name}" in known:
            step = torch.tensor(float(state["updates"]), device=parameter.device)
            optimizer.state[parameter] = {"step": step}
            for moment in MOMENTS:
                whole = moments.get(f"{moment}/{name}")
                optimizer.state[parameter][moment] = distributed.shard_like(whole, parameter)
    distributed.publish(model)
    return state


def adapter_folder(checkpoint):
    """Where a checkpoint has its adapter: older ones have it beside the merged weights."""
    if (checkpoint / ADAPTER).exists():
        return checkpoint / ADAPTER
    if (checkpoint / "adapter_model.safetensors").exists():
        return checkpoint
    raise CheckpointError(
        f"{checkpoint} has no adapter: its run was without --lora_rank, resume it so"
    )
