"""The C kernels of the CPU sampler against their torch references: values, bits that do not depend
on the batch, for the registers of several processors, and what happens without a compiler."""

import os
import platform
import re
import stat
import subprocess

import pytest
import torch

from bench import processor
from kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")

# Blocks are sized by the registers: 32 of 16 floats, 16 of 8, 16 of 4. Older than this machine's.
X86 = platform.machine() == "x86_64"
HAS_AVX2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
OLDER = ["x86-64-v3"] * (X86 and HAS_AVX2) + ["x86-64"] * X86
each_target = pytest.mark.parametrize("target", ["native", *OLDER])

# (shared, own) tokens of each row. Every page run is 64 tokens; the third row is not alive.
LENGTHS = [(0, 1), (5, 16), (9, 3), (16, 17), (633, 64), (1, 2), (40, 33)]
DEAD = 2


def attention_case(heads, lengths):
    """(cos, sin, ..., alive of `native.attention`), qkv, cache: random keys and values."""
    query, kv, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    rows = len(lengths)
    run = 64
    tokens = run * rows + 640
    angle = torch.rand(rows, head_dim // 2, generator=generator)
    where = (
        torch.full((rows,), run * rows),  # all share what stands behind the runs
        torch.tensor([shared for shared, _ in lengths]),
        torch.arange(rows) * run,
        torch.tensor([own for _, own in lengths]),
        torch.arange(rows) != DEAD,
    )
    qkv = torch.randn(rows, (query + 2 * kv) * head_dim, generator=generator)
    cache = torch.randn(2 * kv, tokens, head_dim, generator=generator)
    return (angle.cos(), angle.sin(), *where), qkv, cache


def attend(heads, tensors, qkv, cache):
    """(out, cache afterwards); out is 7 where nothing is written."""
    query, _, head_dim = heads
    cache = cache.clone()
    out = torch.full((len(qkv), query * head_dim), 7.0)
    native.attention(heads, *tensors)(qkv.clone(), cache, out)
    return out, cache


@each_target
@pytest.mark.parametrize(
    "heads",  # query heads per KV head: all that one block takes, and more (9 is 5 + 4)
    [
        (4, 4, 16),
        (16, 8, 48),
        (9, 3, 64),
        (8, 2, 80),
        (5, 1, 32),
        (12, 2, 128),
        (14, 2, 64),
        (8, 1, 256),
        (9, 1, 64),
        (17, 1, 16),
    ],
)
def test_attention_is_the_reference(heads, target, monkeypatch):
    monkeypatch.setattr(native, "TARGET", target)
    tensors, qkv, cache = attention_case(heads, LENGTHS)
    out, written = attend(heads, tensors, qkv, cache)

    expected = torch.full_like(out, 7.0)
    expected_cache = cache.clone()
    native.attention_reference(heads, *tensors, qkv.clone(), expected_cache, expected)
    assert torch.allclose(out, expected, atol=3e-6, rtol=1e-5)
    assert torch.allclose(written, expected_cache, atol=1e-6)

    # Nothing but the new key and value of each living row was written.
    _, kv, head_dim = heads
    assert (out[DEAD] == 7).all()
    living = len(LENGTHS) - 1
    assert (written != cache).sum() == living * 2 * kv * head_dim


@each_target
def test_a_row_is_the_same_alone_and_with_any_threads(target, monkeypatch):
    monkeypatch.setattr(native, "TARGET", target)
    heads = (14, 2, 64)
    tensors, qkv, cache = attention_case(heads, LENGTHS)

    # Forty copies are enough work to be shared out; each writes what the others write.
    torch.set_num_threads(2)
    copies = [torch.cat([x] * 40) for x in tensors]
    many, _ = attend(heads, copies, torch.cat([qkv] * 40), cache)
    together = many.view(40, len(LENGTHS), -1)

    torch.set_num_threads(1)
    for row in range(len(LENGTHS)):
        if row == DEAD:
            continue
        one = slice(row, row + 1)
        its_own = [x[one] for x in tensors]
        alone, _ = attend(heads, its_own, qkv[one], cache)
        assert (together[:, row] == alone).all()


@each_target
def test_norm_and_swiglu_are_the_references(target, monkeypatch):
    monkeypatch.setattr(native, "TARGET", target)
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(37, 576, generator=generator)
    x[0, :4] = torch.tensor([200.0, -200.0, 88.0, 0.0])  # far tails of the sigmoid
    weight = torch.rand(576, generator=generator)

    ours = native.rms_norm(x, weight, 1e-6), native.swiglu(x)
    monkeypatch.setattr(native, "library", lambda target: None)
    theirs = native.rms_norm(x, weight, 1e-6), native.swiglu(x)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-6)


def test_widths_that_fill_no_vector_and_other_dtypes_take_the_reference():
    assert native.usable(torch.zeros(1), 16) is not None
    assert native.usable(torch.zeros(1), 24) is None
    assert native.usable(torch.zeros(1, dtype=torch.float64), 16) is None
    ones = torch.ones(2, 24)
    assert native.rms_norm(ones, torch.ones(24), 0.0).equal(ones)


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
@pytest.mark.parametrize("target, register", [("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")])
def test_a_block_of_sums_stays_in_registers(target, register, tmp_path):
    """No loop over products stores a vector: spilt sums made AVX2 nine times slower."""
    said = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in said:
        pytest.skip("reads GCC's assembly")
    listing = tmp_path / "native.s"
    flags = [*native.FLAGS, f"-march={target}", "-S", "-o", str(listing)]
    subprocess.run(["cc", *flags, str(native.SOURCE)], check=True)
    loops = innermost_loops(listing.read_text())
    products = [loop for loop in loops if loop.count("vfmadd231ps") >= 7]
    assert len(products) >= 8  # scores and values of 7 and 8 queries among them
    for loop in products:
        assert not re.search(rf"vmovu?a?ps\s+%{register}\d+, [^%]*\(", loop)


def innermost_loops(assembly):
    """Text between a label and the next jump back to it with no other label between."""
    loop = re.compile(r"^(\.L\d+):\n(?:\t.*\n)*?\tj\w+\t\1\n", re.M)
    return [found[0] for found in loop.finditer(assembly)]


def test_without_a_compiler_one_sentence_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is None
    assert "apt-get install gcc" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


def test_the_library_is_this_users_alone(monkeypatch, tmp_path, capsys):
    """What others may have put into the cache folder is never loaded: made anew, or done without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native.library_path()
    path.parent.mkdir()
    path.parent.chmod(0o777)
    path.write_text("planted")
    path.chmod(0o666)
    assert native.library.__wrapped__() is not None
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0

    before = path.stat().st_mtime_ns
    assert native.library.__wrapped__() is not None
    assert path.stat().st_mtime_ns == before  # taken as it is: nobody else could write it

    other = tmp_path / "other"
    other.mkdir()
    path.parent.rename(other / "elsewhere")
    path.parent.symlink_to(other / "elsewhere")
    assert native.library.__wrapped__() is None
    assert "is somebody else's" in capsys.readouterr().err

    path.parent.unlink()
    tmp_path.chmod(0o777)
    assert native.library.__wrapped__() is None
    assert f"others can write to {tmp_path}" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_library_is_not_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native.library_path()
    path.parent.mkdir()
    os.chown(path.parent, 12345, 12345)
    assert native.library.__wrapped__() is None
    assert "is somebody else's" in capsys.readouterr().err

    os.chown(path.parent, 0, 0)
    path.write_text("planted")
    os.chown(path, 12345, 12345)
    assert native.library.__wrapped__() is not None
    assert path.stat().st_uid == 0


def test_the_bench_times_every_instruction_set_and_leaves_this_machines(monkeypatch):
    monkeypatch.setattr(processor, "ROUNDS", 1)
    rows = list(processor.attention_rows("small", (4, 2, 16), rows=3, context=20))
    assert [row.by for row in rows] == ["native", *OLDER]
    assert native.TARGET == "native"
    # 4 operations for each of 3 rows x 4 heads x 20 tokens x 16: 15,360.
    for row in rows:
        assert row.gflops * row.ms == pytest.approx(15_360 / 1e6)
