"""TypeScript's types are checked as upstream's `tsc --target esnext` does, in half its time."""

import pytest

from sandbox import Job, Limits, Pool
from sandbox.languages import load_language

TYPESCRIPT = load_language("typescript")
TSC = ["node", "{tsc}", "--target", "esnext", "tests.ts"]
pytestmark = pytest.mark.skipif(
    bool(TYPESCRIPT.missing()), reason=TYPESCRIPT.missing() or "typescript"
)

# Errors in the program, and in a library to whose names it adds: those stand in no file of its own.
PROGRAMS = {
    "const n: number = 3; console.log(n);": True,
    "const n: number = '3';": False,
    "let y = 1; let y = 2;": False,
    "let o = { a: 1 }; o.b = 2;": False,
    "for (const [k, v] of new Map([[1, 'a']])) { console.log(k + v); }": True,
    "const crypto = require('crypto');": False,  # upstream has no names of Node
    "import * as fs from 'fs'; console.log(fs);": False,
    "const name = 'x';": False,  # a global of browsers
    "var name = 'x';": False,
    "class Node { constructor(public next: Node) {} }": False,
    "interface Node { next: Node | null }": True,
    "interface Node { children: string[] }": False,  # Element no longer fits it
    "interface Array<T> { sum(): number } [1].sum();": True,
    "interface Array<T, U> {}": False,
    "export {}; declare global { interface Node { children: string[] } }": False,
    "export {}; class Node { constructor(public next: Node) {} }": True,
    "function print(x: number): void { console.log(x); }": False,
    "function find(x: number): number { return x; } find(1);": True,
    "var undefined = 1;": False,
    "const x = await Promise.resolve(1);": False,
}


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as pool:
        yield pool


def started(pool, file, program, run=None):
    """The future Result of a program, compiled by the language's own command or by `run`."""
    limits = Limits(cpu=20.0, processes=1, file_size=64 << 20)
    return pool.submit(Job("typescript", {file: program}, limits=limits, run=run))


@pytest.mark.slow
def test_a_program_compiles_where_tsc_compiles_it(pool):
    ours = [started(pool, "tests.ts", program) for program in PROGRAMS]
    theirs = [started(pool, "tests.ts", program, TSC) for program in PROGRAMS]
    compiled = [future.result().status != "compile_error" for future in ours]
    assert dict(zip(PROGRAMS, compiled)) == PROGRAMS
    assert [future.result().status == "ok" for future in theirs] == compiled


def test_a_whole_program_finds_nodes_names_and_one_with_tests_does_not(pool):
    program = (
        "import { readFileSync } from 'fs';\nconst name = process.platform;\n"
        "const size: number = require('path').join('a', 'b').length;\n"
        "let timer: NodeJS.Timeout;\nconsole.log(size, typeof readFileSync, typeof name);\n"
    )
    whole = started(pool, "main.ts", program).result()
    assert (whole.status, whole.stdout) == ("ok", b"3 function string\n"), whole
    assert started(pool, "tests.ts", program).result().status == "compile_error"
