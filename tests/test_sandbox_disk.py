"""What bounds a work folder that is no file system of its own: every file counts, and once."""

import ctypes
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "sandbox"))  # as the launcher does
import watch

BLOCK = 1 << 20
libc = ctypes.CDLL(None)


@pytest.fixture
def disk(tmp_path):
    """Bound of 8 MiB and 100 files, each of 4 MiB at most."""
    return watch.Disk(str(tmp_path), 8 * BLOCK, 100, 4 * BLOCK, None)


def write(path, blocks):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(blocks * BLOCK))
    return path


def test_a_walk_goes_on_where_a_file_has_gone_meanwhile(disk, tmp_path, monkeypatch):
    """A program that renames all the time must not hide what else is in the folder."""
    bait = write(tmp_path / "bait", 0)
    write(tmp_path / "large", 9)
    listed = os.scandir

    @contextmanager
    def bait_first(place):
        with listed(place) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        bait.unlink()
        yield iter(found)

    monkeypatch.setattr(os, "scandir", bait_first)
    assert disk.exceeded(0, [])


def test_a_disk_that_fills_is_walked_before_its_time(disk, monkeypatch):
    """As soon as a sixteenth of 8 MiB or of 100 files is gone, and not again after the walk."""
    left = {"blocks": 4096, "files": 1000}

    def statvfs(_):
        return SimpleNamespace(f_bfree=left["blocks"], f_frsize=4096, f_ffree=left["files"])

    monkeypatch.setattr(os, "statvfs", statvfs)
    for kind, few, many in (("blocks", 128, 129), ("files", 6, 7)):
        disk.exceeded(0, [])
        before = left[kind]
        left[kind] = before - few
        assert not disk.fills()
        left[kind] = before - many
        assert disk.fills()
        disk.exceeded(0, [])
        assert not disk.fills()


WATCHER = """
import os, socket, subprocess, sys, time
sys.path.insert(0, SANDBOX)
import watch
watch._TICK_SINGLE = watch._TICK_WALK = 60.0
writer = '''
import time
for number in range(64):
    with open(str(number), "wb") as file: file.write(bytes(1 << 20))
    time.sleep(0.05)
'''
stage = dict(processes=1, cpu=60.0, wall=60.0, memory=1 << 30, output=1 << 20)
child = subprocess.Popen([sys.executable, "-c", writer], cwd=FOLDER, start_new_session=True)
pipes = [os.pipe()[0], os.pipe()[0]]
disk = watch.Disk(FOLDER, 8 << 20, 100, 4 << 20, None)
reports, started_by = socket.socketpair()
channel, trainer = socket.socketpair()
running = watch.Program(child.pid, stage, pipes, reports, disk, time.monotonic())
running.wait(channel)
print(running.reason)
"""


def test_a_program_that_fills_the_disk_does_not_wait_for_the_next_look(tmp_path):
    """Looks and walks a minute apart; of 64 MiB it may have 8, and is ended before the others."""
    names = f"SANDBOX, FOLDER = {str(ROOT / 'sandbox')!r}, {str(tmp_path)!r}\n"
    command = [sys.executable, "-c", names + WATCHER]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "file_limit\n", ran.stderr
    assert 8 <= len(list(tmp_path.iterdir())) < 64


def test_a_file_of_many_names_counts_once(disk, tmp_path):
    """20 names of 1 MiB are 1 MiB; with 8 more there are 9."""
    path = write(tmp_path / "x", 1)
    for number in range(20):
        (tmp_path / f"name{number}").hardlink_to(path)
    assert not disk.exceeded(0, [])
    write(tmp_path / "folder" / "y", 8)
    assert disk.exceeded(0, [])


def test_a_file_counts_that_has_no_name_and_is_open(disk, tmp_path):
    path = write(tmp_path / "x", 9)
    with path.open("rb"):
        path.unlink()
        assert disk.exceeded(0, [os.getpid()])
    assert not disk.exceeded(0, [os.getpid()])


def test_a_file_counts_that_has_no_name_and_is_mapped(disk, tmp_path):
    """As one of the largest, whatever it has: two are 8 MiB, three are 12."""
    mapped = []
    for number in range(3):
        path = write(tmp_path / f"x{number}", 1)
        with path.open("r+b") as file:
            mapped.append(map_alone(file.fileno()))
        path.unlink()
        assert disk.exceeded(0, [os.getpid()]) == (number == 2)
    for one in mapped:
        unmap(one)
    assert not disk.exceeded(0, [os.getpid()])


def map_alone(descriptor):
    """Address of a page of a file, of which no descriptor is kept (mmap.mmap keeps one)."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_long] * 5
    return libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)


def unmap(address):
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE))
