"""The sampler's row kernels on a CPU: attention over the page pool, RMSNorm and SwiGLU in C
(native.c), compiled on first use for the processor at hand, fp32. Training's: native_layers.py.

The torch references run where there is no C compiler, for other dtypes and for widths that are not
a multiple of 16. Every result depends on its own row alone, to the last bit, in C as in the
references.
"""

import ctypes
import functools
import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from kernels.rope import apply_rope_reference

UNIT = 16  # tokens whose keys lie side by side; widths are multiples of it
TARGET = "native"  # whose instructions, the compiler's -march; bench and tests set older ones
SOURCE = Path(__file__).with_name("native.c")
FLAGS = ["-O3", "-fPIC", "-shared", "-std=gnu11"]
# The first that the compiler takes: Apple's has no OpenMP, and then one thread does it.
MORE_FLAGS = (["-march={target}", "-fopenmp"], ["-march={target}"], [])


class Call(ctypes.Structure):
    """native.c's Call: what all layers of one step or prefill pass share."""

    _fields_ = [
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("shared_length", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("own_length", ctypes.c_void_p),
        ("alive", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


def attention(heads, cos, sin, shared, shared_length, own, own_length, alive):
    """attend(qkv, cache, out) for all layers of one step.

    It rotates q and k, writes each row's k and v as the last of its own tokens, and lets the row
    attend to both its parts.

    heads: (query heads H, KV heads K, head_dim)
    cos, sin [rows, head_dim / 2]
    shared, shared_length [rows] int64: first token in the pool, a multiple of 16, and count of
        what the row shares; neighbours that share find it in the processor's cache
    own, own_length [rows] int64: the same for its own tokens, the new one included
    alive [rows] bool: a row that is not writes nothing

    qkv [rows, (H + 2K) * head_dim]: overwritten
    cache [2K, tokens, head_dim], one layer: keys of each KV head in units of [head_dim, 16 tokens],
        then values
    out [rows, H * head_dim]: rows that are not alive are left as they are
    """
    tensors = []
    for tensor in (cos, sin, shared, shared_length, own, own_length, alive):
        tensors.append(tensor.contiguous())

    head_dim = heads[2]
    pointers = [tensor.data_ptr() for tensor in tensors]
    tokens = 0  # each layer's cache says how many
    call = Call(*pointers, len(alive), *heads, tokens, head_dim**-0.5)

    def attend(qkv, cache, out):
        native = usable(qkv, head_dim)
        if native is None:
            attention_reference(heads, *tensors, qkv, cache, out)
            return
        call.tokens = cache.shape[1]
        native.attention(call, qkv.data_ptr(), cache.data_ptr(), out.data_ptr())

    return attend


def attention_reference(
    heads,
    cos,
    sin,
    shared,
    shared_length,
    own,
    own_length,
    alive,
    qkv,
    cache,
    out,
):
    """`attention` in torch, row by row."""
    query, kv, head_dim = heads
    keys = cache[:kv].view(kv, -1, head_dim, UNIT)
    values = cache[kv:]
    by_head = qkv[: len(alive)].view(len(alive), -1, head_dim)
    q, k, v = by_head.split([query, kv, kv], dim=1)
    q = apply_rope_reference(q, cos, sin)
    k = apply_rope_reference(k, cos, sin)

    # Each living row's new token.
    rows = alive.nonzero().squeeze(1)
    place = (own + own_length - 1)[rows]
    keys[:, place // UNIT, :, place % UNIT] = k[rows].to(cache.dtype)
    values[:, place] = v[rows].transpose(0, 1)

    for row in rows.tolist():
        seen_keys, seen_values = [], []
        for start, length in ((shared, shared_length), (own, own_length)):
            first = int(start[row])
            count = int(length[row])
            last_unit = (first + count - 1) // UNIT
            units = keys[:, first // UNIT : last_unit + 1]
            by_token = units.transpose(2, 3).flatten(1, 2)
            seen_keys.append(by_token[:, :count])
            seen_values.append(values[:, first : first + count])

        row_q = q[row].view(kv, -1, head_dim)
        row_keys = torch.cat(seen_keys, 1)
        row_values = torch.cat(seen_values, 1)
        scores = row_q @ row_keys.transpose(1, 2) * head_dim**-0.5
        out[row] = (scores.softmax(-1) @ row_values).flatten()


def rms_norm(x, weight, eps):
    """x [rows, D], weight [D] -> [rows, D]."""
    native = usable(x, x.shape[1])
    if native is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    out = torch.empty_like(x)
    tensors = addresses(x, None, weight, None, out, None)
    native.rms_norm(*tensors, *x.shape, eps)
    return out


def swiglu(gate_up):
    """gate_up [rows, 2 I] -> silu(gate) * up [rows, I]."""
    rows = len(gate_up)
    width = gate_up.shape[1] // 2
    native = usable(gate_up, width)
    if native is None:
        return F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
    out = torch.empty(rows, width)
    native.swiglu(*addresses(gate_up, out), rows, width)
    return out


def addresses(*tensors):
    """What C takes for tensors, which must be contiguous; None stays None."""
    return [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]


# ---- the library ----


def usable(x, width):
    """The library where it can take x and rows of this width, else None."""
    if not x.is_cpu or x.dtype != torch.float32 or width % UNIT != 0:
        return None
    return library(TARGET)


def takes(*widths):
    """Whether C takes rows of all these widths on a CPU."""
    return not any(width % UNIT for width in widths) and library(TARGET) is not None


@functools.cache
def library(target="native"):
    """native.c compiled for `target`, or None where no compiler makes it (said once).

    Built once per machine, source and flags, in the user's cache folder.
    """
    try:
        path = library_path(target)
        own_folder(path.parent)
        if not is_own_file(path):
            build(path, target)
        found = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        message = getattr(problem, "stderr", "") or str(problem)
        reason = message.strip().splitlines()[0]
        print(
            f"without the C kernels, which is slower ({reason}): they need a C compiler "
            "(apt-get install gcc libc6-dev) and a folder for what it makes (XDG_CACHE_HOME)",
            file=sys.stderr,
        )
        return None

    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    found.attention.argtypes = [ctypes.POINTER(Call), pointer, pointer, pointer]
    found.rms_norm.argtypes = [pointer] * 6 + [number, number, ctypes.c_float]
    found.rms_norm_backward.argtypes = [pointer] * 7 + [number] * 2
    found.swiglu.argtypes = [pointer] * 2 + [number] * 2
    found.swiglu_backward.argtypes = [pointer] * 3 + [number] * 2
    found.rotate.argtypes = [pointer] * 7 + [number] * 4
    found.rotate_backward.argtypes = [pointer] * 7 + [number] * 4
    found.attend_segments.argtypes = [pointer] * 6
    found.attend_segments_backward.argtypes = [pointer] * 10
    return found


def library_path(target="native"):
    """Where the compiled library is, or will be. RuntimeError where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    machine = (platform.node(), platform.machine(), torch.backends.cpu.get_cpu_capability())
    made_with = (FLAGS, MORE_FLAGS, target, *machine, torch.__version__)
    content = SOURCE.read_bytes() + repr(made_with).encode()
    digest = hashlib.sha256(content).hexdigest()
    return Path(cache) / "rarecode" / f"native-{digest[:16]}.so"


# What others put into the cache folder would run in this process.


def own_folder(folder):
    """Make a folder that is this user's alone to write; RuntimeError when it cannot be that."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    user = os.geteuid()
    if folder.is_symlink() or folder.stat().st_uid != user:
        raise RuntimeError(f"{folder} is somebody else's: name another XDG_CACHE_HOME")
    folder.chmod(0o700)

    for parent in folder.resolve().parents:
        info = parent.stat()
        # in a sticky one (/tmp) others can add, but not take away what is ours
        is_open = info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX
        if info.st_mode & stat.S_IWGRP and info.st_gid not in (0, os.getegid()):
            is_open = True
        if is_open or info.st_uid not in (0, user):
            raise RuntimeError(f"others can write to {parent}: name another XDG_CACHE_HOME")


def is_own_file(path):
    """Is it there, and did this user alone write it?"""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    is_open = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and not is_open


def build(path, target):
    """Compile native.c elsewhere and rename it to `path`: other ranks may be at it too."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        for more in MORE_FLAGS:
            flags = [*FLAGS, *(flag.format(target=target) for flag in more)]
            command = ["cc", *flags, str(SOURCE), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        done.check_returncode()
        built.chmod(0o700)
        built.rename(path)
