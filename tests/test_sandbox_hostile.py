"""Hostile programs: none gets out, outlives its job, or spoils another's result.

In full (every program at both levels, as root and as a normal user, and 500 mixed jobs):
SANDBOX_FULL=1 python -m pytest tests/test_sandbox_hostile.py
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest

from sandbox.languages import load_language
from sandbox.probe import available_level, probe

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = ROOT / "tests" / "hostile"
REFUSE = str(HOSTILE / "refuse.py")
LANGUAGES = sorted(path.stem for path in HOSTILE.glob("*.toml"))
# What holds a program is the same for all languages: Python's attacks are bare system calls, and
# Prolog's run warm. Of the others those that take less than 3 s are always run.
SLOW = ("bash", "c", "javascript", "lisp", "lua", "r", "racket")
FEW = ("prolog", "python", "bash", "c")  # in namespaces and as root
SLOW_ELSEWHERE = ("python", "bash", "c")
FULL = bool(os.environ.get("SANDBOX_FULL"))
IS_ROOT = os.geteuid() == 0
BEST = available_level(probe())[0]
needs_kernel = pytest.mark.skipif(BEST == "portable", reason="no kernel isolation on this machine")


def attack(*arguments, user=None, before=(), harmless=True):
    """Run attack.py and return its rows; the test fails when a program did harm.

    user: as whom, when not as this one. before: words before the command.
    harmless: False: harm is expected.
    """
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        shutil.copytree(ROOT / "sandbox", folder / "sandbox")
        shutil.copytree(ROOT / "tests" / "hostile", folder / "tests" / "hostile")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)

        program = str(folder / "tests" / "hostile" / "attack.py")
        scale = [] if FULL else ["--scale", "0.3"]
        python = sys.executable
        as_user = {}
        if user is not None:
            python = python_for_all()
            as_user = {"user": user, "group": user, "extra_groups": []}
        ran = subprocess.run(
            [*before, python, program, *scale, *arguments],
            capture_output=True,
            text=True,
            timeout=3000,
            cwd="/",
            check=False,
            **as_user,
        )
    finally:
        shutil.rmtree(folder)

    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert rows and "programs" in rows[-1], ran.stderr[-2000:]
    if harmless:
        wrong = [row for row in rows[:-1] if row["faults"]]
        assert not wrong, json.dumps(wrong, indent=1)[:5000]
    return rows


def python_for_all():
    """A Python of at least 3.11 that every user can start."""
    places = (sys.executable, sys._base_executable, "/usr/bin/python3", "/usr/local/bin/python3")
    for name in places:
        real = Path(os.path.realpath(name))
        if not real.is_file():
            continue
        if not all(parent.stat().st_mode & stat.S_IXOTH for parent in real.parents):
            continue
        needs = [name, "-c", "import sys, tomllib"]
        if subprocess.run(needs, check=False, capture_output=True).returncode == 0:
            return name
    pytest.skip("no Python 3.11 that a normal user could start")


def normal_user():
    """Id of a user that nobody has, when this is root; else None: this is one already."""
    return 2_100_000_000 + os.getpid() if IS_ROOT else None


def some_slow(languages, slow):
    """Parameters, of which the slow ones are marked so."""
    parameters = []
    for language in languages:
        marks = [pytest.mark.slow] if language in slow else []
        parameters.append(pytest.param(language, marks=marks))
    return parameters


def attack_all(language, level, user):
    """Every attack in a language, each followed by an honest program; all must have run."""
    if sentence := load_language(language).missing():
        pytest.skip(sentence)
    table = tomllib.loads((HOSTILE / f"{language}.toml").read_text())
    table.pop("prelude", None)
    names = [name for name, entry in table.items() if FULL or not entry.get("slow")]
    if not names:
        pytest.skip("its attacks are slow: SANDBOX_FULL=1 tries them")
    rows = attack("--level", level, "--language", language, user=user)
    assert rows[-1]["programs"] == len(names)


@needs_kernel
@pytest.mark.parametrize("language", some_slow(LANGUAGES, SLOW))
def test_no_hostile_program_gets_out_hangs_or_stays(language):
    attack_all(language, "kernel", normal_user())


@pytest.mark.skipif(BEST != "namespaces", reason="needs user namespaces")
@pytest.mark.parametrize("language", LANGUAGES if FULL else some_slow(FEW, SLOW_ELSEWHERE))
def test_nor_in_namespaces(language):
    attack_all(language, "namespaces", normal_user())


@needs_kernel
@pytest.mark.skipif(not IS_ROOT, reason="only as root")
@pytest.mark.parametrize("language", LANGUAGES if FULL else some_slow(FEW, SLOW_ELSEWHERE))
def test_nor_when_root_runs_it(language):
    """Each launcher's programs run as a user of their own then."""
    attack_all(language, "kernel", None)


@pytest.mark.slow
@pytest.mark.skipif(BEST != "namespaces" or not IS_ROOT, reason="only as root, with namespaces")
@pytest.mark.parametrize("language", LANGUAGES if FULL else ["prolog"])
def test_nor_when_root_runs_it_in_namespaces(language):
    attack_all(language, "namespaces", None)


@needs_kernel
@pytest.mark.parametrize("level", ["kernel", "namespaces"])
def test_honest_programs_are_right_amid_hostile_ones(level):
    """A soak: a third of the jobs hostile, three launchers; not one honest result may be wrong."""
    if level == "namespaces" and (BEST != "namespaces" or not FULL):
        pytest.skip("only in full, where there are user namespaces")
    count = "500" if FULL else "60"
    rows = attack("--level", level, "--soak", count, user=normal_user())
    assert rows[-1]["programs"] > int(count)  # each program has a row, and the soak as a whole


FOUR_PROCESSES = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        break
time.sleep(60)
"""
TRAINER = f"""
from sandbox import Job, Limits, Pool
job = Job("python", {{"main.py": {FOUR_PROCESSES!r}}}, limits=Limits(processes=8))
with Pool(workers=1) as pool:
    pool.submit(job).result()
"""


@needs_kernel
def test_nothing_outlives_a_trainer_and_a_launcher_that_are_killed_at_once():
    """As by kill -9 of a whole job; a launcher that lives on would kill the program itself."""
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], cwd=ROOT)
    processes = []
    deadline = time.monotonic() + 30
    while len(processes) < 5 and time.monotonic() < deadline:  # launcher, program, its children
        time.sleep(0.05)
        processes = below(trainer.pid)
    assert len(processes) == 5

    launcher = processes[0]
    os.kill(launcher, signal.SIGSTOP)
    trainer.kill()
    os.kill(launcher, signal.SIGKILL)
    trainer.wait()
    left = processes
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in left if is_alive(pid)]
    assert not left


def below(pid):
    """Children of a process and theirs, parents first."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *below(child)]
    return found


def is_alive(pid):
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat_line.rpartition(")")[2].split()[0] != "Z"


def test_the_portable_level_is_no_sandbox():
    """Without isolation the same programs read and write the answer file.

    So what is caught at the other levels is no straw man.
    """
    if load_language("lua").missing():
        pytest.skip("needs Lua")
    options = ["--level", "portable", "--language", "lua", "--only", "files"]
    rows = attack(*options, user=normal_user(), harmless=False)
    faults = " ".join(rows[0]["faults"])
    assert "it got out" in faults
    assert "files changed" in faults
    assert rows[-1]["wrong"] == 1


def run_refused(what, *options):
    """python -m sandbox run of print(42), on a kernel that refuses landlock or namespaces."""
    sandbox = [sys.executable, "-m", "sandbox", "run", "--lang", "python", *options]
    return subprocess.run(
        [sys.executable, REFUSE, what, *sandbox],
        input="print(42)",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


@needs_kernel
def test_without_landlock_there_is_no_kernel_level():
    ran = run_refused("landlock")
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    said = "the sandbox cannot give kernel isolation here: kernel isolation needs landlock"
    assert said in ran.stderr

    ran = run_refused("landlock", "--allow-weaker")
    result = json.loads(ran.stdout)
    assert (result["level"], result["stdout"]) == ("portable", "42\n")


@needs_kernel
@pytest.mark.slow
def test_without_namespaces_the_kernel_level_is_whole():
    """Docker refuses namespaces and mounts."""
    before = [python_for_all(), REFUSE, "namespaces"]
    options = ["--level", "kernel", "--language", "python", "--only", "fi"]
    attack(*options, user=normal_user(), before=before)


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system in memory")
def test_without_namespaces_files_in_memory_are_bounded(monkeypatch):
    """Where nothing counts the bytes that were written: as with a /tmp in memory."""
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    before = [python_for_all(), REFUSE, "namespaces"]
    for only in ("fill_disk", "one_file"):
        options = ["--level", "kernel", "--language", "python", "--only", only]
        attack(*options, user=normal_user(), before=before)


@needs_kernel
def test_without_namespaces_there_is_no_namespaces_level():
    ran = run_refused("namespaces", "--level", "namespaces")
    assert ran.returncode == 1
    assert "namespaces isolation needs pid namespace" in ran.stderr
