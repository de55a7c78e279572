"""Compile every Triton kernel for sm_80 and sm_90 on a machine without a GPU, and say what the compiler made of it.

    python -m bench.aot            table of registers, spills, shared memory and tensor-core instructions
    python -m bench.aot --json     the same, one JSON object per line

The launchers run on `meta` tensors of the Qwen2.5-Coder shapes with the launch itself replaced by a note of its arguments, so what is compiled is what
a GPU would run. Triton's wheel carries ptxas, cuobjdump and nvdisasm; no driver is needed. Not with TRITON_INTERPRET=1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from kernels import TensorDescriptor, advantage, attention, head, layers, linear, sampling, triton

ARCHITECTURES = (80, 90)
SHARED_LIMIT = {
    80: 166_912,
    90: 232_448,
}  # bytes of shared memory a block may ask for; the compiler does not check it
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
# hidden, intermediate, query heads, KV heads, head dim
SHAPES = {
    "0.5B": (896, 4864, 14, 2, 64),
    "1.5B": (1536, 8960, 12, 2, 128),
    "3B": (2048, 11008, 16, 2, 128),
    "SmolLM-135M": (576, 1536, 9, 3, 64),
}
VOCABULARY = 151_936
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL")


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def floats(*shape):
    return tensor(*shape, dtype=torch.float32)


def integers(*shape):
    return tensor(*shape, dtype=torch.int64)


def launch_all(arch):
    """Call every launcher once per shape that changes its compiled code."""
    for name, (width, intermediate, heads, kv_heads, head_dim) in SHAPES.items():
        launch_attention(heads, kv_heads, head_dim, 8192 // head_dim, arch)
        if name in ("0.5B", "1.5B"):  # the row kernels of the others are the same code
            launch_layers(width, intermediate, heads, kv_heads, head_dim)
    launch_attention(14, 2, 64, 16, arch)  # the smallest page, where a tile is 16 tokens
    linear._linear(tensor(256, 1536), tensor(2048, 1536), arch)
    hidden, weight, rows, column = (
        tensor(4096, 1536),
        tensor(VOCABULARY, 1536),
        integers(4096),
        floats(4096),
    )
    head.stats(hidden, weight, rows, 1.0, arch)
    head.gradient(hidden, weight, rows, column, column, column, column, 1.0, arch)
    head.logit_stats(floats(4096, VOCABULARY), rows, 1.0)
    head.logit_gradient(
        floats(4096, VOCABULARY), rows, column, column, column, column, 1.0, torch.bfloat16
    )
    for batch in (64, 512):
        sampling._sample_tokens(
            tensor(batch, 1536), weight, floats(batch), *(integers(batch) for _ in range(4)), arch
        )
    for kind in ("grpo", "batch", "whiten"):
        advantage._group_advantages(
            floats(512), integers(512), kind, 1e-4, 1, integers(512) if kind == "whiten" else None
        )
    advantage._PolicyLoss.apply(
        *(floats(65_536) for _ in range(4)), 0.2, 0.28, floats(65_536), None, 0.0
    )
    advantage._PolicyLoss.apply(
        *(floats(65_536) for _ in range(4)), 0.2, 0.28, floats(65_536), floats(65_536), 0.01
    )


def launch_layers(width, intermediate, heads, kv_heads, head_dim):
    x, weight, gate_up = tensor(8192, width), tensor(width), tensor(8192, 2 * intermediate)
    for residual in (None, x):
        y, total, rstd = layers._rms_norm_forward(x, residual, weight, 1e-6)
        layers._rms_norm_backward(y, residual, total, weight, rstd)
    layers._swiglu_forward(gate_up)
    layers._swiglu_backward(gate_up, tensor(8192, intermediate))
    table, q = floats(8192, head_dim // 2), tensor(8192, heads, head_dim)
    layers._rotate(q, table, table, 1)
    layers._rotate(q, table, table, -1)
    pages, qkv = tensor(64, kv_heads, 64, head_dim), tensor(8192, (heads + 2 * kv_heads) * head_dim)
    layers._qkv_rope_write(qkv, qkv[0], table, table, pages, pages, integers(8192), heads)


def launch_attention(heads, kv_heads, head_dim, page_size, arch):
    q, pages = tensor(256, heads, head_dim), tensor(4096, kv_heads, page_size, head_dim)
    tables, lengths = (
        tensor(256, 2048 // page_size, dtype=torch.int32),
        tensor(256, dtype=torch.int32),
    )
    scale = head_dim**-0.5
    attention._paged_attention(q, pages, pages, tables, lengths, scale, arch=arch)
    attention._paged_attention(
        q, pages, pages, tables, lengths, scale, lengths, integers(256), arch
    )


def recorded_launches(arch):
    """(kernel, arguments by name, compile options) of every distinct launch of `launch_all`."""
    notes = {}

    def note(kernel, *arguments, grid, warmup, **keywords):
        options = {
            name: keywords.pop(name)
            for name in ("num_warps", "num_stages", "maxnreg")
            if name in keywords
        }
        named = dict(zip(kernel.arg_names, arguments)) | keywords
        kinds = [
            describe(kernel.params[i].is_constexpr, named[name])
            for i, name in enumerate(kernel.arg_names)
        ]
        notes.setdefault(
            (kernel.__name__, str(kinds), str(options)),
            (kernel, dict(zip(kernel.arg_names, kinds)), options),
        )

    run, triton.JITFunction.run = triton.JITFunction.run, note
    try:
        launch_all(arch)
    finally:
        triton.JITFunction.run = run
    return list(notes.values())


def describe(is_constexpr, value):
    """(type, constant or None, divisible by 16) as Triton's own launcher specialises an argument."""
    if is_constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], None, True
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", None, False
    if isinstance(value, float):
        return "fp32", None, False
    return ("constexpr", 1, False) if value == 1 else ("i32", None, value % 16 == 0)


def compile_kernel(kernel, arguments, options, arch):
    """Compile one launch -> dict of facts, read from the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: kind for name, (kind, _, _) in arguments.items()}
    constants = {name: value for name, (kind, value, _) in arguments.items() if kind == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (_, _, divisible) in enumerate(arguments.values())
        if divisible
    }
    start = time.process_time()
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    shape = " ".join(
        f"{name}={value}"
        for name, value in constants.items()
        if name.isupper() and isinstance(value, (int, str)) and value not in (0, 1)
    )
    facts = {
        "kernel": kernel.__name__.strip("_"),
        "arch": arch,
        "shape": shape,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
    }
    return (
        facts
        | read_machine_code(compiled.asm["cubin"])
        | {"seconds": round(time.process_time() - start, 2)}
    )


def read_machine_code(cubin):
    """Registers, stack bytes and counts of the instructions that tell tensor cores, asynchronous copies and spills."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        code = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    facts = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
    }
    return facts | {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}


def compile_architecture(arch):
    return [compile_kernel(*launch, arch) for launch in recorded_launches(arch)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line in place of the table"
    )
    options = parser.parse_args(arguments)
    if (
        triton is None
        or not hasattr(triton.JITFunction, "run")
        or not isinstance(head._stats_kernel, triton.JITFunction)
    ):
        raise SystemExit(
            "bench.aot needs Triton without its interpreter: unset TRITON_INTERPRET (Linux only)"
        )
    with ProcessPoolExecutor(len(ARCHITECTURES)) as pool:
        facts = [row for rows in pool.map(compile_architecture, ARCHITECTURES) for row in rows]
    columns = ("kernel", "arch", "shape", "warps", "registers", "stack", "shared", *INSTRUCTIONS)
    if not options.json:
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in facts:
        print(
            json.dumps(row)
            if options.json
            else "| " + " | ".join(str(row[name]) for name in columns) + " |"
        )


if __name__ == "__main__":
    sys.exit(main())
