"""The sandbox with its real interpreters: languages, statuses, pool."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import Job, Limits, Pool, SandboxError, languages, syscalls
from sandbox.languages import language_names, load_language

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as pool:
        yield pool


def lua(source, **more):
    return Job("lua", {"main.lua": source}, **more)


def bash(source, **more):
    return Job("bash", {"main.sh": source}, **more)


@pytest.mark.parametrize("name", language_names())
def test_fixtures_of_every_language(pool, name):
    if sentence := load_language(name).missing():
        pytest.skip(sentence)
    check_language(pool, name)


def check_language(pool, name):
    """pass prints 42 from the 21 on its stdin, wrong another number; error fails, loop never ends.

    test_sandbox_pool.py checks the README's example of a new language by it.
    """
    language = load_language(name)
    stdin = language.fixtures.get("stdin", "").encode()
    beyond_start = 0.5 if language.limits.cpu <= 1 else 1.5  # of the slowest runtimes
    short = replace(language.limits, cpu=beyond_start)
    jobs = []
    for kind in ("pass", "wrong", "error", "loop"):
        files = {language.file: language.fixtures[kind]}
        limits = short if kind == "loop" else None
        jobs.append(Job(name, files, stdin, limits))
    passed, wrong, error, loop = pool.run_all(jobs)

    assert passed.status == "ok", passed
    assert passed.stdout.split() == [b"42"], passed
    assert wrong.status == "ok", wrong
    assert wrong.stdout.split() != [b"42"], wrong
    assert error.status in ("error", "compile_error"), error
    assert loop.status == "cpu_limit", loop
    at_most = language.limits.cpu + language.compile_limits.cpu
    assert loop.cpu < at_most, loop


def test_an_unknown_language_is_one_sentence(pool):
    with pytest.raises(ValueError, match="unknown language 'klingon': choose one of .*prolog"):
        pool.submit(Job("klingon", {}))


@pytest.mark.parametrize(
    "variable, value, said",
    [
        ("PATH", "/nowhere", "lua5.4 not found: apt-get install lua5.4"),
        ("RARECODE_LUA", "/no/lua", "RARECODE_LUA=/no/lua is not a program"),
    ],
)
def test_a_missing_interpreter_is_one_sentence(pool, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    languages.find_program.cache_clear()
    with pytest.raises(SandboxError, match=said):
        pool.submit(lua(""))
    monkeypatch.undo()
    languages.find_program.cache_clear()


def test_ids_and_order(pool):
    jobs = [lua(f"print({number})", id=f"job {number}") for number in range(20)]
    results = pool.run_all(jobs)
    ids = [job.id for job in jobs]
    assert [result.id for result in results] == ids
    assert [int(result.stdout) for result in results] == list(range(20))

    as_they_end = [result.id for result in pool.run(jobs)]
    assert sorted(as_they_end) == sorted(ids)


def test_a_batch_has_one_deadline(pool):
    """Ten loops of 2 s on two launchers take 10 s; after 0.5 s none has ended."""
    loops = []
    for number in range(10):
        source = f"while {number} do end"
        loops.append(lua(source, limits=Limits(cpu=2), id=number))
    results = pool.run_all(loops, deadline=0.5)
    assert [result.id for result in results] == list(range(10))
    assert {result.status for result in results} == {"sandbox_error"}
    assert pool.submit(lua("print(1)")).result().status == "ok"


@pytest.mark.parametrize(
    "column, header",
    [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_system_call_numbers_are_those_of_the_kernels_headers(column, header):
    """The aarch64 table has not run on a machine; this much can be said of it here."""
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"{path} is not here: apt-get install linux-libc-dev")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    right = {name: int(number) for name, number in defined}

    known = 0
    for name, numbers in syscalls.ALL_NUMBERS.items():
        if name in right:
            assert numbers[column] == right[name], name
            known += 1
    assert known > 90  # the rest is newer than the headers, or of the other machine only


def test_a_rule_holds_as_long_as_its_ruleset():
    """A rule is of an inode: /proc/stat gets a new one once memory is short and nobody has it open.

    Every program after that would be refused it, and each Julia program fail.
    """
    script = """
import os, sys
sys.path.append("sandbox")
import isolation
isolation.landlock_ruleset([("/proc/stat", isolation.READ)])
for descriptor in os.listdir("/proc/self/fd"):
    if os.path.exists(f"/proc/self/fd/{descriptor}"):
        print(os.readlink(f"/proc/self/fd/{descriptor}"))
"""
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "/proc/stat" in ran.stdout.splitlines(), ran.stdout


def test_streams_can_be_opened_by_name(pool):
    """When root runs the trainer, programs run as another user, who must own the pipes.

    5,000 bytes do not fit a pipe as 2 do: they come as a file in memory.
    """
    script = "cat /dev/stdin; echo out > /dev/stdout; echo error > /dev/stderr"
    for stdin in (b"21", b"x" * 5000):
        result = pool.submit(bash(script, stdin=stdin)).result()
        assert (result.stdout, result.stderr) == (stdin + b"out\n", b"error\n"), result


def test_a_program_may_change_modes_and_times_of_its_own_files_only(pool):
    script = """
echo > f && chmod 600 f && touch -d @1 f && stat -c '%a %Y' f
for path in / /tmp /dev/null /usr/bin/env "$HOME"/..; do
    chmod 777 "$path" 2> /dev/null && echo "changed $path"
    touch -d @1 "$path" 2> /dev/null && echo "touched $path"
done
true
"""
    result = pool.submit(bash(script)).result()
    assert result.stdout == b"600 1\n", result
