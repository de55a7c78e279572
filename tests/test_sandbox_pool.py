"""The pool under accidents: launchers that die, a trainer that is killed, batches cut short; and its cache, limits and command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import Job, Limits, Pool, SandboxError, languages
from sandbox.languages import load_language

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    load_language("lua").missing() is not None, reason=str(load_language("lua").missing())
)


def lua(source, **more):
    return Job("lua", {"main.lua": source}, **more)


def sleeper(number):
    """Uses no CPU, so it runs until its wall limit of 20 s. Lua cannot sleep, but it can wait for a line that never comes."""
    return Job(
        "bash", {"main.sh": f"sleep {20 + number}"}, limits=Limits(cpu=1.0, wall=20.0), id=number
    )


def alive(pids):
    return [
        pid
        for pid in pids
        if os.path.exists(f"/proc/{pid}")
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def descendants(pid):
    """Process ids of its children, their children and so on."""
    try:
        children = [
            int(word)
            for task in os.listdir(f"/proc/{pid}/task")
            for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    except OSError:
        return []
    return children + [found for child in children for found in descendants(child)]


def eventually(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def work_root(monkeypatch):
    """A place of its own for work folders, which must be empty afterwards. Programs of root run as users of their own, so they must get there."""
    folder = Path(tempfile.mkdtemp(prefix="work-root-"))
    folder.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_launcher_is_replaced_and_its_job_runs_again(work_root):
    with Pool(workers=1) as pool:
        future = pool.submit(Job("bash", {"main.sh": "sleep 0.5; echo 42"}))
        assert eventually(lambda: descendants(pool.launcher_pids[0]))
        running = descendants(pool.launcher_pids[0])
        os.kill(pool.launcher_pids[0], signal.SIGKILL)
        assert future.result(20).stdout == b"42\n" and (pool.retries, pool.replaced) == (1, 1)
        assert eventually(lambda: not alive(running))
        killer = threading.Thread(target=_kill_launchers, args=(pool,), daemon=True)
        killer.start()
        result = pool.submit(Job("bash", {"main.sh": "sleep 2; echo 43"})).result(30)
        assert result.status == "sandbox_error" and b"launcher died" in result.stderr
        killer.stop = True
        killer.join()
        assert pool.run_all([lua("print(44)")])[0].stdout == b"44\n"
    assert list(work_root.iterdir()) == [] and not alive(pool.launcher_pids)


def _kill_launchers(pool):
    """Kill every launcher 0.2 s after it began to run a program."""
    while not getattr(threading.current_thread(), "stop", False):
        pid = pool.launcher_pids[-1]
        if descendants(pid):
            time.sleep(0.2)
            if descendants(pid):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def test_close_ends_everything_in_the_middle(work_root):
    pool = Pool(workers=2)
    futures = [pool.submit(sleeper(number)) for number in range(6)]
    assert eventually(lambda: all(descendants(pid) for pid in pool.launcher_pids))
    running = [program for pid in pool.launcher_pids for program in descendants(pid)]
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert {future.result(1).status for future in futures} == {"sandbox_error"}
    assert not alive([*pool.launcher_pids, *running]) and list(work_root.iterdir()) == []
    with pytest.raises(SandboxError, match="pool is closed"):
        pool.submit(lua("print(1)"))


def test_a_killed_trainer_leaves_nothing(work_root):
    trainer = (
        f"import sys, tempfile; sys.path.insert(0, {str(ROOT)!r}); tempfile.tempdir = {str(work_root)!r}\n"
        "from sandbox import Job, Pool\n"
        "pool = Pool(workers=2)\n"
        "futures = [pool.submit(Job('bash', {'main.sh': f'touch x{n}; sleep 30 & sleep 3{n}'})) for n in range(3)]\n"
        "print(*pool.launcher_pids, flush=True)\n"
        "futures[2].result()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True)
    launchers = [int(word) for word in process.stdout.readline().split()]
    assert eventually(lambda: all(len(descendants(pid)) >= 2 for pid in launchers))
    running = [program for pid in launchers for program in descendants(pid)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert eventually(lambda: not alive([*launchers, *running])), running
    assert eventually(lambda: not list(work_root.iterdir())), list(work_root.rglob("*"))


def test_a_trainer_killed_at_any_moment_leaves_nothing(work_root):
    """Before the first job, while a program runs, while a launcher clears up after it."""
    trainer = (
        f"import sys, tempfile; sys.path.insert(0, {str(ROOT)!r}); tempfile.tempdir = {str(work_root)!r}\n"
        "from sandbox import Job, Pool\n"
        "pool = Pool(workers=3, cache=False)\n"
        "print(*pool.launcher_pids, flush=True)\n"
        "files = 'for n = 1, 5000 do io.open(n, \\'w\\'):close() end'\n"
        "while True: pool.run_all([Job('lua', {'main.lua': files})] * 30)\n"
    )
    for moment in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True
        )
        launchers = [int(word) for word in process.stdout.readline().split()]
        time.sleep(0.03 * moment)
        process.kill()
        process.wait()
        process.stdout.close()
        assert eventually(
            lambda launchers=launchers: not alive(launchers) and not list(work_root.iterdir())
        ), list(work_root.rglob("*"))


def test_the_trainer_never_forks(work_root):
    """A fork copies the page tables of the trainer: 118 ms at 4 GiB, and half-initialised threads and CUDA with it."""
    forks = []
    os.register_at_fork(
        before=lambda: forks.append(1)
    )  # runs for os.fork and for subprocess with preexec_fn, not for vfork or spawn
    with Pool(workers=2) as pool:
        assert pool.run_all([lua("print(1)")])[0].status == "ok"
    assert not forks


def test_results_come_as_they_end_and_equal_jobs_run_once():
    with Pool(workers=2) as pool:
        slow, fast = (
            Job("bash", {"main.sh": "sleep 1; echo slow"}, id="slow"),
            lua("print('fast')", id="fast"),
        )
        assert [result.id for result in pool.run([slow, fast])] == ["fast", "slow"]
        jobs = [
            lua(
                "io.write(os.clock() - os.clock() == 0 and 'x' or 'x', io.read('a'))",
                stdin=text,
                id=n,
            )
            for n, text in enumerate((b"1", b"1", b"2", b"1"))
        ]
        results = pool.run_all(
            [
                *jobs,
                replace(jobs[0], limits=Limits(cpu=0.9), id=4),
                replace(jobs[0], files={**jobs[0].files, "b": ""}, id=5),
            ]
        )
        assert [(r.id, r.stdout) for r in results] == [
            (0, b"x1"),
            (1, b"x1"),
            (2, b"x2"),
            (3, b"x1"),
            (4, b"x1"),
            (5, b"x1"),
        ]
        assert pool.cache_hits == 2
        again = pool.run_all(jobs)
        assert pool.cache_hits == 6 and [r.cpu for r in again] == [results[n].cpu for n in range(4)]


def test_every_limit_has_its_status():
    python = load_language("python")
    if python.missing():
        pytest.skip(python.missing())
    small = Limits(cpu=1.0, memory=100 << 20, output=1000, file_size=1 << 20)
    programs = {
        "cpu_limit": ("while True: pass", replace(small, cpu=0.2)),
        "wall_limit": ("import time; time.sleep(9)", replace(small, wall=0.3)),
        "memory_limit": ("x = bytearray(1 << 30)", small),
        "output_limit": ("print('x' * 2000)", small),
        "file_limit": (
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); open('x', 'wb').write(bytes(20 << 20))",
            small,
        ),
        "crash": ("import ctypes; ctypes.string_at(0)", small),
        "error": ("raise SystemExit(3)", small),
        "ok": ("import os; os.write(2, b'\\xff'); print('x' * 999)", small),
    }
    with Pool(workers=2) as pool:
        found = dict(
            zip(
                programs,
                pool.run_all(
                    [
                        Job("python", {"main.py": text}, limits=limits)
                        for text, limits in programs.values()
                    ]
                ),
                strict=True,
            )
        )
    assert {name: result.status for name, result in found.items()} == {
        name: name for name in programs
    }
    assert (
        found["output_limit"].stdout == b"x" * 1000
        and found["output_limit"].truncated
        and not found["ok"].truncated
    )
    assert (found["crash"].signal, found["error"].exit_code, found["ok"].stderr) == (
        signal.SIGSEGV,
        3,
        b"\xff",
    )
    assert 0.2 <= found["cpu_limit"].cpu < 0.4 and found["ok"].peak_memory < 100 << 20


def test_two_pools_and_many_threads():
    """Every rank has a pool of its own, and rewards are submitted from the sampler's callbacks."""
    with Pool(workers=1) as one, Pool(workers=1) as other:
        futures = []
        threads = [
            threading.Thread(
                target=lambda n=n: futures.append(
                    (n, (one, other)[n % 2].submit(lua(f"print({n})")))
                )
            )
            for n in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait([future for _, future in futures], 30)
        assert all(int(future.result(0).stdout) == number for number, future in futures)


# ---- python -m sandbox ----


def command(*arguments, given=""):
    return subprocess.run(
        [sys.executable, "-m", "sandbox", *arguments],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_run_prints_a_json_result(tmp_path):
    (tmp_path / "a.lua").write_text("print(io.read('n') * 2)")
    (tmp_path / "in").write_text("21")
    ran = command("run", "--lang", "Lua", str(tmp_path / "a.lua"), "--stdin", str(tmp_path / "in"))
    result = json.loads(ran.stdout)
    assert (ran.returncode, result["status"], result["stdout"], result["level"]) == (
        0,
        "ok",
        "42\n",
        "kernel",
    )
    assert set(result) == {
        "id",
        "status",
        "stdout",
        "stderr",
        "exit_code",
        "signal",
        "cpu",
        "wall",
        "peak_memory",
        "level",
        "truncated",
    }
    for arguments, said in (
        (("--lang", "klingon", "x"), "No such file"),
        (("--lang", "klingon"), "unknown language 'klingon'"),
        (("--lang", "lua", "--cpu", "-1"), "limit cpu must be a number above 0"),
        (("--jobs", "nowhere.jsonl"), "No such file"),
        (("--lang", "lua", "--level", "portable", "--allow-weaker"), None),
    ):
        ran = command("run", *arguments, given="print(1)")
        assert (said is None and ran.returncode == 0) or (
            ran.returncode == 1 and said in ran.stderr and "Traceback" not in ran.stderr
        ), ran


def test_job_lines_stream_in_order():
    lines = [
        {"id": "slow", "lang": "bash", "source": "sleep 0.5; echo slow"},
        {"id": 7, "lang": "lua", "source": "print(io.read('a'))", "stdin": "in"},
        {
            "id": "files",
            "lang": "lua",
            "files": {"main.lua": "print((require('other')))", "other.lua": "return 42"},
        },
        {
            "id": "limits",
            "lang": "lua",
            "source": "while true do end",
            "limits": {"cpu": 0.2, "wall": 5, "memory": 100_000_000, "output": 100},
        },
        "{not json",
        {"id": "klingon", "lang": "klingon", "source": "x"},
        {"id": "typo", "lang": "lua", "sauce": "x"},
        {"id": "path", "lang": "lua", "files": {"../main.lua": "x"}},
        {"id": "number", "lang": "lua", "source": 3},
        {"id": "limit", "lang": "lua", "source": "", "limits": {"cpu": "much"}},
        [1],
        {"lang": "lua", "source": "print('last')"},
    ]
    given = (
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n"
    )
    ran = command("run", "--jobs", "-", given=given)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0 and len(rows) == len(lines)
    assert [row["id"] for row in rows] == [
        "slow",
        7,
        "files",
        "limits",
        None,
        "klingon",
        "typo",
        "path",
        "number",
        "limit",
        None,
        None,
    ]
    assert [row["status"] for row in rows if "status" in row] == [
        "ok",
        "ok",
        "ok",
        "cpu_limit",
        "ok",
    ]
    assert [row.get("stdout", "").strip() for row in rows[:3]] == ["slow", "in", "42"] and rows[-1][
        "stdout"
    ] == "last\n"
    assert [row["line"] for row in rows if "error" in row] == [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture
def language_folder(tmp_path, monkeypatch):
    """A folder of languages in place of sandbox/languages/."""
    monkeypatch.setattr(languages, "FOLDER", tmp_path)
    load_language.cache_clear()
    yield tmp_path
    load_language.cache_clear()


def test_doctor_says_what_works_and_how_to_get_what_does_not(language_folder, capsys):
    text = (ROOT / "sandbox" / "languages" / "lua.toml").read_text()
    (language_folder / "lua.toml").write_text(text)
    lacking = text.replace('lua = ["lua5.4", "lua5.3", "lua"]', 'lua = ["klingon"]').replace(
        'debian = "lua5.4"', 'debian = "klingon-nox"'
    )
    (language_folder / "klingon.toml").write_text(lacking)
    from sandbox.__main__ import main

    main(["doctor"])
    said = capsys.readouterr().out
    assert re.search(r"isolation: (kernel|namespaces)", said) and re.search(r"landlock +ok", said)
    assert re.search(r"lua +\d+ ms +\d+ ms +Lua 5", said)
    assert "klingon     missing: klingon not found: apt-get install klingon-nox" in said
    assert said.rstrip().endswith(
        "for all that is missing: apt-get install --no-install-recommends klingon-nox"
    )


def test_the_readmes_new_language_works(language_folder):
    """The README's example of a new language, pasted into a file, passes the test that every language passes."""
    text = (ROOT / "README.md").read_text().partition('title = "Awk"')
    example = (text[1] + text[2]).partition("```")[0]
    assert len(example.strip().splitlines()) <= 10
    (language_folder / "awk.toml").write_text(example)
    if sentence := load_language("awk").missing():
        pytest.skip(sentence)
    from test_sandbox import check_language

    with Pool(workers=2) as pool:
        check_language(pool, "awk")
