"""The sampler's row kernels on a CPU: attention over the page pool, RMSNorm and SwiGLU in C (native.c), compiled on first use, fp32.

The torch references are what runs where there is no C compiler, for other dtypes and for widths that are no multiple of 16. Every result depends on its own
row alone, to the last bit, in C as in the references.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from kernels.layers import apply_rope_reference

LANES = 16  # tokens in a unit of keys, floats in a vector of native.c
SOURCE = Path(__file__).with_name("native.c")
FLAGS = ["-O3", "-fPIC", "-shared", "-std=gnu11"]
MORE = (
    ["-march=native", "-fopenmp"],
    ["-march=native"],
    [],
)  # the first that the compiler takes: Apple's has no OpenMP, and then one thread does it


class Call(ctypes.Structure):
    """native.c's Call: what all layers of one step or prefill pass share."""

    POINTERS = ("cos", "sin", "shared", "shared_length", "own", "own_length", "alive")
    NUMBERS = ("rows", "heads", "kv_heads", "head_dim", "tokens")
    _fields_ = (
        [(n, ctypes.c_void_p) for n in POINTERS]
        + [(n, ctypes.c_int64) for n in NUMBERS]
        + [("scale", ctypes.c_float)]
    )


@functools.cache
def library():
    """The compiled native.c, or None where no compiler makes it (said once). Built once per machine, source and flags, in the user's cache folder."""
    what = (
        SOURCE.read_bytes()
        + repr((FLAGS, MORE, platform.node(), platform.machine(), torch.__version__)).encode()
    )
    try:
        folder = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rarecode"
        )  # RuntimeError where there is no home
        path = folder / f"native-{hashlib.sha256(what).hexdigest()[:16]}.so"
        if not path.exists():
            build(folder, path)
        found = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        reason = (getattr(problem, "stderr", "") or str(problem)).strip().splitlines()[0]
        needs = "a C compiler (apt-get install gcc libc6-dev) and a folder for what it makes (XDG_CACHE_HOME)"
        print(
            f"sampling without the C kernels, which is slower ({reason}): they need {needs}",
            file=sys.stderr,
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.attention.argtypes = [ctypes.POINTER(Call), pointer, pointer, pointer]
    found.rms_norm.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_float]
    found.swiglu.argtypes = [pointer, pointer, number, number]
    return found


def build(folder, path):
    """Compile native.c to `path` in `folder`, elsewhere first and then renamed: other ranks may be at it too."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        built = Path(place) / path.name
        for more in MORE:
            done = subprocess.run(
                ["cc", *FLAGS, *more, str(SOURCE), "-o", str(built), "-lm"],
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        built.rename(path)


def usable(x, *widths):
    """The library where it can take x and rows of these widths, else None."""
    return (
        library()
        if x.dtype == torch.float32 and all(width % LANES == 0 for width in widths)
        else None
    )


def rms_norm(x, weight, eps):
    """x [rows, D], weight [D] -> [rows, D]."""
    native = usable(x, x.shape[1])
    if native is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    out = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, eps)
    return out


def swiglu(gate_up):
    """gate_up [rows, 2 I] -> silu(gate) * up [rows, I]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    native = usable(gate_up, width)
    if native is None:
        return F.silu(gate_up[:, :width]).mul_(gate_up[:, width:])
    out = torch.empty(rows, width)
    native.swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width)
    return out


def attention(heads, cos, sin, shared, shared_length, own, own_length, alive):
    """attend(qkv, cache, out) for all layers of one step: rotates q and k, writes each row's k and v as the last of its own tokens, attends to both parts.

    heads: (query heads, KV heads, head_dim). cos, sin [rows, head_dim / 2]. A row sees `shared_length` tokens from `shared` on in the pool and then
    `own_length`, its new one included, from `own` on (int64 [rows]; both start at a multiple of 16). What is not alive writes nothing.
    qkv [rows, (H + 2K) * head_dim], overwritten. cache [2K, tokens, head_dim], one layer: keys of each KV head in units of [head_dim, 16 tokens], then
    values. out [rows, H * head_dim]: rows that are not alive are left as they are. Neighbours that share tokens find them in the processor's cache.
    """
    tensors = tuple(
        x.contiguous() for x in (cos, sin, shared, shared_length, own, own_length, alive)
    )
    call = Call(*(x.data_ptr() for x in tensors), len(alive), *heads, 0, heads[2] ** -0.5)

    def attend(qkv, cache, out):
        native = usable(qkv, heads[2])
        if native is None:
            return attention_reference(heads, *tensors, qkv, cache, out)
        call.tokens = cache.shape[1]
        native.attention(call, qkv.data_ptr(), cache.data_ptr(), out.data_ptr())

    return attend


def attention_reference(
    heads, cos, sin, shared, shared_length, own, own_length, alive, qkv, cache, out
):
    """`attention` in torch, row by row."""
    query, kv, head_dim = heads
    keys, values = cache[:kv].view(kv, -1, head_dim, LANES), cache[kv:]
    q, k, v = qkv[: len(alive)].view(len(alive), -1, head_dim).split([query, kv, kv], dim=1)
    q, k, place = (
        apply_rope_reference(q, cos, sin),
        apply_rope_reference(k, cos, sin),
        own + own_length - 1,
    )
    rows = alive.nonzero().squeeze(1)
    keys[:, place[rows] // LANES, :, place[rows] % LANES] = k[rows].to(cache.dtype)
    values[:, place[rows]] = v[rows].transpose(0, 1)
    for row in rows.tolist():
        spans = [
            (int(start[row]), int(length[row]))
            for start, length in ((shared, shared_length), (own, own_length))
        ]
        units = [
            keys[:, a // LANES : -(-(a + n) // LANES)].transpose(2, 3).flatten(1, 2)[:, :n]
            for a, n in spans
        ]
        seen = torch.cat(units, 1), torch.cat([values[:, a : a + n] for a, n in spans], 1)
        weights = (
            q[row].view(kv, -1, head_dim) @ seen[0].transpose(1, 2) * head_dim**-0.5
        ).softmax(-1)
        out[row] = (weights @ seen[1]).flatten()
