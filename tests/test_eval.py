"""Evaluation: benchmark rows, known programs, and the command with a real model.

The harness is tested with programs whose verdict is known. RARECODE_FULL=1 judges every one of them
instead of a sample and prints the counts of BENCHMARKS.md.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import eval as evaluation
import known_programs
import sft
from batches import make_optimizer
from forgers import FORGERS
from rewards import Judge
from runtime import content, hugging_face
from runtime.tokenizer import ChatTokenizer
from sampler import Sampler
from sandbox import Pool
from sandbox.languages import language_names, load_language
from settings import Settings
from tasks.multipl_e import (
    BenchmarkProblem,
    TestJudge,
    exchange_answers,
    load_benchmark,
    program,
)
from tasks.problems import load_problems, program_messages
from tasks.render import solution
from tasks.requests import benchmark_prompt
from tasks.whole_programs import answer_code

REPO = Path(__file__).resolve().parents[1]
FULL = bool(os.environ.get("RARECODE_FULL"))
MULTIPL_E = [name for name in language_names() if "tests" in load_language(name).answer]
needs_data = pytest.mark.skipif(
    not known_programs.DATA.is_dir(), reason="../shared/data is not here"
)


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


def slow(names, some):
    """Parameters, of which `some` are marked slow: their compilers or interpreters take seconds."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in some else name for name in names]


def installed(name):
    language = load_language(name)
    if language.missing():
        pytest.skip(language.missing())
    return language


def make_test_judge(pool, language, mode="completion"):
    """A TestJudge; skips where the language's test library is not installed."""
    try:
        return TestJudge(pool, language, mode)
    except ValueError as error:
        pytest.skip(str(error))


def add_row(language):
    """The problem that most tests use: add(x, y)."""
    rows = load_benchmark("humaneval", language)
    return next(row for row in rows if "HumanEval_53_add" in row.id)


# ---- the harness, with programs whose verdict is known ----

ADD = {  # HumanEval_53_add
    "racket": "\n  (+ x y))",
    "julia": "\n    return x + y\nend",
    "lua": "\n  return x + y\nend",
    "ocaml": " x + y",
    "r": "\n  x + y\n}",
    "perl": "\n    return $x + $y;\n}",
    "haskell": " x + y",
    "clojure": "\n  (+ x y))",
    "elixir": "\n    x + y\n  end\nend",
    "javascript": "\n  return x + y;\n}",
    "python": "\n    return x + y",
    "bash": "\n  echo $(($1 + $2))",
    "php": "\n  return $x + $y;\n}",
    "ruby": "\n  x + y\nend",
    "cpp": "\n  return x + y;",
    "java": "\n        return x + y;",
    "rust": "\n    x + y",
    "go": "\n\treturn x + y\n}",
    "typescript": "\n  return x + y;\n}",
    "scala": "\n        x + y",
    "csharp": "\n        return x + y;",
}
# Leaves before the tests, with exit code 0 (a Haskell or Go function without imports cannot).
QUIT = {
    "racket": "\n  (exit 0))",
    "julia": "\n    exit(0)\nend",
    "lua": "\n  os.exit(0)\nend",
    "ocaml": " exit 0",
    "r": "\n  quit('no', 0)\n}",
    "perl": "\n    exit 0;\n}",
    "clojure": "\n  (System/exit 0))",
    "elixir": "\n    System.halt(0)\n  end\nend",
    "javascript": "\n  process.exit(0);\n}",
    "python": "\n    raise SystemExit",
    "bash": "\n  echo 1\n}\nexit 0\nf() {",
    "php": "\n  exit(0);\n}",
    "ruby": "\n  exit!(0)\nend",
    "cpp": "\n  exit(0);",
    "java": "\n        System.exit(0); return 0;",
    "rust": "\n    std::process::exit(0)",
    "scala": "\n        sys.exit(0)",
    "csharp": "\n        Environment.Exit(0); return 0;",
    "typescript": "\n  require('process').exit(0);\n  return 0;\n}",
}


@needs_data
@pytest.mark.parametrize("name", slow(MULTIPL_E, ("cpp", "java", "scala")))
def test_multipl_e_judges_a_right_a_wrong_and_a_leaving_program(name, pool):
    language = installed(name)
    row = add_row(language)
    judge = make_test_judge(pool, language)
    chat = make_test_judge(pool, language, "chat")
    right = ADD[language.name]
    wrong = right.replace("+", "-", 1)
    whole = f"{row.prompt}{right}\n{closing(row)}"
    answer = f"<think>x</think><answer>```{language.fence[0]}\n{whole}\n```</answer>"

    submissions = [
        judge.submit(row, right + row.stop_tokens[0] + " never seen ("),
        judge.submit(row, wrong),
        judge.submit(row, QUIT.get(language.name, wrong)),
        chat.submit(row, answer),
        chat.submit(row, "no code"),
    ]
    verdicts = judge.collect(submissions, 300)
    correct = [verdict.correct for verdict in verdicts]
    assert correct == [True, False, False, True, False], [v.status for v in verdicts]


def closing(row):
    """What MultiPL-E leaves for the tests to close, and a whole program closes itself."""
    if not row.tests.lstrip().startswith("}"):
        return ""
    return "}\n}" if " Problem {" in row.prompt else "}"


@needs_data
@pytest.mark.parametrize("name", slow(sorted({name for name, *_ in FORGERS}), ("cpp", "scala")))
def test_forgers_do_not_pass(name, pool):
    """Neither by reading, leaving or printing, nor by other tests.

    Where the status says "forged", the second run was needed to find out.
    """
    language = installed(name)
    row = add_row(language)
    judge = make_test_judge(pool, language, "chat")
    kinds = []
    submissions = []
    expected = []
    for forger_language, kind, code, status in FORGERS:
        if forger_language == name:
            kinds.append(kind)
            submissions.append(judge.submit(row, f"```{language.fence[0]}\n{code}\n```"))
            expected.append((kind, False, status == "forged"))

    verdicts = judge.collect(submissions, 120)
    found = [(kind, v.correct, v.status == "forged") for kind, v in zip(kinds, verdicts)]
    assert found == expected


# Upstream's rows whose tests are no code: unbalanced brackets, Dictionary<null,null>.
NEVER_COMPILE = (
    "mbpp/cs/mbpp_568_empty_list",
    "mbpp/scala/mbpp_744_check_none",
    "mbpp/scala/mbpp_791_remove_nested",
)


@needs_data
@pytest.mark.parametrize("name", MULTIPL_E)
def test_answers_can_be_exchanged_in_every_row(name):
    """So that there is no row whose forgers are not looked for."""
    language = load_language(name)
    for row in load_benchmark("humaneval", language) + load_benchmark("mbpp", language):
        if row.id in NEVER_COMPILE:
            continue
        tests = exchange_answers(row, language.answer["tests"]["test"], random.Random(0))
        assert tests and tests != row.tests, row.id
        # The same tests in another order, but for these two, which have one test or one answer.
        if "_34_unique" not in row.id and "_432_median" not in row.id:
            assert sorted(tests) == sorted(row.tests), row.id


FAIL = {
    "cpp": ' throw std::runtime_error("it ran");',
    "rust": ' panic!("it ran")',
    "java": ' throw new RuntimeException("it ran");',
    "go": ' panic("it ran")\n}',
    "haskell": ' error "it ran"',
    "scala": ' throw new RuntimeException("it ran")',
    "csharp": ' throw new Exception("it ran");',
    "typescript": ' throw new Error("it ran");\n}',
}


@needs_data
@pytest.mark.parametrize("name", slow(FAIL, ("cpp", "scala")))
def test_exchanged_tests_compile(name, pool):
    """Else a forger would seem honest: its second run would not even begin."""
    language = installed(name)
    judge = make_test_judge(pool, language)
    rows = load_benchmark("humaneval", language)
    if not FULL:
        rows = rows[3 :: len(rows) // 2]

    def ran(rows):
        """Which rows' programs compile and get as far as their exception."""
        jobs = []
        for row in rows:
            jobs.append(judge.job(program(row, FAIL[name], language, "completion"), (1, 2)))
        return [b"it ran" in result.stderr + result.stdout for result in pool.run_all(jobs)]

    exchanged = []
    for row in rows:
        tests = exchange_answers(row, judge.table["test"], random.Random(row.id))
        exchanged.append(replace(row, tests=tests))
    # In a full run some rows do not compile with their own tests either.
    own = ran(rows) if FULL else [True] * len(rows)

    silent = []
    for row, exchanged_ran, own_ran in zip(rows, ran(exchanged), own):
        if own_ran and not exchanged_ran:
            silent.append(row.id)
    print(
        f"{name}: {len(rows) - len(silent)} of {len(rows)} rows' exchanged tests compile "
        f"as the row's own do; not: {silent}"
    )
    assert not silent


def test_a_missing_test_library_is_named(pool):
    language = installed("lua")
    tests = language.answer["tests"] | {"probe": "require('no_such_library')"}
    sentence = "^MultiPL-E's Lua tests need luaunit, which is not here: apt-get install lua-unit"
    with pytest.raises(ValueError, match=sentence):
        TestJudge(pool, replace(language, answer=language.answer | {"tests": tests}))


def judged(judge, cases):
    """Verdicts of (row, completion) pairs."""
    submissions = [judge.submit(row, text) for row, text in cases]
    return judge.collect(submissions, None)


@needs_data
@pytest.mark.parametrize(
    "bench, right, total",
    [("humaneval", 160, 161), pytest.param("mbpp", 382, 397, marks=pytest.mark.slow)],
)
def test_canonical_python_solutions(bench, right, total, pool):
    installed("python")
    known = known_programs.multipl_e(bench, pool)
    assert len(known) == total
    chosen = known if FULL else known[::4]
    judge = TestJudge(pool, "python", "chat")

    verdicts = judged(judge, chosen)
    wrong = [verdict.problem for verdict in verdicts if not verdict.correct]
    print(
        f"{bench}: {len(verdicts) - len(wrong)} of {len(verdicts)} canonical Python solutions "
        f"pass; not: {wrong}"
    )
    if FULL:
        assert len(verdicts) - len(wrong) == right
    else:
        assert len(wrong) <= 6

    # The same programs with their first return spoilt do not pass.
    spoilt = []
    for row, text in chosen:
        if "return " in text.split('"""')[-1]:
            spoilt.append((row, text.replace("return ", "return 'spoilt', ")))
    verdicts = judged(judge, spoilt)
    passed = [verdict.problem for verdict in verdicts if verdict.correct]
    print(f"{bench}: {len(passed)} of {len(verdicts)} spoilt programs pass: {passed}")
    assert not passed


# Known right programs that are not judged right here, and why.
EXPLAINED_X = {
    "python": {},
    "javascript": {
        "112": "=== between arrays",
        "155": "counts the minus sign as a digit",
        "162": "module js-md5",
    },
    "cpp": {"22": "boost", "137": "boost", "162": "openssl"},
    "java": {},
    "rust": {
        "32": "no test",
        "38": "crate rand",
        "50": "crate rand",
        "53": "crate rand",
        "91": "crate regex",
        "162": "crate md5",
    },
    "go": {},
}
EXPLAINED_EXERCISM = {
    "prolog": {"meetup": "needs a newer SWI-Prolog"},
    "racket": {},
    "scheme": {
        "list-ops": "lists of a million in uncompiled Guile",
        "robot-name": "example for Guile, test for Chez",
    },
    "python": {},
    "julia": {
        "crypto-square": "transposes characters",
        "fft": "cispi: Julia 1.6",
        "intergalactic-transmission": "typed globals: Julia 1.8",
    },
}


@needs_data
@pytest.mark.parametrize("name", slow(EXPLAINED_X, ("cpp", "java")))
def test_canonical_humaneval_x_solutions(name, pool):
    installed(name)
    check_known(f"HumanEval-X {name}", known_programs.humaneval_x(name), EXPLAINED_X[name], 5, pool)


@needs_data
def test_mbxp_solutions_in_csharp(pool):
    """Nearly all pass: some are wrong (MBCSP/229 returns what it is given), some need C# 8."""
    installed("csharp")
    cases = list(known_programs.mbxp_csharp())
    if not FULL:
        cases = cases[::36]
    results = pool.run_all([job for _, job, _ in cases])
    pairs = zip(cases, results, strict=True)
    failed = [name for (name, _, passed), result in pairs if not passed(result)]
    print(f"MBXP C#: {len(cases) - len(failed)} of {len(cases)} pass; not: {failed}")
    assert len(failed) <= 0.07 * len(cases)


@needs_data
@pytest.mark.parametrize("name", slow(known_programs.SOLVED, ("scala",)))
def test_right_answers_where_no_solutions_are_published(name, pool):
    installed(name)
    known = list(known_programs.solved(name))
    assert len(known) == 7
    judge = make_test_judge(pool, name, "chat")
    wrong = [
        (row, re.sub(r"[<>] ", "!= ", text)) for row, text in known if re.search("[<>] ", text)
    ]
    verdicts = judged(judge, known + wrong)
    assert [verdict.problem for verdict in verdicts[:7] if not verdict.correct] == []
    assert [verdict.problem for verdict in verdicts[7:] if verdict.correct] == []


@needs_data
@pytest.mark.parametrize("track", slow(EXPLAINED_EXERCISM, ("racket",)))
def test_exercism_examples(track, pool):
    installed(track)
    cases = known_programs.exercism(track)
    check_known(f"Exercism {track}", cases, EXPLAINED_EXERCISM[track], 6, pool)


def check_known(title, cases, explained, sample, pool):
    """Known right programs pass, but for the explained ones."""
    cases = list(cases)
    if not FULL:
        cases = cases[:: len(cases) // sample]
    results = pool.run_all([job for _, job, _ in cases])
    failed = {}
    for (name, _, passed), result in zip(cases, results):
        if not passed(result):
            failed[name] = result.status
    print(
        f"{title}: {len(cases) - len(failed)} of {len(cases)} known right programs pass; "
        f"not: {failed}"
    )
    assert {name.rpartition("/")[2] for name in failed} <= set(explained)


@needs_data
@pytest.mark.parametrize(
    "name, at_least",
    [
        ("javascript", 140),
        pytest.param("typescript", 120, marks=pytest.mark.slow),
        pytest.param("cpp", 100, marks=pytest.mark.slow),
    ],
)
def test_right_programs_are_not_taken_for_forgers(name, at_least, pool):
    """HumanEval-X solutions under MultiPL-E's tests, which judge them by type as well.

    Not all pass, but none may be called forged.
    """
    installed(name)
    known = list(known_programs.carried_over(name))
    chosen = known if FULL else known[:: len(known) // 5]
    verdicts = judged(make_test_judge(pool, name, "chat"), chosen)
    passed = sum(verdict.correct for verdict in verdicts)
    forged = [verdict.problem for verdict in verdicts if verdict.status == "forged"]
    print(
        f"{name}: {passed} of {len(chosen)} HumanEval-X solutions pass MultiPL-E's tests, "
        f"{len(forged)} taken for forged"
    )
    assert not forged
    assert passed >= (at_least if FULL else 3)


# ---- benchmark rows and prompts ----


@needs_data
def test_rows_and_their_subset():
    assert len(load_benchmark("humaneval", "racket")) == 161
    assert len(load_benchmark("humaneval", "racket", version="v0.4")) == 161
    assert len(load_benchmark("mbpp", "lua")) == 397

    some = load_benchmark("mbpp", "lua", count=20, seed=1)
    assert len(some) == 20
    assert some == load_benchmark("mbpp", "lua", count=20, seed=1)
    assert some != load_benchmark("mbpp", "lua", count=20, seed=2)


@needs_data
def test_a_completion_is_cut_where_the_next_definition_begins():
    row = add_row("racket")
    text = program(row, "\n  (+ x y))\n(define (g) 1)", "racket", "completion")
    assert text == row.prompt.rstrip() + "\n  (+ x y))\n" + row.tests


@needs_data
def test_prompts_of_the_modes():
    row = add_row("racket")
    assert [message["role"] for message in benchmark_prompt(row, "racket", "chat")] == ["user"]

    listing = benchmark_prompt(row, "racket", "think")
    assert listing.startswith(
        "# Task: You will be given a question (problem specification) "
        "and will generate a correct Racket program"
    )
    assert listing.count(row.prompt.strip()) == 1  # in the question; the starter is a comment alone
    end = "delimiters.\n```racket\n; YOUR CODE HERE\n```\n\nAssistant: <think>"
    assert listing.endswith(end)


@needs_data
def test_a_thought_program_is_that_of_the_answer():
    code = "(define (add x y)\n  (+ x y))"
    answer = f"<think>(f)\n```racket\nwrong\n```</think><answer>```racket\n{code}\n```</answer>"
    whole = program(add_row("racket"), answer, "racket", "think")
    assert whole.startswith(f"#lang racket\n{code}\n(require rackunit)")


@pytest.mark.parametrize(
    "after",
    [
        "",
        "\n```racket\n(displayln (add 1 2))\n```",
        "\nIt prints:\n```\n3\n```",
        "\n~~~console\n> (add 1 2)\n~~~",
        "\n```racket\n(displayln (add 1 2))",
    ],
)
@pytest.mark.parametrize("opening", ["```racket", "```scheme title=add.rkt", "```", "```lisp \r"])
def test_the_block_that_defines_the_function_is_the_program(opening, after):
    code = "(define (add x y)\n  (+ x y))"
    answer = f"First:\n```racket\n(require racket/math)\n```\n{opening}\n{code}\n```{after}"
    assert answer_code(answer, "add", load_language("racket")) == code


@needs_data
@pytest.mark.parametrize("source", ["python", "cpp"])
def test_translation_shows_its_source(source):
    rows = load_benchmark("translate", "lua", source=source)
    assert len(rows) == 161
    assert rows[0].id.startswith(f"translate/{source}-lua/")
    assert rows[0].source
    assert rows[0].source.splitlines()[0] in benchmark_prompt(rows[0], "lua", "completion")


@needs_data
@pytest.mark.parametrize(
    "bench, language, source, sentence",
    [
        ("humaneval", "prolog", "python", "MultiPL-E does not have the language"),
        ("humanevil", "lua", "python", "unknown benchmark"),
        ("translate", "lua", "cobol", "no translation sources"),
        ("crosspleval", "lua", "python", "give its folder by --data"),
    ],
)
def test_a_benchmark_that_is_not_there_is_refused(bench, language, source, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_benchmark(bench, language, source=source)


def test_crosspleval_form(tmp_path):
    row = {
        "id": "T1",
        "source": "def f(): ...",
        "prompt": "local function f()\n",
        "tests": "f()",
        "stop_tokens": ["\nlocal"],
    }
    (tmp_path / "crosspleval").mkdir()
    (tmp_path / "crosspleval/python-lua.jsonl").write_text(json.dumps(row))
    (found,) = load_benchmark("crosspleval", "lua", data=tmp_path)
    assert found.id == "crosspleval/python-lua/T1"
    text = program(found, "\nend\nlocal x", "lua", "completion")
    assert text == "local function f()\nend\nf()"


# ---- where a completion ends ----

ROW = BenchmarkProblem(
    id="humaneval/lua/HumanEval_53_add",
    task="humaneval",
    question="",
    prompt="local function add(x, y)\n",
    entry="add",
    tests="f()",
    stop_tokens=("\nlocal", "\n--"),
)


def thought_and_answer(code):
    return f"reasoning </think>\n<answer>\n```lua\n{code}\n```\n</answer>"


RIGHT = "local function add(x, y) return x + y end"
ASKED_ITSELF = "local function add(x, y) return 'another question' end"


@pytest.mark.parametrize(
    "behind",
    [
        "",
        "\n",
        "\nUser: another one.\nAssistant: <think> " + thought_and_answer(ASKED_ITSELF),
        "\n```lua\nprint(add(1, 2))\n```",
        " </think> <answer> ```lua\n" + ASKED_ITSELF + "\n``` </answer>",
    ],
)
def test_think_mode_judges_the_first_answer(behind):
    text = thought_and_answer(RIGHT)
    whole = program(ROW, text + behind, "lua", "think")
    assert whole == f"{RIGHT}\nf()"
    assert TestJudge(None, "lua", "think").stop_strings(ROW) == ("</answer>",)  # sampling ends too


@pytest.mark.parametrize(
    "first",
    [
        "reasoning without an end <answer> 3 </answer>",
        "reasoning </think> <answer> no block </answer>",
    ],
)
def test_a_later_answer_does_not_stand_for_the_first(first):
    """Without an end of its reasoning or without a block the first one has no program."""
    later = "\nUser: another\nAssistant: <think>" + thought_and_answer(ASKED_ITSELF)
    assert program(ROW, first + later, "lua", "think") == ""


def ends(text, strings):
    """A completion as sampling ends it, character by character."""
    for length in range(1, len(text) + 1):
        if any(text[:length].endswith(string) for string in strings):
            return text[:length]
    return text


@needs_data
@pytest.mark.parametrize("name", MULTIPL_E)
def test_sampling_to_the_first_stop_changes_no_program(name):
    """In every mode, for texts made of the stop tokens' own parts.

    It could where a stop token holds another one behind its own beginning.
    """
    language = load_language(name)
    rows = {row.stop_tokens: row for row in load_benchmark("humaneval", language)}
    rng = random.Random(0)
    for row in rows.values():
        block = f"```{language.fence[0]}\nadd\n```"
        parts = [*row.stop_tokens, *"\n(x", "\n\n", block, "</answer>", "</think>", "<answer>"]
        for mode in ("completion", "think", "chat"):
            strings = TestJudge(None, language, mode).stop_strings(row)
            for _ in range(100):
                text = "".join(rng.choices(parts, k=12))
                sampled = ends(text, strings)
                assert program(row, sampled, language, mode) == program(row, text, language, mode)


@needs_data
@pytest.mark.parametrize("version", ["v3", "v0.4"])
@pytest.mark.parametrize("bench", ["humaneval", "mbpp"])
def test_a_blank_line_does_not_end_a_lua_program(bench, version):
    """MultiPL-E's v3 and v0.4 stop there; upstream's 3.3 does not any more."""
    rows = load_benchmark(bench, "lua", version=version)
    body = "    local sum = x\n\n    return sum + y\nend"
    for row in rows:
        assert program(row, body + "\nlocal rest", "lua", "completion").count(body) == 1
    # Elsewhere a blank line still ends a program, as upstream has it.
    assert "\n\n" in load_benchmark(bench, "ruby", version=version)[0].stop_tokens


@needs_data
def test_a_number_says_that_a_stop_token_was_left_out(tmp_path, capsys):
    installed("lua")
    cells = {}
    for mode in ("completion", "chat"):
        settings = evaluation.EvalSettings(bench="humaneval", mode=mode)
        cells[mode] = evaluation.load_cell(settings, None, "", load_language("lua"))
    assert cells["chat"].note == ""

    row = {"correct": True, "status": "ok", "tokens": 3, "finish_reason": "stop", "sample": 0}
    flags = {"format_ok": True, "constant": False, "leaked": False, "program": "p", "id": ROW.id}
    (tmp_path / "partial-0.jsonl").write_text(json.dumps([row | flags]))
    cell = replace(cells["completion"], problems=[ROW])
    evaluation.conclude(tmp_path, cell, "humaneval lua")
    kept = json.loads((tmp_path / "results.json").read_text())["note"]
    for text in (kept, capsys.readouterr().out):
        assert "left out, as in MultiPL-E 3.3" in text


# ---- evaluate() and the command, with a real model ----


def ask(problem):
    return program_messages(problem, "prolog", 0, system=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model that has learnt four test problems by heart, so that some programs are right."""
    folder = tmp_path_factory.mktemp("tiny")
    language = load_language("prolog")
    sft.make_tiny(load_problems("sums", "train", count=300), language, ask, folder, seed=0)

    tokenizer = ChatTokenizer(folder)
    model = hugging_face.load_model(folder)
    problems = load_problems("sums", "test", count=4)
    answers = sft.rendered(problems, language, mistakes=0.0, seed=0)
    sequences = sft.encode(answers, tokenizer, ask)
    settings = sft.WarmStart(steps=60, batch=4, lr=3e-3, warmup=5)
    optimizer = make_optimizer(model)
    device = torch.device("cpu")
    sft.train_supervised(model, optimizer, sequences, settings, device, lambda text: None)
    weights = dict(model.named_parameters())
    hugging_face.save_model(weights, model.config, folder, dtype=torch.float32)
    return folder


def words(tiny, out):
    """The command of one evaluation: 10 problems, of which the model knows 4."""
    return [
        *("--model", str(tiny), "--bench", "sums", "--short_prompt", "true", "--examples", "0"),
        *("--problems", "10", "--samples", "2", "--temperature", "1", "--max_new_tokens", "100"),
        *("--out", str(out)),
    ]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an evaluation that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    evaluation.main(words(tiny, folder))
    return folder / "prolog"


def test_evaluate_in_the_loop(tiny, pool):
    problems = load_problems("sums", "test", count=6)
    seen = []
    metrics, rows = evaluation.evaluate(
        Sampler(hugging_face.load_model(tiny), slots=16),
        ChatTokenizer(tiny),
        Judge(pool, "prolog"),
        problems,
        prompt=ask,
        n=2,
        temperature=0.3,
        max_new_tokens=120,
        seed=5,
        on_rows=seen.append,
    )
    assert [(row["id"], row["sample"]) for row in rows] == [
        (problem.id, sample) for problem in problems for sample in (0, 1)
    ]
    assert sorted(len(of_problem) for of_problem in seen) == [2] * 6
    # 4 of 6 learnt by heart, at a temperature that forgives an error.
    assert metrics["pass@1"] == sum(row["correct"] for row in rows) / 12
    assert metrics["pass@1"] >= 0.5

    right = next(row for row in rows if row["correct"])
    assert Fraction(right["answer"]) == Fraction(right["value"])
    assert right["text"] == solution(problems[int(right["id"][-1])], "prolog")


class FirstLineJudge(Judge):
    """Judges the first line alone."""

    def stop_strings(self, problem):
        return ("\n",)


def test_evaluation_stops_where_the_judge_reads_no_further(tiny, pool):
    tokenizer = ChatTokenizer(tiny)
    sampler = Sampler(hugging_face.load_model(tiny), slots=16)
    problems = load_problems("sums", "test", count=4)
    judge = FirstLineJudge(pool, "prolog")
    _, rows = evaluation.evaluate(
        sampler, tokenizer, judge, problems, prompt=ask, max_new_tokens=120
    )
    for row in rows:
        assert row["finish_reason"] == "stop"
        assert row["text"].count("\n") == 1
        # "\n" and what its token may hold behind it are one token.
        first_line = row["text"].partition("\n")[0]
        assert row["tokens"] <= len(tokenizer.encode(first_line)) + 1


def test_the_command_writes_every_sample_and_the_figures(whole):
    figures = json.loads((whole / "results.json").read_text())
    assert len((whole / "samples.jsonl").read_text().splitlines()) == 20
    assert figures["problems"] == 10
    assert 0 < figures["pass@1"] < 1


def test_half_a_line_is_done_again(tiny, whole, tmp_path):
    """What a kill can leave: four problems and half of the fifth."""
    folder = tmp_path / "prolog"
    folder.mkdir()
    (folder / "settings.json").write_text((whole / "settings.json").read_text())
    lines = (whole / "partial-0.jsonl").read_text().splitlines()
    assert len(lines) == 10
    (folder / "partial-0.jsonl").write_text("\n".join([*lines[:4], lines[4][:50]]))

    evaluation.main(words(tiny, tmp_path))
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    # Four lines of before, the half one, six that were done now.
    assert len((folder / "partial-0.jsonl").read_text().splitlines()) == 11


def test_a_killed_evaluation_continues_where_it_stopped(tiny, whole, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "eval.py", *words(tiny, tmp_path), "--slots", "2"],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = tmp_path / "prolog/partial-0.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if partial.exists() and "\n" in partial.read_text():
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    samples = tmp_path / "prolog/samples.jsonl"
    assert not samples.exists()
    assert 1 <= len(partial.read_text().splitlines()) < 10

    evaluation.main(words(tiny, tmp_path))
    assert samples.read_text() == (whole / "samples.jsonl").read_text()


def test_other_settings_need_another_folder(tiny, whole):
    with pytest.raises(SystemExit, match="other settings"):
        evaluation.main([*words(tiny, whole.parent), "--seed", "1"])


@needs_data
def test_evalplus_from_the_command_line(tiny, tmp_path):
    """A model of Prolog sums has no Python: both figures are there, and 0."""
    settings = "--bench humaneval+ --lang python --problems 3 --max_new_tokens 8".split()
    evaluation.main(["--model", str(tiny), *settings, "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "python/results.json").read_text())
    assert figures["problems"] == 3
    assert figures["pass@1"] == figures["base/pass@1"] == 0
    rows = [json.loads(line) for line in (tmp_path / "python/samples.jsonl").open()]
    assert [row["base"] for row in rows] == [False] * 3


# ---- what an evaluation is continued by ----


@pytest.fixture
def evaluated(tiny, whole, tmp_path):
    """(a copy of the model, the folder of its finished evaluation): both may be changed."""
    model = shutil.copytree(tiny, tmp_path / "model")
    out = shutil.copytree(whole.parent, tmp_path / "out")
    return model, out


def zero_weights(model):
    """Other weights in the same file, of the same size."""
    loaded = hugging_face.load_model(model)
    weights = {name: 0 * tensor for name, tensor in loaded.named_parameters()}
    size = (model / "model.safetensors").stat().st_size
    hugging_face.save_model(weights, loaded.config, model, dtype=torch.float32)
    assert (model / "model.safetensors").stat().st_size == size


def edit_template(model):
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = config["chat_template"].replace("assistant", "helper")
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (zero_weights, "with other weights:"),
        (edit_template, "another tokenizer or chat template:"),
    ],
)
def test_a_new_model_under_an_old_path_is_not_mixed_with_the_old_numbers(
    change, sentence, evaluated
):
    model, out = evaluated
    before = (out / "prolog/samples.jsonl").read_text()
    change(model)
    with pytest.raises(SystemExit, match=sentence):
        evaluation.main(words(model, out))
    assert (out / "prolog/samples.jsonl").read_text() == before


def test_new_weights_have_their_own_numbers_in_a_folder_of_their_own(evaluated, tmp_path):
    """Weights of 0 always write the first token: no program is right, whatever was before."""
    model, out = evaluated
    assert json.loads((out / "prolog/results.json").read_text())["pass@1"] > 0
    zero_weights(model)
    evaluation.main(words(model, tmp_path / "new"))
    assert json.loads((tmp_path / "new/prolog/results.json").read_text())["pass@1"] == 0


def test_the_same_content_under_another_path_is_continued(evaluated):
    """The copy is asked for what the model in another folder has done: nothing is sampled again."""
    model, out = evaluated
    lines = (out / "prolog/partial-0.jsonl").read_text()
    evaluation.main(words(model, out))
    assert (out / "prolog/partial-0.jsonl").read_text().strip() == lines.strip()


def test_other_problems_under_the_same_ids_are_not_mixed(tiny, whole, monkeypatch):
    def other_answers(*arguments):
        problems = load_problems(*arguments)
        return [replace(problem, answer=problem.answer + 1) for problem in problems]

    monkeypatch.setattr(evaluation, "load_problems", other_answers)
    with pytest.raises(SystemExit, match="other problems, tests or prompts:"):
        evaluation.main(words(tiny, whole.parent))


def test_another_judge_or_an_older_version_is_not_mixed(evaluated, monkeypatch):
    model, out = evaluated
    with monkeypatch.context() as changed:
        changed.setattr(evaluation.content, "code", lambda: "other")
        with pytest.raises(SystemExit, match="another version of the code"):
            evaluation.main(words(model, out))

    file = out / "prolog/settings.json"
    old = json.loads(file.read_text())
    del old["content"]
    file.write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="other weights"):
        evaluation.main(words(model, out))


def test_another_request_is_neither_continued_nor_compared_without_a_word(tmp_path, capsys):
    """The chat request of before had no name; the same problems, judged the same."""
    same = dict.fromkeys(evaluation.OTHER, "")
    before = {"content": same | {"request": "chat, 1"}}
    now = {"content": same | {"request": "chat, 2"}}
    assert "another request" in evaluation.what_differs(tmp_path, before, now)

    row = {"id": ROW.id, "sample": 0, "correct": True, "status": "ok"}
    for name, figures in (("a", {}), ("b", {"request": "chat, 2"}), ("c", {"request": "chat, 2"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / name / "results.json").write_text(json.dumps(figures))
    evaluation.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "asked in different ways: a request without a name, chat, 2" in capsys.readouterr().out
    evaluation.main(["--compare", str(tmp_path / "b"), str(tmp_path / "c")])
    assert "asked in different ways" not in capsys.readouterr().out


@needs_data
@pytest.mark.parametrize(
    "bench, name, mode, request_name, roles",
    [
        ("humaneval", "lua", "chat", "chat, 2", ["user"]),
        ("humaneval", "python", "chat", "chat, 2", ["user"]),
        ("mbpp+", "python", "chat", "EvalPlus 0.3.1", ["user", "assistant"]),
        ("mbpp+", "python", "think", "Listing 1, 2", None),
        ("translate", "lua", "completion", "prompt to complete, 1", None),
    ],
)
def test_a_cell_says_how_it_asks(bench, name, mode, request_name, roles):
    settings = evaluation.EvalSettings(bench=bench, lang=name, mode=mode, problems=1)
    cell = evaluation.load_cell(settings, None, "", load_language(name))
    assert cell.request == request_name
    asked = cell.prompt(cell.problems[0])
    assert (None if isinstance(asked, str) else [m["role"] for m in asked]) == roles


@pytest.fixture
def trained(tmp_path):
    """A run's folder, trained with 8,096 new tokens, and a model that belongs to no run."""
    (tmp_path / "run/config.json").parent.mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(asdict(Settings(max_new_tokens=8096))))
    for name in ("run/checkpoints/step_2", "run/warm_start", "base"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2"}')
    return tmp_path


@pytest.mark.parametrize(
    "bench,mode,model,limit,why",
    [
        ("mbpp", "think", "run/checkpoints/step_2", 8096, "as in the model's run"),
        ("mbpp", "think", "run/warm_start", 8096, "as in the model's run"),
        ("humaneval", "chat", "run/checkpoints/step_2", 8096, "as in the model's run"),
        ("gsm8k", "completion", "run/checkpoints/step_2", 8096, "as in the model's run"),
        ("mbpp", "completion", "run/checkpoints/step_2", 512, "the default of benchmarks"),
        ("mbpp", "think", "base", 512, "no run's settings stand beside the model"),
    ],
)
def test_a_model_may_answer_as_long_as_in_its_run(trained, bench, mode, model, limit, why):
    """512 cuts what was trained to think for 8,096 tokens."""
    settings = evaluation.EvalSettings(bench=bench, mode=mode)
    found, said = evaluation.token_limit(settings, trained / model)
    assert found == limit
    assert why in said


def test_a_limit_that_is_given_stays(trained):
    settings = evaluation.EvalSettings(bench="mbpp", mode="think", max_new_tokens=100)
    assert evaluation.token_limit(settings, trained / "run/checkpoints/step_2")[0] == 100


def test_a_translation_in_think_mode_shows_source_and_begun_code_once():
    row = replace(ROW, source="def add(x, y): return x + y", source_language="python")
    asked = benchmark_prompt(row, "lua", "think")
    assert asked.count(row.source) == 1
    assert asked.count(row.prompt.strip()) == 1


def test_digests_see_every_byte_and_no_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(100_000))
    one = content.weights(tmp_path / "a")
    assert content.weights(tmp_path / "b") == one
    with open(tmp_path / "b/model.safetensors", "r+b") as file:
        file.seek(77_777)
        file.write(b"x")
    assert content.weights(tmp_path / "b") != one
    assert content.of_texts(["ab", "c"]) != content.of_texts(["a", "bc"])


def test_ranks_give_the_numbers_of_one_process(tiny, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", "eval.py", *words(tiny, tmp_path)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("samples.jsonl", "results.json"):
        assert (tmp_path / "prolog" / name).read_text() == (whole / name).read_text()


def test_an_error_of_the_command_is_one_sentence(tiny):
    done = subprocess.run(
        [sys.executable, "eval.py", "--model", str(tiny), "--lang", "cobol"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    sentence = r"eval.py: unknown language 'cobol': choose one of .+\n"
    assert re.fullmatch(sentence, done.stderr)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--bench", "humaneval", "--lang", "prolog"], "MultiPL-E does not have the language"),
        (["--mode", "poetry"], "unknown mode 'poetry'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluation.main(["--model", "DIR", *more])


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises((ValueError, SystemExit), match=re.escape(str(tmp_path))):
        evaluation.main(["--model", str(tmp_path), "--bench", "sums"])
