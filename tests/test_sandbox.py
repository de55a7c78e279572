"""The sandbox with its real interpreters: languages, statuses, pool."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import Job, Limits, Pool, SandboxError
from sandbox.languages import language_names, load_language

NAMES = language_names()


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as pool:
        yield pool


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_of_every_language(pool, name):
    if sentence := load_language(name).missing():
        pytest.skip(sentence)
    check_language(pool, name)


def check_language(pool, name):
    """pass prints 42 from the 21 on its stdin, wrong prints something else, error fails, loop ends at its CPU limit."""
    language = load_language(name)
    stdin = language.fixtures.get("stdin", "").encode()
    short = replace(
        language.limits, cpu=0.5 if language.limits.cpu <= 1 else 1.5
    )  # beyond the start of the slowest runtimes
    kinds = {"pass": None, "wrong": None, "error": None, "loop": short}
    jobs = [
        Job(name, {language.file: language.fixtures[kind]}, stdin, limits)
        for kind, limits in kinds.items()
    ]
    passed, wrong, error, loop = pool.run_all(jobs)
    assert (passed.status, passed.stdout.split()) == ("ok", [b"42"]), passed
    assert wrong.status == "ok" and wrong.stdout.split() != [b"42"], wrong
    assert error.status in ("error", "compile_error"), error
    assert (
        loop.status == "cpu_limit" and loop.cpu < language.limits.cpu + language.compile_limits.cpu
    ), loop


def test_an_unknown_language_and_a_missing_interpreter_are_one_sentence(pool, monkeypatch):
    with pytest.raises(ValueError, match="unknown language 'klingon': choose one of .*prolog"):
        pool.submit(Job("klingon", {}))
    from sandbox import languages

    for name, value, said in (
        ("PATH", "/nowhere", "lua5.4 not found: apt-get install lua5.4"),
        ("RARECODE_LUA", "/no/lua", "RARECODE_LUA=/no/lua is no"),
    ):
        monkeypatch.setenv(name, value)
        languages._find.cache_clear()
        with pytest.raises(SandboxError, match=said):
            pool.submit(Job("lua", {"main.lua": ""}))
        monkeypatch.undo()
        languages._find.cache_clear()


def test_ids_and_order(pool):
    jobs = [
        Job("lua", {"main.lua": f"print({number})"}, id=f"job {number}") for number in range(20)
    ]
    results = pool.run_all(jobs)
    assert [(r.id, int(r.stdout)) for r in results] == [
        (f"job {number}", number) for number in range(20)
    ]
    assert sorted(r.id for r in pool.run(jobs)) == sorted(job.id for job in jobs)


def test_a_batch_has_one_deadline(pool):
    loops = [
        Job("lua", {"main.lua": f"while {number} do end"}, limits=Limits(cpu=2), id=number)
        for number in range(10)
    ]
    results = pool.run_all(loops, deadline=0.5)
    assert [r.id for r in results] == list(range(10)) and {r.status for r in results} == {
        "sandbox_error"
    }
    assert pool.run_all([Job("lua", {"main.lua": "print(1)"})])[0].status == "ok"


@pytest.mark.parametrize(
    "column, header",
    list(enumerate(["x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h"])),
    ids=["x86_64", "aarch64"],
)
def test_system_call_numbers_are_those_of_the_kernels_headers(column, header):
    """The aarch64 table has not run on a machine; this much can be said of it here."""
    path = Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"{path} is not here: apt-get install linux-libc-dev")
    right = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    }
    from sandbox import syscalls

    table = {name: row[column] for name, row in (syscalls._DENIED | syscalls._OTHER).items()}
    assert {
        name: number
        for name, number in table.items()
        if number is not None and right.get(name, number) != number
    } == {}
    assert {name for name in right if name in table and table[name] is None} == set()
    assert len(set(table) & set(right)) > 90
