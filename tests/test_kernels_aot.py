"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU: no spills, registers and shared memory within budget, tensor cores in use."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent

# Most registers per thread, (kernel, architecture) -> limit; 255 is the hardware's. 128 at 256 threads is what lets two programs share a
# multiprocessor and hide each other's epilogue, 168 at 128 threads three.
REGISTERS = {
    ("stats_kernel", 90): 128, ("gradient_kernel", 90): 128, ("draw_kernel", 90): 168, ("decode_kernel", 90): 144, ("prefix_kernel", 90): 232,
    ("linear_kernel", 80): 168, ("stats_kernel", 80): 192, ("gradient_kernel", 80): 192, ("draw_kernel", 80): 240, ("decode_kernel", 80): 144, ("prefix_kernel", 80): 240,
}  # fmt: skip
ROW_KERNEL_REGISTERS = 128
# Instruction that proves tensor cores: HGMMA is Hopper's WGMMA, HMMA the older kind, which a 16-row decode tile uses on both.
TENSOR_CORES = {
    "stats_kernel": "HGMMA",
    "gradient_kernel": "HGMMA",
    "draw_kernel": "HGMMA",
    "prefix_kernel": "HGMMA",
    "decode_kernel": "HMMA",
    "linear_kernel": "HGMMA",
}


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_is_compiled_for_both_architectures(compiled):
    written = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def _(\w+_kernel)\(", path.read_text(), re.M)
    }
    for arch in (80, 90):
        assert {row["kernel"] for row in compiled if row["arch"] == arch} == written


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack"] or row["LDL"] or row["STL"]] == []


def test_registers_and_shared_memory_stay_within_budget(compiled):
    for row in compiled:
        assert row["registers"] <= REGISTERS.get(
            (row["kernel"], row["arch"]), ROW_KERNEL_REGISTERS
        ), row
        assert row["shared"] <= {80: 166_912, 90: 232_448}[row["arch"]], row
        if row["arch"] == 90 and "ROWS=128 TILE=128" in row["shape"]:
            assert (
                2 * row["registers"] * 32 * row["warps"] <= 65_536 and 2 * row["shared"] <= 232_448
            ), row


def test_matrix_products_run_on_tensor_cores_and_load_asynchronously(compiled):
    for row in compiled:
        if row["kernel"] in TENSOR_CORES:
            assert row[TENSOR_CORES[row["kernel"]] if row["arch"] == 90 else "HMMA"] > 0, row
            tma = row["arch"] == 90 and row["kernel"] in (
                "stats_kernel",
                "gradient_kernel",
                "draw_kernel",
                "linear_kernel",
            )
            assert row["UTMALDG" if tma else "LDGSTS"] > 0, row
