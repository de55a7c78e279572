"""Work folders are cleared whatever is in them, and nothing outside is touched."""

import os
import stat
import tempfile
import time

import pytest

from sandbox import folders


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def nest(place, depth, names="d"):
    """Folders in each other below an open folder, each with a file."""
    descriptor = os.dup(place)
    for level in range(depth):
        name = names if isinstance(names, str) else names[level % len(names)]
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
        os.mkdir(name, dir_fd=descriptor)
        inner = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)


def picture(folder):
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        info = path.lstat()
        found[path] = (info.st_mode, info.st_uid, info.st_mtime_ns, info.st_size)
    return found


def test_links_lead_nowhere(work, tmp_path):
    """As names, in deep folders, and in the place of what `_move` and `make_executable` take."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    (outside / "closed").mkdir(0o500)
    (outside / "file").chmod(0)
    before = picture(outside)

    top = os.open(work, os.O_RDONLY)
    nest(top, 100)
    (work / "closed").mkdir()
    for folder in (work, work / "closed"):
        for name in ("a", "0", "1", "zzz"):
            (folder / name).symlink_to(outside)
            (folder / f"{name}.file").symlink_to(outside / "file")
    (work / "closed").chmod(0)
    folders.make_executable(work, "a.file")
    folders.make_executable(work, "a")
    folders.make_executable(work, "none")
    os.close(top)

    folders.clear(work)
    assert list(work.iterdir()) == []
    assert picture(outside) == before


def test_names_that_are_taken_and_names_that_are_no_text(work):
    """Inner folders move up under numbers for names; a program may have used those."""
    top = os.open(work, os.O_RDONLY)
    nest(top, 60, names=[str(number) for number in range(5)])
    for number in range(0, 40, 2):
        if number % 4:
            os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY, dir_fd=top))
        else:
            (work / str(number)).mkdir(exist_ok=True)
    for name in (b"\xff\xfe", b"\n", b"-rf", b"x" * 255):
        os.mkdir(os.path.join(os.fsencode(work), name))
    os.close(top)
    folders.clear(work)
    assert os.listdir(work) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs files in memory: disks are slow")
def test_depth_and_number_cost_linear_time():
    """20,000 levels deep, beyond what a path, recursion or open files allow; and 10,000 wide."""
    work = tempfile.mkdtemp(dir="/dev/shm")
    top = os.open(work, os.O_RDONLY)
    nest(top, 20_000)
    for number in range(10_000):
        os.mkdir(f"{number}" + "x" * 240, dir_fd=top)
    os.close(top)

    started = time.process_time()
    folders.clear(work)
    took = time.process_time() - started
    assert os.listdir(work) == []
    os.rmdir(work)
    assert took < 10  # 2.5 s; were it quadratic, minutes


def test_what_the_compiler_made_can_be_started(work):
    (work / "main").write_text("x")
    (work / "main").chmod(0o644)
    folders.make_executable(work, "main")
    assert stat.S_IMODE((work / "main").stat().st_mode) == 0o755


def test_a_folder_that_is_gone_is_removed(work):
    folders.remove(work)
    assert not work.exists()
    folders.remove(work)
