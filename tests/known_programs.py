"""Programs whose verdict is known, as sandbox jobs: they test the harness itself (test_eval.py).

Each function yields (name, Job, passed) where passed(result) says whether the program was found right.
"""

import gzip
import json
import re
from pathlib import Path

from sandbox import Job, Limits
from sandbox.languages import load_language
from tasks.multipl_e import TestJudge, load_benchmark

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
NONCE = "known5a0f3c"


def rows(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def multipl_e(bench, pool):
    """Canonical Python solutions of HumanEval and (sanitized) MBPP in MultiPL-E's Python rows: (row, completion)."""
    if bench == "humaneval":
        known = {
            r["task_id"].split("/")[1]: r["prompt"] + r["canonical_solution"]
            for r in rows("humaneval/HumanEval.jsonl.gz")
        }
    else:
        known = {str(r["task_id"]): r["code"] for r in rows("mbpp/sanitized-mbpp.jsonl.gz")}
    number = re.compile(r"_(\d+)_")
    return [
        (row, f"```python\n{known[number.search(row.id)[1]]}\n```")
        for row in load_benchmark(bench, "python")
    ]


def carried_over(name):
    """HumanEval-X solutions as answers to MultiPL-E's rows: (row, completion). Only types and names are adapted, so not all of them fit."""
    code = {"cpp": "cpp", "javascript": "js"}[name]
    known = {
        r["task_id"].split("/")[1]: r["prompt"] + r["canonical_solution"]
        for r in rows(f"humaneval_x/humaneval_{code}.jsonl.gz")
    }
    for row in load_benchmark("humaneval", name):
        number, function = re.search(r"_(\d+)_(\w+)", row.id).groups()
        text = known[number]
        if name == "cpp":
            text = re.sub(r"\bint\b", "long", text.replace("#include", "\n#include"))
        elif (names := re.findall(r"(?m)^const (\w+) = ", text)) and function not in names:
            text += f"\nconst {function} = {names[-1]}"
        yield row, f"```{load_language(name).fence[0]}\n{text}\n```"


def humaneval_x(name):
    """Canonical solutions of HumanEval-X under its own tests."""
    language = load_language(name)
    code = {
        "python": "python",
        "cpp": "cpp",
        "java": "java",
        "javascript": "js",
        "go": "go",
        "rust": "rust",
    }[name]
    build = {
        "cpp": _cpp,
        "java": _java,
        "javascript": _javascript,
        "go": _go,
        "rust": _rust,
        "python": _python,
    }[name]
    judge = TestJudge(None, language)
    for row in rows(f"humaneval_x/humaneval_{code}.jsonl.gz"):
        job = build(row)
        job.limits = job.limits or Limits(**{**vars(language.limits), "cpu": 15.0})
        yield (
            row["task_id"],
            job,
            lambda result: (
                result.status == "ok"
                and judge.passes(result, NONCE)
                and b"Assertion failed" not in result.stderr
            ),
        )


def _python(row):
    return Job(
        "python",
        {
            "main.py": f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\nprint('{NONCE}')\n"
        },
    )


def _cpp(row):
    test = re.sub(r"\}\s*\Z", f'puts("{NONCE}"); }}\n', row["test"])
    return Job(
        "cpp",
        {"main.cpp": f"#include <stdio.h>\n{row['prompt']}{row['canonical_solution']}\n{test}"},
    )


def _java(row):
    """Java runs the first class of a source file, so the tests' Main goes before the solution, and the imports before both."""
    program, imports = row["prompt"] + row["canonical_solution"], r"(?m)^import .*;$"
    hoisted = "\n".join(re.findall(imports, program) + re.findall(imports, row["test"]))
    test = re.sub(
        r"\}\s*\}\s*\Z", f'System.out.println("{NONCE}"); }} }}\n', re.sub(imports, "", row["test"])
    )
    return Job("java", {"Main.java": f"{hoisted}\n{test}\n{re.sub(imports, '', program)}"})


def _javascript(row):
    return Job(
        "javascript",
        {
            "main.js": f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\nconsole.log('{NONCE}')\n"
        },
    )


def _rust(row):
    """The #[test] functions are called from main; the crates that the data imports everywhere are not here."""
    declaration = re.sub(r"(?m)^\s*use (rand|regex|md5)\b.*;$", "", row["declaration"])
    test = re.sub(r"#\[(cfg\(test\)|test)\]", "", row["test"]).replace(
        "    fn test_", "    pub fn test_"
    )
    calls = "".join(f"tests::{name}(); " for name in re.findall(r"fn (test_\w+)", test))
    return Job(
        "rust",
        {
            "main.rs": f'{declaration}{row["canonical_solution"]}\n{test}\nfn main() {{ {calls}println!("{NONCE}"); }}\n'
        },
    )


# What testify's assert does, in the standard library.
GO_ASSERT = """
type checker struct{ t *testing.T }
func (c checker) New(t *testing.T) checker { return checker{t} }
func (c checker) Equal(a, b interface{}, _ ...interface{}) { if !reflect.DeepEqual(a, b) { c.t.Fatalf("%v is not %v", a, b) } }
func (c checker) Nil(a interface{}) { if a != nil && !reflect.ValueOf(a).IsNil() { c.t.Fatalf("%v is not nil", a) } }
func (c checker) True(a bool) { c.Equal(a, true) }
func (c checker) False(a bool) { c.Equal(a, false) }
var assert checker
"""


def _go(row):
    imports = r"(?m)^import\s*\([^)]*\)|^import .*$"
    program = (
        re.sub(imports, "", f"{row['prompt']}{row['canonical_solution']}\n{row['test']}")
        + GO_ASSERT
    )
    program += (
        f'\nfunc TestZzz(t *testing.T) {{ os.Stdout.WriteString("{NONCE}\\n") }}\n'  # runs last
    )
    known = set(re.findall(r'"([\w/]+)"', row["import"] + row["prompt"] + row["test_setup"])) | {
        "testing",
        "reflect",
        "os",
        "math",
        "sort",
        "strings",
    }
    used = sorted(
        name
        for name in known
        if name[0].islower() and re.search(rf"\b{name.rpartition('/')[2]}\.\w", program)
    )
    source = "package main\n" + "".join(f'import "{name}"\n' for name in used) + program
    limits = Limits(**{**vars(load_language("go").compile_limits), "cpu": 15.0})
    return Job(
        "go",
        {"main_test.go": source},
        limits=limits,
        run=["go", "test", "-vet=off", "-v", "main_test.go"],
    )


def exercism(track):
    """Example solutions of Exercism under the exercise's own tests."""
    command = {
        "prolog": _prolog_test,
        "racket": _racket_test,
        "python": _python_test,
        "scheme": _scheme_test,
        "julia": _julia_test,
    }[track]
    for row in rows(f"exercism/{track}.jsonl.gz"):
        files = {**row["support"], **row["editor"], **row["tests"]}
        files |= dict(zip(row["stub"], row["example"].values()))
        if track == "julia":  # an option of @testset that Julia 1.5 does not have
            files = {
                name: text.replace("@testset verbose = true ", "@testset ")
                for name, text in files.items()
            }
        limits = Limits(**{**vars(load_language(track).limits), "cpu": 15.0})
        yield (
            row["slug"],
            Job(track, files, limits=limits, run=command(row)),
            lambda result: result.status == "ok",
        )


def _prolog_test(row):
    stub, tests = list(row["stub"])[0], list(row["tests"])[0]
    return [
        "swipl",
        "-f",
        stub,
        "-s",
        tests,
        "-g",
        "run_tests,halt",
        "-t",
        "halt(1)",
        "--",
        "--all",
    ]


def _racket_test(row):
    return ["racket", "-N", "raco", "-l-", "raco", "test", *row["tests"]]


def _python_test(row):
    return ["python3", "-B", "-m", "unittest", *(Path(name).stem for name in row["tests"])]


def _scheme_test(row):
    return ["guile", "--no-auto-compile", "-s", "test.scm"]


def _julia_test(row):
    return ["julia", "--startup-file=no", "--history-file=no", *row["tests"]]
