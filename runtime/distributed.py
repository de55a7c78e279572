"""torch.distributed through torchrun, and how the weights of training are held.

Several ranks: FSDP2 with fp32 masters. One GPU: the model in 16 bits, which the sampler reads too,
and an fp32 master of each parameter. One CPU process: plain fp32.
"""

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

    One process needs no process group.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    if "RANK" in os.environ:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **_meeting_point())

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


# ---- weights ----


def shard(model, device, precision=None):
    """Wrap for training: fp32 masters; on GPUs bf16 compute and gradients added in fp32."""
    model.to(device)
    if not dist.is_initialized():
        is_trained = any(p.requires_grad for p in model.parameters())
        if device.type == "cuda" and is_trained:
            add_masters(model, torch.bfloat16)
        return model
    mesh = init_device_mesh(device.type, (world_size(),))
    precision = precision or (MIXED if device.type == "cuda" else MixedPrecisionPolicy())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


def add_masters(model, dtype):
    """Round the parameters to `dtype`, in place, and give each the fp32 master it came from.

    FSDP2's arithmetic on one rank, without its copies: every micro-batch's gradient is added to the
    master's in fp32. The optimizer steps the masters; publish() rounds them to the parameters.
    """
    for parameter in model.parameters():
        rounded = parameter.detach().to(dtype)
        # The frozen base of adapters mostly is what its checkpoint holds in 16 bits.
        is_exact = torch.equal(rounded.float(), parameter.detach().float())
        if parameter.requires_grad or not is_exact:
            parameter.master = parameter.detach().float()
        parameter.data = rounded
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_add_to_master)


def _add_to_master(parameter):
    if parameter.master.grad is None:
        parameter.master.grad = parameter.grad.float()
    else:
        parameter.master.grad.add_(parameter.grad)
    parameter.grad = None


def master(parameter):
    """What the optimizer steps and a checkpoint keeps: itself, where it has no other."""
    return getattr(parameter, "master", parameter)


def publish(model):
    """The masters have changed: round them to the parameters that compute and sample."""
    parameters = [p for p in model.parameters() if master(p) is not p]
    if parameters:
        with torch.no_grad():
            torch._foreach_copy_(parameters, [p.master for p in parameters])


def full(tensor):
    """The whole of a (sharded) tensor or of its master, detached. A collective of all ranks."""
    tensor = master(tensor).detach()
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
