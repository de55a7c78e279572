"""Every Triton kernel compiled for sm_80 and sm_90 without a GPU: no spills, registers and shared
memory within budget, tensor cores in use."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # compiles some 90 launches: a minute of two cores
from bench.aot import SHARED_LIMIT, resident_programs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Most registers per thread, (kernel, architecture) -> limit; 255 is the hardware's. 128 at 256
# threads is what lets two programs share a multiprocessor and hide each other's epilogue, 168 at
# 128 threads three.
REGISTERS = {
    ("stats_kernel", 90): 128,
    ("gradient_kernel", 90): 128,
    ("draw_kernel", 90): 168,
    ("decode_kernel", 90): 128,
    ("stats_kernel", 80): 192,
    ("gradient_kernel", 80): 192,
    ("draw_kernel", 80): 240,
    ("decode_kernel", 80): 128,
    ("linear_kernel", 80): 168,
}
ROW_KERNEL_REGISTERS = 128

# Fewest programs that a multiprocessor runs at a time on either architecture, as compiled: one that
# takes more registers or shared memory falls below.
PROGRAMS = {
    "stats_kernel": 1,
    "gradient_kernel": 2,
    "draw_kernel": 1,
    "linear_kernel": 3,
    "decode_kernel": 2,
    "merge_splits_kernel": 7,
    "merge_tiles_kernel": 6,
    "choose_kernel": 4,
    "group_statistics_kernel": 7,
    "rms_norm_backward_kernel": 5,
    "rotated_qkv_kernel": 10,
    "rotated_qkv_backward_kernel": 9,
}
ROW_KERNEL_THREADS = 1024  # of the others: half of what a multiprocessor has


# Instruction that proves tensor cores: HGMMA is Hopper's WGMMA, HMMA the older kind, which a 16-row
# decode tile uses on both.
TENSOR_CORES = {
    "stats_kernel": "HGMMA",
    "gradient_kernel": "HGMMA",
    "draw_kernel": "HGMMA",
    "linear_kernel": "HGMMA",
    "decode_kernel": "HMMA",
}
TMA = {"stats_kernel", "gradient_kernel", "draw_kernel", "linear_kernel"}


@pytest.fixture(scope="module")
def compiled():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
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
    written = set()
    for path in (ROOT / "kernels").glob("*.py"):
        written |= set(re.findall(r"^def _(\w+_kernel)\(", path.read_text(), re.M))
    for arch in (80, 90):
        assert {row["kernel"] for row in compiled if row["arch"] == arch} == written


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack"] or row["LDL"] or row["STL"]] == []


def test_registers_and_shared_memory_stay_within_budget(compiled):
    for row in compiled:
        limit = REGISTERS.get((row["kernel"], row["arch"]), ROW_KERNEL_REGISTERS)
        assert row["registers"] <= limit, row
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], row


def test_programs_of_a_multiprocessor():
    """By registers, shared memory and threads; the first two as the function's example says."""
    assert resident_programs(90, warps=4, registers=128, shared=0) == 4
    assert resident_programs(90, warps=4, registers=128, shared=64 * 1024) == 3
    assert resident_programs(80, warps=4, registers=128, shared=64 * 1024) == 2
    assert resident_programs(90, warps=8, registers=32, shared=0) == 8
    assert resident_programs(90, warps=1, registers=16, shared=0) == 32


def test_enough_programs_share_a_multiprocessor(compiled):
    for row in compiled:
        threads = 32 * row["warps"]
        least = PROGRAMS.get(row["kernel"], ROW_KERNEL_THREADS // threads)
        assert row["programs"] >= least, row


def test_two_programs_of_a_large_tile_share_a_hopper_multiprocessor(compiled):
    large = [row for row in compiled if row["arch"] == 90 and "ROWS=128 TILE=128" in row["shape"]]
    assert large
    for row in large:
        assert row["programs"] >= 2, row


def test_decode_attention_keeps_many_tiles_on_their_way(compiled):
    """On Hopper six programs with two tiles of keys and two of values each, 8 KB a tile, at head dim
    64: 192 KB; at 128 three, with tiles of twice the size. On sm_80, with less memory, fewer."""
    for row in compiled:
        if row["arch"] == 90 and row["kernel"] == "decode_kernel":
            assert row["programs"] >= (6 if "HD=64" in row["shape"] else 3), row


def test_matrix_products_run_on_tensor_cores_and_load_asynchronously(compiled):
    for row in compiled:
        kernel, is_hopper = row["kernel"], row["arch"] == 90
        if kernel not in TENSOR_CORES:
            continue
        product = TENSOR_CORES[kernel] if is_hopper else "HMMA"
        loads = "UTMALDG" if is_hopper and kernel in TMA else "LDGSTS"
        assert row[product] > 0, row
        assert row[loads] > 0, row
