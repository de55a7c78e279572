"""Compile every Triton kernel for sm_80 and sm_90 on a machine without a GPU, and say what the
compiler made of it.

    python -m bench.aot            table of registers, spills, shared memory, programs that run on
                                   one multiprocessor at a time, and tensor-core instructions
    python -m bench.aot --json     the same, one JSON object per line
    python -m bench.aot --exact    how often each kernel of the exact mode is compiled for batches
                                   of all kinds: once, or sampler and trainer would differ

The launchers run on `meta` tensors of the Qwen2.5-Coder shapes with the launch itself replaced by a
note of its arguments, so what is compiled is what a GPU would run. Triton's wheel carries ptxas,
cuobjdump and nvdisasm; no driver is needed. Not with TRITON_INTERPRET=1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels import advantage, attention, head, layers, linear, sampling, triton
from kernels.rows import Rows, _begin
from runtime import exact

ARCHITECTURES = (80, 90)
# Bytes of shared memory a block may ask for; the compiler does not check it.
SHARED_LIMIT = {80: 166_912, 90: 232_448}
# Of one multiprocessor: shared memory of which every program also takes 1 KB, registers, threads,
# programs (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 167_936, 90: 233_472}
REGISTERS = 65_536
THREADS = 2048
PROGRAMS = 32
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")
COLUMNS = ("kernel", "arch", "shape", "warps", "registers", "stack", "shared")
COLUMNS += ("programs", *INSTRUCTIONS)
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def qkv(self):
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = {
    "0.5B": Shape(896, 4864, 14, 2, 64),
    "1.5B": Shape(1536, 8960, 12, 2, 128),
    "3B": Shape(2048, 11008, 16, 2, 128),
    "SmolLM-135M": Shape(576, 1536, 9, 3, 64),
}
VOCABULARY = 151_936
TOKENS = 8192  # of a training micro-batch
CHUNK = 4096  # tokens the lm_head takes at a time
ROLLOUTS = 512
# Batches of the exact mode: rows, multiples of 16 and others, and pages of the longest sequence.
EXACT_ROWS = (1, 7, 16, 64, 100, 1000)
EXACT_PAGES = (1, 5, 16, 64, 67)


class Launch(NamedTuple):
    """What one compilation is for.

    arguments: name -> (type, how Triton's launcher specialises it: "D" for a multiple of 16 or a
        pointer aligned to 16 bytes; for "constexpr" the value).
    """

    kernel: Any
    arguments: dict[str, tuple]
    options: dict[str, int]


# ---- what is launched ----


def launch_all(arch):
    """Call every launcher once per shape that changes its compiled code."""
    for name, shape in SHAPES.items():
        launch_attention(shape, exact.page_size(shape))
        if name in ("0.5B", "1.5B"):  # the row kernels of the others are the same code
            launch_layers(shape)
    # The smallest page, where a tile is 16 tokens.
    launch_attention(SHAPES["0.5B"], page_size=16)

    width = SHAPES["1.5B"].hidden
    linear._linear(tensor(256, width), tensor(2048, width), arch)

    weight = tensor(VOCABULARY, width)
    hidden = tensor(CHUNK, width)
    targets = integers(CHUNK)
    column = floats(CHUNK)
    head.stats(hidden, weight, targets, 1.0, arch)
    head.gradient(hidden, weight, targets, column, column, column, column, 1.0, arch)

    for rows in (sampling.FEW_ROWS, 512):
        sampling.draw(tensor(rows, width), weight, floats(rows), floats(2, rows), arch)
        launch_step(tensor(rows, width), weight, SHAPES["1.5B"], arch)

    rewards = floats(ROLLOUTS)
    group_ids = integers(ROLLOUTS)
    for weights in (None, integers(ROLLOUTS)):
        advantage._group_statistics(rewards, group_ids, weights)


def launch_exact(arch):
    """Call every launcher of the exact mode's forward with batches of all kinds, of one model.

    Those of the trainer are parts of a larger one: they begin anywhere in it.
    """
    shape = SHAPES["1.5B"]
    head_dim = shape.head_dim
    weight = tensor(VOCABULARY, shape.hidden)
    pages = tensor(4096, shape.kv_heads, exact.page_size(shape), head_dim)

    for rows in EXACT_ROWS:
        for first in (0, 7):
            x = tensor(first + rows, shape.hidden)[first:]
            targets = integers(first + rows)[first:]
            head.stats(x, weight, targets, 1.0, arch)
        launch_step(x, weight, shape, arch, one_tile=True)

        linear._linear(x, tensor(shape.qkv, shape.hidden), arch)
        layers._rms_norm_forward(x, x, tensor(shape.hidden), 1e-6)
        layers._swiglu_forward(tensor(rows, 2 * shape.intermediate))
        qkv = tensor(rows, shape.qkv)
        table = floats(rows, head_dim // 2)
        slots = integers(rows)
        layers._qkv_rope_write(qkv, qkv[0], table, table, pages, pages, slots, shape.heads)

        q = tensor(rows, shape.heads, head_dim)
        lengths = tensor(rows, dtype=torch.int32)
        for count in EXACT_PAGES:
            tables = tensor(rows, count, dtype=torch.int32)
            attention._paged_attention(q, pages, pages, tables, lengths, 0.1)


def launch_step(hidden, weight, shape, arch, one_tile=False):
    """The first and the last kernels of a decode step, of rows with 8 stop ids and 16 pages."""
    rows = Rows(slots=len(hidden), stops=8, pages=16, longest=1024, device="meta")
    active = rows.active[: len(hidden)]
    table = floats(2048, shape.head_dim // 2)
    step = _begin(rows, active, table, table, exact.page_size(shape))
    moved = (rows, active, step.column)
    sampling.draw(hidden, weight, step.temperature, step.uniforms, arch, one_tile, moved)


def launch_layers(shape):
    x = tensor(TOKENS, shape.hidden)
    weight = tensor(shape.hidden)
    for residual in (None, x):
        y, total, rstd = layers._rms_norm_forward(x, residual, weight, 1e-6)
        layers._rms_norm_backward(y, residual, total, weight, rstd)

    gate_up = tensor(TOKENS, 2 * shape.intermediate)
    layers._swiglu_forward(gate_up)
    layers._swiglu_backward(gate_up, tensor(TOKENS, shape.intermediate))

    table = floats(TOKENS, shape.head_dim // 2)
    qkv = tensor(TOKENS, shape.qkv)
    for bias in (None, qkv[0]):
        parts = layers._rotated_qkv(qkv, bias, table, table, shape.heads, shape.kv_heads)
        layers._rotated_qkv_backward(*parts, table, table, bias is not None)

    pages = tensor(64, shape.kv_heads, 64, shape.head_dim)
    slots = integers(TOKENS)
    layers._qkv_rope_write(qkv, qkv[0], table, table, pages, pages, slots, shape.heads)


def launch_attention(shape, page_size):
    rows = 256
    context = 2048
    scale = shape.head_dim**-0.5
    q = tensor(rows, shape.heads, shape.head_dim)
    pages = tensor(4096, shape.kv_heads, page_size, shape.head_dim)
    tables = tensor(rows, context // page_size, dtype=torch.int32)
    lengths = tensor(rows, dtype=torch.int32)

    inputs = (q, pages, pages, tables, lengths, scale)
    attention._paged_attention(*inputs)


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def floats(*shape):
    return tensor(*shape, dtype=torch.float32)


def integers(*shape):
    return tensor(*shape, dtype=torch.int64)


# ---- compiling ----


def compile_architecture(arch):
    """Facts of every distinct launch."""
    return [compile_kernel(launch, arch) for launch in recorded_launches(arch)]


def recorded_launches(arch, launch=launch_all):
    """Every distinct launch of `launch(arch)`."""
    from triton.runtime.jit import create_function_from_signature

    backend = backend_of(arch)
    launches = {}

    def note(kernel, *arguments, grid, warmup, **keywords):
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        specialise = create_function_from_signature(kernel.signature, kernel.params, backend)
        named, specialised, _ = specialise(*arguments, **keywords)
        described = dict(zip(named, specialised))
        key = (kernel.__name__, str(described), str(options))
        launches.setdefault(key, Launch(kernel, described, options))

    run = triton.JITFunction.run
    triton.JITFunction.run = note
    try:
        launch(arch)
    finally:
        triton.JITFunction.run = run
    return list(launches.values())


def backend_of(arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", arch, 32))


def compile_kernel(launch, arch):
    """Compile one launch -> dict of facts, read from the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = backend_of(arch)
    signature, constants, attributes = {}, {}, {}
    for position, (name, (kind, specialised)) in enumerate(launch.arguments.items()):
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = specialised
        elif specialised:
            attributes[(position,)] = backend.parse_attr(specialised)

    start = time.process_time()
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs=constants,
        attrs=attributes,
    )
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=launch.options)

    shape = []
    for name, value in constants.items():
        is_size = name.isupper() and isinstance(value, (int, str))
        if is_size and value not in (0, 1):
            shape.append(f"{name}={value}")
    facts = {
        "kernel": launch.kernel.__name__.strip("_"),
        "arch": arch,
        "shape": " ".join(shape),
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
    }
    facts |= read_machine_code(compiled.asm["cubin"])
    facts["programs"] = resident_programs(arch, facts["warps"], facts["registers"], facts["shared"])
    return facts | {"seconds": round(time.process_time() - start, 2)}


def resident_programs(arch, warps, registers, shared):
    """Programs that one multiprocessor runs at a time.

    registers: of a thread; they are given out by 8, to warps, from four files of 16,384 each.
    4 warps of 128 registers: 4 of them in each file, so 4 programs. With 64 KB of shared memory:
    3 of 65 KB in Hopper's 228.
    """
    of_a_warp = 32 * -(-registers // 8) * 8
    by_registers = 4 * (REGISTERS // 4 // of_a_warp) // warps
    by_threads = THREADS // (32 * warps)
    by_shared = SHARED[arch] // (shared + 1024)
    return min(PROGRAMS, by_registers, by_threads, by_shared)


def read_machine_code(cubin):
    """Registers, stack bytes, and counts of the instructions that tell something.

    HGMMA and HMMA: tensor cores. UTMALDG and LDGSTS: asynchronous copies. LDL and STL: spills.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output_of(tools / "cuobjdump", "-res-usage", file.name)
        code = output_of(tools / "nvdisasm", "-c", file.name)

    facts = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
    }
    for name in INSTRUCTIONS:
        facts[name] = len(re.findall(rf"\b{name}\b", code))
    return facts


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--exact", action="store_true", help="compilations of the exact mode")
    options = parser.parse_args(arguments)

    is_compiler = hasattr(triton, "JITFunction") and hasattr(triton.JITFunction, "run")
    if not is_compiler or not isinstance(head._stats_kernel, triton.JITFunction):
        raise SystemExit(
            "bench.aot needs Triton without its interpreter: unset TRITON_INTERPRET (Linux only)"
        )

    if options.exact:
        for arch in ARCHITECTURES:
            launches = recorded_launches(arch, launch_exact)
            counts = Counter(launch.kernel.__name__ for launch in launches)
            print(json.dumps({"arch": arch, "compilations": counts}))
        return

    facts = []
    with ProcessPoolExecutor(len(ARCHITECTURES)) as pool:
        for rows in pool.map(compile_architecture, ARCHITECTURES):
            facts += rows

    if options.json:
        for row in facts:
            print(json.dumps(row))
        return
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in facts:
        print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |")


if __name__ == "__main__":
    sys.exit(main())
