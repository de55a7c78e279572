"""Hostile programs: none gets out, outlives its job, or spoils another's result.

In full (every program at both levels, as root and as a normal user, and 500 mixed jobs):
SANDBOX_FULL=1 python -m pytest tests/test_sandbox_hostile.py
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.languages import load_language
from sandbox.probe import available_level, probe

ROOT = Path(__file__).resolve().parent.parent
REFUSE = str(ROOT / "tests" / "hostile" / "refuse.py")
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


def normal_user(number=0):
    """Id of a user that nobody has, when this is root; else None: this is one already."""
    return 2_100_000_000 + 10 * os.getpid() + number if IS_ROOT else None


@pytest.fixture(scope="module")
def attacks():
    """{way: future of all attacks that way}.

    Two at a time where they run as different users, so that each finds what its own left.
    """
    four, two = [], []
    if not FULL:
        two = ["--language", "python", "--language", "bash"]
        four = [*two, "--language", "c", "--language", "prolog"]

    with ThreadPoolExecutor(2 if IS_ROOT else 1) as threads:
        started = {"kernel": threads.submit(attack, "--level", "kernel", user=normal_user())}
        if BEST == "namespaces":
            started["namespaces"] = threads.submit(
                attack, "--level", "namespaces", *four, user=normal_user(1)
            )
        if IS_ROOT:
            started["root"] = threads.submit(attack, "--level", "kernel", *two)
        if IS_ROOT and BEST == "namespaces" and FULL:
            started["root, namespaces"] = threads.submit(attack, "--level", "namespaces")
        yield started


@needs_kernel
@pytest.mark.parametrize("way", ["kernel", "namespaces", "root", "root, namespaces"])
def test_no_hostile_program_gets_out_hangs_or_stays(attacks, way):
    if way not in attacks:
        needs = {
            "namespaces": "needs user namespaces",
            "root": "only as root",
            "root, namespaces": "only in full, as root, with user namespaces",
        }
        pytest.skip(needs[way])
    assert len(attacks[way].result()) > (100 if way == "kernel" else 50)


@needs_kernel
@pytest.mark.parametrize("level", ["kernel", "namespaces"])
def test_honest_programs_are_right_amid_hostile_ones(attacks, level):
    """A soak: a third of the jobs hostile, three launchers; not one honest result may be wrong."""
    if level == "namespaces" and (BEST != "namespaces" or not FULL):
        pytest.skip("only in full, where there are user namespaces")
    rows = attack("--level", level, "--soak", "500" if FULL else "60", user=normal_user(2))
    assert rows[-1]["programs"] >= 60


def test_the_portable_level_is_no_sandbox(attacks):
    """Without isolation the same programs read and write the answer file.

    So what is caught at the other levels is no straw man.
    """
    if load_language("lua").missing():
        pytest.skip("needs Lua")
    languages = ["--language", "lua", "--language", "perl"]
    rows = attack(
        "--level",
        "portable",
        *languages,
        "--only",
        "files",
        user=normal_user(4),
        harmless=False,
    )
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
def test_without_namespaces_the_kernel_level_is_whole(attacks):
    """Docker refuses namespaces and mounts."""
    before = [python_for_all(), REFUSE, "namespaces"]
    options = ["--level", "kernel", "--language", "python", "--only", "fi"]
    attack(*options, user=normal_user(3), before=before)

    ran = run_refused("namespaces", "--level", "namespaces")
    assert ran.returncode == 1
    assert "namespaces isolation needs pid namespace" in ran.stderr
