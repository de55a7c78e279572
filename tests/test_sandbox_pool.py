"""The pool under accidents; its cache, limits and command line.

Accidents: launchers that die, a trainer that is killed, batches cut short.
"""

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
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sandbox import Job, Limits, Pool, Result, SandboxError, languages
from sandbox.__main__ import main
from sandbox.languages import load_language
from sandbox.pool import request
from test_sandbox import bash, check_language, lua

ROOT = Path(__file__).resolve().parent.parent
MISSING = load_language("lua").missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def sleeper(number):
    """Uses no CPU, so it runs until its wall limit of 20 s."""
    limits = Limits(cpu=1.0, wall=20.0)
    return bash(f"sleep {20 + number}", limits=limits, id=number)


def is_alive(pid):
    """Is there such a process, and is it more than a zombie?"""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z"


def alive(pids):
    return [pid for pid in pids if is_alive(pid)]


def is_empty(folder):
    return list(folder.iterdir()) == []


def descendants(pid):
    """Process ids of its children, their children and so on."""
    children = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            words = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            children += [int(word) for word in words]
    except OSError:
        return []
    found = list(children)
    for child in children:
        found += descendants(child)
    return found


def descendants_of_all(pids):
    found = []
    for pid in pids:
        found += descendants(pid)
    return found


def eventually(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def work_root(monkeypatch):
    """A place of its own for work folders, which must be empty afterwards.

    Programs of root run as users of their own, so they must get there.
    """
    folder = Path(tempfile.mkdtemp(prefix="work-root-"))
    folder.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# ---- accidents ----


def test_a_killed_launcher_is_replaced_and_its_job_runs_again(work_root):
    with Pool(workers=1) as pool:
        future = pool.submit(bash("sleep 0.5; echo 42"))
        assert eventually(lambda: descendants(pool.launcher_pids[0]))
        running = descendants(pool.launcher_pids[0])
        os.kill(pool.launcher_pids[0], signal.SIGKILL)
        assert future.result(20).stdout == b"42\n"
        assert (pool.retries, pool.replaced) == (1, 1)
        assert eventually(lambda: not alive(running))
    assert is_empty(work_root)
    assert not alive(pool.launcher_pids)


@pytest.mark.parametrize("before, launchers", [(0, 3), (1, 4)])
def test_a_job_that_loses_three_fresh_launchers_has_crashed(work_root, before, launchers):
    """It is scored: else a program could choose not to be. The next job finds a fresh launcher.

    A launcher that ran another job before may have been harmed by that: it does not count.
    """
    with Pool(workers=1) as pool:
        for _ in range(before):
            assert pool.submit(lua("print(1)")).result().status == "ok"
        done = threading.Event()
        killer = threading.Thread(target=kill_launchers, args=(pool, done), daemon=True)
        killer.start()
        result = pool.submit(bash("sleep 2; echo 43")).result(30)
        done.set()
        killer.join()
        assert result.status == "crash"
        assert b"launcher died" in result.stderr
        assert len(pool.launcher_pids) == launchers
        assert pool.submit(lua("print(44)")).result().stdout == b"44\n"
    assert is_empty(work_root)
    assert not alive(pool.launcher_pids)


def test_launchers_that_end_before_the_program_begins_are_no_fault_of_the_job(monkeypatch):
    with Pool(workers=1) as pool:
        monkeypatch.setattr("sandbox.pool._LAUNCHER", "/nowhere/launcher.py")
        os.kill(pool.launcher_pids[0], signal.SIGKILL)
        result = pool.submit(lua("print(1)")).result(30)
        assert result.status == "sandbox_error"
        assert b"did not start" in result.stderr


def test_what_a_compiler_made_and_cannot_be_started_has_crashed(language_folder):
    """Its own files are at fault: none there, one that is no program, a folder."""
    (language_folder / "made.toml").write_text(
        (ROOT / "sandbox/languages/bash.toml")
        .read_text()
        .replace("run = [", 'compile = ["bash", "main.sh"]\nrun = ["./main"]\n#')
    )
    sources = ("true", "echo no program > main", "mkdir main")
    with Pool(workers=1) as pool:
        results = pool.run_all([Job("made", {"main.sh": source}) for source in sources])
        assert [result.status for result in results] == ["crash"] * 3, results
        assert b"No such file" in results[0].stderr
        assert len(pool.launcher_pids) == 1


def test_the_reply_is_sent_before_the_work_folder_is_cleared(tmp_path, monkeypatch, work_root):
    """A launcher that cannot clear it is replaced; the job that left it so has its own result."""
    shutil.copytree(ROOT / "sandbox", tmp_path / "sandbox")
    with open(tmp_path / "sandbox/folders.py", "a") as file:
        file.write("def clear(folder):\n    raise OSError('it cannot be cleared')\n")
    monkeypatch.setattr("sandbox.pool._LAUNCHER", str(tmp_path / "sandbox/launcher.py"))

    with Pool(workers=1) as pool:
        for number in (41, 42, 43):
            result = pool.submit(lua(f"print({number})")).result()
            assert (result.status, int(result.stdout)) == ("ok", number)
        assert len(pool.launcher_pids) == 3
    assert is_empty(work_root)


def kill_launchers(pool, done):
    """Kill every launcher 0.2 s after it began to run a program."""
    while not done.is_set():
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
    running = descendants_of_all(pool.launcher_pids)

    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert {future.result(1).status for future in futures} == {"sandbox_error"}
    assert not alive([*pool.launcher_pids, *running])
    assert is_empty(work_root)
    with pytest.raises(SandboxError, match="pool is closed"):
        pool.submit(lua("print(1)"))


def start_trainer(work_root, program):
    """A trainer in a process of its own, which has a `pool`: (process, its launchers' ids)."""
    head = f"""
import sys, tempfile
sys.path.insert(0, {str(ROOT)!r})
tempfile.tempdir = {str(work_root)!r}
from sandbox import Job, Pool
"""
    command = [sys.executable, "-c", head + program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pids = process.stdout.readline().split()
    return process, [int(pid) for pid in pids]


def kill_trainer(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_killed_trainer_leaves_nothing(work_root):
    """Each program starts a process of its own; the third waits for a launcher."""
    trainer = """
pool = Pool(workers=2)
programs = [f'touch x{n}; sleep 30 & sleep 3{n}' for n in range(3)]
futures = [pool.submit(Job('bash', {'main.sh': program})) for program in programs]
print(*pool.launcher_pids, flush=True)
futures[2].result()
"""
    process, launchers = start_trainer(work_root, trainer)
    assert eventually(lambda: all(len(descendants(pid)) >= 2 for pid in launchers))
    running = descendants_of_all(launchers)
    kill_trainer(process)
    assert eventually(lambda: not alive([*launchers, *running])), running
    assert eventually(lambda: is_empty(work_root)), list(work_root.rglob("*"))


def test_a_trainer_killed_at_any_moment_leaves_nothing(work_root):
    """Before the first job, while a program runs, while a launcher clears up after it."""
    trainer = """
pool = Pool(workers=3, cache=False)
print(*pool.launcher_pids, flush=True)
files = "for n = 1, 5000 do io.open(n, 'w'):close() end"
while True:
    pool.run_all([Job('lua', {'main.lua': files})] * 30)
"""
    for moment in range(8):
        process, launchers = start_trainer(work_root, trainer)
        time.sleep(0.03 * moment)
        kill_trainer(process)
        assert eventually(lambda launchers=launchers: not alive(launchers))
        assert eventually(lambda: is_empty(work_root)), list(work_root.rglob("*"))


def test_the_trainer_never_forks():
    """A fork would copy its page tables (118 ms at 4 GiB) and half-started threads and CUDA."""
    forks = []
    # runs for os.fork and for subprocess with preexec_fn, not for vfork or spawn
    os.register_at_fork(before=lambda: forks.append(1))
    with Pool(workers=2) as pool:
        assert pool.submit(lua("print(1)")).result().status == "ok"
    assert not forks


# ---- what is written, and where ----


@pytest.mark.parametrize(
    "name, said",
    [
        ("", "can be written otherwise"),
        (".", "can be written otherwise"),
        ("./a", "can be written otherwise"),
        ("a/", "can be written otherwise"),
        ("a//b", "can be written otherwise"),
        ("/etc/passwd", "leads out"),
        ("..", "leads out"),
        ("a/../../b", "leads out"),
        ("a\0b", "leads out of the work folder or to no file"),
        ("x" * 256, "too long"),
        ("a/" + "é" * 128, "too long"),  # 256 bytes
        ("a/" * 500 + "a", "too long"),  # 1,001 bytes
        ("\ud800", "no file name can have"),
        (b"a", "is not text"),
        (None, "is not text"),
    ],
)
def test_file_names_that_cannot_be_are_one_sentence(name, said):
    with pytest.raises(SandboxError, match=said) as refused:
        request(Job("lua", {"main.lua": "", name: ""}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "files, said",
    [
        ({"a": "", "a/b": ""}, "file name 'a' is also the folder of another file"),
        ({"a/b/c/d": "", "a/b": ""}, "'a/b' is also the folder"),
        ({"a": 3}, "must be text or bytes, not int"),
        ({str(number): "" for number in range(8193)}, "8193 files are too many"),
        ({"a": b"x" * (65 << 20), "b": b"x" * (64 << 20)}, "129 MiB together: give at most 128"),
    ],
)
def test_files_that_cannot_be_written_are_one_sentence(files, said):
    with pytest.raises(SandboxError, match=said):
        request(Job("lua", files))


def test_the_longest_names_are_written():
    """255 bytes a name and 1,000 a path: what the rules allow, the launcher writes."""
    deep = "a/" * 499 + "ab"
    files = {"main.lua": "print(#io.open(arg[1]):read('a'))", "x" * 255: "42", deep: "4"}
    jobs = []
    for name in ("x" * 255, deep):
        jobs.append(Job("lua", files, run=["lua", "main.lua", name]))
    with Pool(workers=1) as pool:
        assert [int(result.stdout) for result in pool.run_all(jobs)] == [2, 1]


def test_other_users_see_no_work_folder():
    """Neither its name, in the arguments of a process, nor what is in it."""
    with Pool(workers=1) as pool:
        future = pool.submit(bash("ls -ld . $HOME; sleep 0.5"))
        assert eventually(lambda: descendants(pool.launcher_pids[0]))
        pids = [*pool.launcher_pids, *descendants(pool.launcher_pids[0])]
        for pid in pids:
            assert "rarecode-" not in Path(f"/proc/{pid}/cmdline").read_text()
        lines = future.result().stdout.decode().splitlines()
        assert [line[:10] for line in lines] == ["drwx------"] * 2


# ---- results ----


def test_results_come_as_they_end():
    with Pool(workers=2) as pool:
        slow = bash("sleep 1; echo slow", id="slow")
        fast = lua("print('fast')", id="fast")
        first, second = pool.run([slow, fast])
        assert (first.id, second.id) == ("fast", "slow")


def test_equal_jobs_run_once():
    """Of three equal jobs two are hits; another stdin, limit or file makes another job."""
    source = "io.write('x', io.read('a'))"
    with Pool(workers=2) as pool:
        jobs = []
        for number, stdin in enumerate((b"1", b"1", b"2", b"1")):
            jobs.append(lua(source, stdin=stdin, id=number))
        jobs.append(replace(jobs[0], limits=Limits(cpu=0.9), id=4))
        jobs.append(replace(jobs[0], files=jobs[0].files | {"b": ""}, id=5))
        results = pool.run_all(jobs)
        assert [result.id for result in results] == list(range(6))
        assert b" ".join(result.stdout for result in results) == b"x1 x1 x2 x1 x1 x1"
        assert pool.cache_hits == 2

        again = pool.run_all(jobs)
        assert pool.cache_hits == 2 + 6
        assert again == results


def test_every_limit_has_its_status():
    python = load_language("python")
    if python.missing():
        pytest.skip(python.missing())
    small = Limits(cpu=1.0, memory=100 << 20, output=1000, file_size=1 << 20)
    big_file = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        "open('x', 'wb').write(bytes(20 << 20))"
    )
    programs = {
        "cpu_limit": ("while True: pass", replace(small, cpu=0.2)),
        "wall_limit": ("import time; time.sleep(9)", replace(small, wall=0.3)),
        "memory_limit": ("x = bytearray(1 << 30)", small),
        "output_limit": ("print('x' * 2000)", small),
        "file_limit": (big_file, small),
        "crash": ("import ctypes; ctypes.string_at(0)", small),
        "error": ("raise SystemExit(3)", small),
        "ok": ("import os; os.write(2, b'\\xff'); print('x' * 999)", small),
    }
    jobs = []
    for name, (source, limits) in programs.items():
        jobs.append(Job("python", {"main.py": source}, limits=limits, id=name))
    with Pool(workers=2) as pool:
        found = {result.id: result for result in pool.run_all(jobs)}

    for name, result in found.items():
        assert result.status == name, result
    assert found["output_limit"].stdout == b"x" * 1000
    assert found["output_limit"].truncated
    assert not found["ok"].truncated
    assert found["ok"].stderr == b"\xff"
    assert found["ok"].peak_memory < 100 << 20
    assert found["crash"].signal == signal.SIGSEGV
    assert found["error"].exit_code == 3
    assert 0.2 <= found["cpu_limit"].cpu < 0.4


def test_two_pools_and_many_threads():
    """Every rank has a pool of its own, and rewards are submitted from the sampler's callbacks."""
    with Pool(workers=1) as one, Pool(workers=1) as other:
        futures = {}

        def submit(number):
            pool = one if number % 2 else other
            futures[number] = pool.submit(lua(f"print({number})"))

        threads = []
        for number in range(20):
            threads.append(threading.Thread(target=submit, args=(number,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        wait(futures.values(), 30)
        assert len(futures) == 20
        for number, future in futures.items():
            assert int(future.result(0).stdout) == number


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
    program, stdin = tmp_path / "a.lua", tmp_path / "in"
    program.write_text("print(io.read('n') * 2)")
    stdin.write_text("21")
    ran = command("run", "--lang", "Lua", str(program), "--stdin", str(stdin))
    result = json.loads(ran.stdout)
    assert ran.returncode == 0
    assert result["status"] == "ok"
    assert result["stdout"] == "42\n"
    assert result["level"] == "kernel"
    assert set(result) == {field.name for field in fields(Result)}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lang", "klingon", "x"], "No such file"),
        (["--lang", "klingon"], "unknown language 'klingon'"),
        (["--lang", "lua", "--cpu", "-1"], "limit cpu must be a number above 0"),
        (["--jobs", "nowhere.jsonl"], "No such file"),
    ],
)
def test_a_wrong_command_is_one_sentence(arguments, said):
    ran = command("run", *arguments, given="print(1)")
    assert ran.returncode == 1
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_portable_level_can_be_asked_for():
    options = ["--lang", "lua", "--level", "portable", "--allow-weaker"]
    ran = command("run", *options, given="print(1)")
    assert json.loads(ran.stdout)["level"] == "portable"


def test_job_lines_stream_in_order():
    two_files = {"main.lua": "print((require('other')))", "other.lua": "return 42"}
    small = {"cpu": 0.2, "wall": 5, "memory": 100_000_000, "output": 100}
    loop = "while true do end"
    jobs = [
        {"id": "slow", "lang": "bash", "source": "sleep 0.5; echo slow"},
        {"id": 7, "lang": "lua", "source": "print(io.read('a'))", "stdin": "in"},
        {"id": "files", "lang": "lua", "files": two_files},
        {"id": "limits", "lang": "lua", "source": loop, "limits": small},
    ]
    wrong = [  # lines 5 to 11
        "{not json",
        {"id": "klingon", "lang": "klingon", "source": "x"},
        {"id": "typo", "lang": "lua", "sauce": "x"},
        {"id": "path", "lang": "lua", "files": {"../main.lua": "x"}},
        {"id": "number", "lang": "lua", "source": 3},
        {"id": "limit", "lang": "lua", "source": "", "limits": {"cpu": "much"}},
        [1],
    ]
    last = {"lang": "lua", "source": "print('last')"}

    lines = [*jobs, *wrong, last]
    given = ""
    for line in lines:
        given += line if isinstance(line, str) else json.dumps(line)
        given += "\n"
    ran = command("run", "--jobs", "-", given=given + "\n")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0

    ids = ["slow", 7, "files", "limits", None, "klingon", "typo", "path", "number", "limit"]
    assert [row["id"] for row in rows] == [*ids, None, None]
    statuses = [row["status"] for row in rows if "status" in row]
    assert statuses == ["ok", "ok", "ok", "cpu_limit", "ok"]
    printed = [row["stdout"] for row in rows if "stdout" in row]
    assert printed == ["slow\n", "in\n", "42\n", "", "last\n"]
    wrong_lines = [row["line"] for row in rows if "error" in row]
    assert wrong_lines == list(range(5, 12))


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
    text = text.replace('lua = ["lua5.4", "lua5.3", "lua"]', 'lua = ["klingon"]')
    text = text.replace('debian = "lua5.4"', 'debian = "klingon-nox"')
    (language_folder / "klingon.toml").write_text(text)

    main(["doctor"])
    said = capsys.readouterr().out
    assert re.search(r"isolation: (kernel|namespaces)", said)
    assert re.search(r"landlock +ok", said)
    assert re.search(r"lua +\d+ ms +\d+ ms +Lua 5", said)
    assert "klingon     missing: klingon not found: apt-get install klingon-nox" in said
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("for all that is missing: ")
    assert last.endswith("apt-get install --no-install-recommends klingon-nox")


def test_the_readmes_new_language_works(language_folder):
    """The README's new language, pasted into a file, passes the test that every language passes."""
    text = (ROOT / "README.md").read_text()
    example = text[text.index('title = "Awk"') :].partition("```")[0]
    assert len(example.strip().splitlines()) <= 10
    (language_folder / "awk.toml").write_text(example)
    if sentence := load_language("awk").missing():
        pytest.skip(sentence)
    with Pool(workers=2) as pool:
        check_language(pool, "awk")
