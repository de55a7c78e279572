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
FULL = bool(os.environ.get("SANDBOX_FULL"))
BEST = available_level(probe())[0]
needs_kernel = pytest.mark.skipif(BEST == "portable", reason="no kernel isolation on this machine")
SHORT = ["--scale", "0.3"]


def attack(*arguments, user=None, before=(), harmless=True):
    """Run attack.py, as another user if told. Returns its rows; fails the test when a program did harm, unless that is wanted."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        shutil.copytree(ROOT / "sandbox", folder / "sandbox")
        shutil.copytree(ROOT / "tests" / "hostile", folder / "tests" / "hostile")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        python = sys.executable if user is None else python_for_all()
        command = [
            *before,
            python,
            str(folder / "tests" / "hostile" / "attack.py"),
            *([] if FULL else SHORT),
            *arguments,
        ]
        who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=3000, cwd="/", check=False, **who
        )
    finally:
        shutil.rmtree(folder)
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert rows and "programs" in rows[-1], ran.stderr[-2000:]
    wrong = [row for row in rows[:-1] if row["faults"]]
    assert not (wrong and harmless), json.dumps(wrong, indent=1)[:5000]
    return rows


def python_for_all():
    """A Python of at least 3.11 that every user can start."""
    for name in (
        sys.executable,
        sys._base_executable,
        "/usr/bin/python3",
        "/usr/local/bin/python3",
    ):
        real = Path(os.path.realpath(name))
        reachable = real.is_file() and all(
            parent.stat().st_mode & stat.S_IXOTH for parent in real.parents
        )
        if (
            reachable
            and subprocess.run(
                [name, "-c", "import sys, tomllib"], check=False, capture_output=True
            ).returncode
            == 0
        ):
            return name
    pytest.skip("no Python 3.11 that a normal user could start")


def normal_user(number=0):
    """Id of a user that nobody has, when this is root; else None: this is one already."""
    return 2_100_000_000 + 10 * os.getpid() + number if os.geteuid() == 0 else None


@pytest.fixture(scope="module")
def attacks():
    """{name: future of all attacks that way}; two at a time where they run as different users, so that each finds what its own left."""
    few = (
        []
        if FULL
        else [word for name in ("python", "bash", "c", "prolog") for word in ("--language", name)]
    )
    with ThreadPoolExecutor(2 if os.geteuid() == 0 else 1) as threads:
        started = {"kernel": threads.submit(attack, "--level", "kernel", user=normal_user())}
        if BEST == "namespaces":
            started["namespaces"] = threads.submit(
                attack, "--level", "namespaces", *few, user=normal_user(1)
            )
        if os.geteuid() == 0:
            started["root"] = threads.submit(attack, "--level", "kernel", *few[:4])
        if os.geteuid() == 0 and BEST == "namespaces" and FULL:
            started["root, namespaces"] = threads.submit(attack, "--level", "namespaces")
        yield started


@needs_kernel
@pytest.mark.parametrize("way", ["kernel", "namespaces", "root", "root, namespaces"])
def test_no_hostile_program_gets_out_hangs_or_stays(attacks, way):
    if way not in attacks:
        pytest.skip(
            "needs user namespaces"
            if way == "namespaces"
            else "only as root; both levels in full only"
        )
    assert len(attacks[way].result()) > (100 if way == "kernel" else 50)


@needs_kernel
@pytest.mark.parametrize("level", ["kernel", "namespaces"])
def test_honest_programs_are_right_amid_hostile_ones(attacks, level):
    """A soak: a third of the jobs hostile, three launchers on what cores there are; not one honest result may be wrong."""
    if level == "namespaces" and (BEST != "namespaces" or not FULL):
        pytest.skip("only in full, where there are user namespaces")
    rows = attack("--level", level, "--soak", "500" if FULL else "60", user=normal_user(2))
    assert rows[-1]["programs"] >= 60


def test_the_portable_level_is_no_sandbox(attacks):
    """What is caught at the other levels is no straw man: without isolation the same programs read and write the answer file."""
    rows = attack(
        "--level",
        "portable",
        "--language",
        "lua",
        "--language",
        "perl",
        "--only",
        "files",
        user=normal_user(4),
        harmless=False,
    )
    if load_language("lua").missing():
        pytest.skip("needs Lua")
    faults = " ".join(rows[0]["faults"])
    assert "it got out" in faults and "files changed" in faults and rows[-1]["wrong"] == 1


@needs_kernel
def test_without_landlock_or_namespaces(attacks):
    """Machines that refuse: no Landlock means no kernel level, and a sentence; no namespaces (Docker) leaves the kernel level whole."""
    refuse = str(ROOT / "tests" / "hostile" / "refuse.py")
    command = [
        sys.executable,
        refuse,
        "landlock",
        sys.executable,
        "-m",
        "sandbox",
        "run",
        "--lang",
        "python",
    ]
    ran = subprocess.run(
        command, input="print(42)", capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1
    assert (
        "the sandbox cannot give kernel isolation here: kernel isolation needs landlock"
        in ran.stderr
    )
    ran = subprocess.run(
        [*command, "--allow-weaker"],
        input="print(42)",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (json.loads(ran.stdout)["level"], json.loads(ran.stdout)["stdout"]) == (
        "portable",
        "42\n",
    )
    attack(
        "--level",
        "kernel",
        "--language",
        "python",
        "--only",
        "fi",
        user=normal_user(3),
        before=[python_for_all(), refuse, "namespaces"],
    )
    ran = subprocess.run(
        [
            sys.executable,
            refuse,
            "namespaces",
            sys.executable,
            "-m",
            "sandbox",
            "run",
            "--level",
            "namespaces",
            "--lang",
            "python",
        ],
        input="print(42)",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ran.returncode == 1 and "namespaces isolation needs pid namespace" in ran.stderr
