"""torch.distributed through torchrun: one code path from one process to many, sharded by FSDP2."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

# cast_forward_inputs would round the rotary tables, which are fp32 arguments of a layer, to bf16:
# an angle's error of 2^-9 that the sampler does not have.
MIXED = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def setup():
    """Join the torchrun job, if any; returns the device of this rank.

    One CPU process needs no process group.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    if "RANK" in os.environ:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **_meeting_point())
    elif cuda:  # FSDP2 gives one GPU its fp32 masters and bf16 compute too
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    if cuda:
        return torch.device("cuda", torch.cuda.current_device())
    repeatable_sums()
    return torch.device("cpu")


def repeatable_sums():
    """Let the same command and seed give the same bits on a CPU, with any number of threads.

    x[index] with repeated rows (a prompt's last row predicts every first token of its group) adds up
    its gradient by atomic additions from all threads, in the order in which they come: 30 of 30
    repetitions differed in the last bit with 2 threads. CUDA sorts the rows first.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would only cost time


def _meeting_point():
    """Where ranks find each other.

    torchrun's agent lends its store to every attempt, in which a restarted job would read the
    addresses of the dead one and be refused (pytorch issue 135712): a prefix per attempt keeps them
    apart.
    """
    given = os.environ
    if given.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(given["MASTER_ADDR"], int(given["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"attempt_{given['TORCHELASTIC_RESTART_COUNT']}", store)
    return dict(store=store, rank=int(given["RANK"]), world_size=int(given["WORLD_SIZE"]))


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def first_on_node():
    """One rank per machine, for files that every machine needs, in a shared folder or not."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def restarted():
    """torchrun --max_restarts has started this process again after a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def stop_together(problem):
    """End on every rank, with one sentence, when any has a problem (a sentence, or None).

    A rank that left alone would keep the others waiting in a collective.
    """
    for number, sentence in enumerate(gather([problem])):
        if sentence:
            raise SystemExit(f"rank {number}: {sentence}" if world_size() > 1 else sentence)


def mirror(folder):
    """Copy rank 0's folder of small files to every machine that does not see it. A collective."""
    barrier()  # rank 0 may have written it just now
    if not any(gather([not folder.exists()])):
        return
    files = {}
    if rank() == 0:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = broadcast(files)
    if first_on_node() and not folder.exists():
        partial = folder.with_name(folder.name + ".tmp")
        partial.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.rename(folder)
    barrier()


# ---- collectives of small Python objects: rewards, rows, metrics ----


def barrier():
    if world_size() > 1:
        dist.barrier()


def share(items):
    """This rank's contiguous share of a list; shares differ by at most one."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def gather(items):
    """Every rank's list, one after the other in rank order, on all ranks."""
    if world_size() == 1:
        return list(items)
    parts = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def gather_and_place(items):
    """gather(items), and the slice of it that is this rank's."""
    parts = gather([items])
    start = sum(map(len, parts[: rank()]))
    return [item for part in parts for item in part], slice(start, start + len(items))


def largest(number):
    """The maximum of an integer over all ranks."""
    return max(gather([number]))


def broadcast(value):
    """Rank 0's Python object on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


# ---- sharded tensors ----


def shard(model, device, precision=None):
    """Wrap for training: fp32 sharded masters; on GPU bf16 compute and fp32 gradient reduction.

    One CPU process stays plain.
    """
    model.to(device)
    if not dist.is_initialized():
        return model
    mesh = init_device_mesh(device.type, (world_size(),))
    precision = precision or (MIXED if device.type == "cuda" else MixedPrecisionPolicy())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


def full(tensor):
    """The whole of a (sharded) tensor, detached. A collective: call it on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(whole, parameter):
    """The part of a full tensor that belongs to this rank, laid out as `parameter`.

    Rank 0's tensor counts: the others may give None.
    """
    if not hasattr(parameter, "device_mesh"):
        return whole.detach().to(parameter)
    from torch.distributed.tensor import distribute_tensor

    if whole is None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    whole = whole.detach().to(parameter.device, parameter.dtype)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
