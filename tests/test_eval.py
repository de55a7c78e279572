"""Evaluation: figures by hand, benchmark rows, a harness tested with programs whose verdict is known, resume and ranks.

RARECODE_FULL=1 judges every known program instead of a sample and prints the counts of BENCHMARKS.md.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import known_programs
import pytest
import torch
from forgers import FORGERS

import eval as evaluation
import sft
from rewards import Judge
from runtime import hugging_face
from runtime.tokenizer import ChatTokenizer
from sampler import Sampler
from sandbox import Pool
from sandbox.languages import language_names, load_language
from tasks.multipl_e import (
    TestJudge,
    answer_block,
    benchmark_prompt,
    exchange_answers,
    load_benchmark,
    program,
)
from tasks.problems import load_problems, program_messages
from tasks.render import solution

REPO = Path(__file__).resolve().parents[1]
FULL = bool(os.environ.get("RARECODE_FULL"))
needs_data = pytest.mark.skipif(
    not known_programs.DATA.is_dir(), reason="../shared/data is not here"
)
MULTIPL_E = [name for name in language_names() if "tests" in load_language(name).answer]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


def installed(name):
    language = load_language(name)
    if language.missing():
        pytest.skip(language.missing())
    return language


def test_judge(pool, language, mode="completion"):
    """A TestJudge; skips where the language's test library is not installed."""
    try:
        return TestJudge(pool, language, mode)
    except ValueError as error:
        pytest.skip(str(error))


test_judge.__test__ = False  # not a test


# ---- figures ----


def test_pass_at_k_is_unbiased():
    assert (
        evaluation.pass_at_k(4, 1, 2) == 0.5
        and evaluation.pass_at_k(5, 5, 3) == 1.0
        and evaluation.pass_at_k(5, 0, 3) == 0.0
    )
    rng, draws = random.Random(0), 20000
    outcomes = [True] * 3 + [False] * 7
    estimate = sum(any(rng.sample(outcomes, 4)) for _ in range(draws)) / draws
    assert evaluation.pass_at_k(10, 3, 4) == pytest.approx(estimate, abs=0.01)


def test_intervals():
    low, high = evaluation.interval([1, 0, 1, 1])
    assert (low, high) == (
        pytest.approx(0.301, abs=1e-3),
        pytest.approx(0.954, abs=1e-3),
    )  # Wilson, p = 0.75, n = 4
    low, high = evaluation.interval([0.0] * 10)
    assert low == 0.0 and high == pytest.approx(0.278, abs=1e-3)
    rng, inside = random.Random(1), 0
    for _ in range(
        300
    ):  # 40 problems of 4 samples each with their own difficulty: 95 % of the intervals hold the true mean
        rates = [
            sum(rng.random() < d for _ in range(4)) / 4
            for d in (rng.betavariate(0.5, 1.5) for _ in range(40))
        ]
        low, high = evaluation.interval(rates)
        inside += low <= 0.25 <= high
    assert 0.90 <= inside / 300 <= 0.99


def rows_of(outcomes):
    found = []
    for id, corrects in outcomes.items():
        for sample, correct in enumerate(corrects):
            status = "sandbox_error" if correct is None else "ok"
            found.append(
                dict(
                    id=id,
                    sample=sample,
                    correct=bool(correct),
                    status=status,
                    program=f"{id}{sample}",
                    tokens=10,
                    finish_reason="stop",
                    format_ok=True,
                    constant=False,
                    leaked=False,
                )
            )
    return found


def test_summary_by_hand():
    found = evaluation.summary(
        rows_of({"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1], "d": [None] * 4})
    )
    assert (
        found["pass@1"] == 0.5
        and found["any_of_n"] == pytest.approx(2 / 3)
        and found["all_of_n"] == pytest.approx(1 / 3)
    )
    assert found["pass@2"] == pytest.approx((1 - 1 / 6 + 0 + 1) / 3) and found[
        "pass@4"
    ] == pytest.approx(2 / 3)
    assert found["sandbox/sandbox_error_frac"] == 0.25
    with pytest.raises(ValueError, match="nothing could be judged"):
        evaluation.summary(rows_of({"a": [None]}))


def test_comparison_is_paired(tmp_path, capsys):
    a = {f"p{n}": [n % 2] for n in range(40)}
    b = {
        id: [1] if n < 10 else outcome for n, (id, outcome) in enumerate(a.items())
    }  # 5 problems gained, none lost
    for name, outcomes in (("a", a), ("b", b | {"only": [1]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows_of(outcomes))
        )
    evaluation.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (found["gained"], found["lost"], found["unchanged"], found["only_in_b"]) == (5, 0, 35, 1)
    assert (
        found["difference"] == 0.125
        and 0 < found["difference_low"] < 0.125 < found["difference_high"]
        and found["p"] < 0.05
    )
    with pytest.raises(ValueError, match="no problem in common"):
        evaluation.compare(rows_of(a), rows_of({"x": [1]}))
    with pytest.raises(ValueError, match="does not exist"):
        evaluation.main(["--compare", str(tmp_path / "a"), str(tmp_path / "nothing")])


# ---- the harness, with programs whose verdict is known ----

ADD = {  # HumanEval_53_add
    "racket": "\n  (+ x y))", "julia": "\n    return x + y\nend", "lua": "\n  return x + y\nend", "ocaml": " x + y", "r": "\n  x + y\n}",
    "perl": "\n    return $x + $y;\n}", "haskell": " x + y", "clojure": "\n  (+ x y))", "elixir": "\n    x + y\n  end\nend",
    "javascript": "\n  return x + y;\n}", "python": "\n    return x + y", "bash": "\n  echo $(($1 + $2))", "php": "\n  return $x + $y;\n}",
    "ruby": "\n  x + y\nend", "cpp": "\n  return x + y;", "java": "\n        return x + y;", "rust": "\n    x + y", "go": "\n\treturn x + y\n}",
}  # fmt: skip
QUIT = {  # leaves before the tests, with exit code 0 (a Haskell or Go function without imports cannot)
    "racket": "\n  (exit 0))", "julia": "\n    exit(0)\nend", "lua": "\n  os.exit(0)\nend", "ocaml": " exit 0", "r": "\n  quit('no', 0)\n}",
    "perl": "\n    exit 0;\n}", "clojure": "\n  (System/exit 0))", "elixir": "\n    System.halt(0)\n  end\nend",
    "javascript": "\n  process.exit(0);\n}", "python": "\n    raise SystemExit", "bash": "\n  echo 1\n}\nexit 0\nf() {", "php": "\n  exit(0);\n}",
    "ruby": "\n  exit!(0)\nend", "cpp": "\n  exit(0);", "java": "\n        System.exit(0); return 0;", "rust": "\n    std::process::exit(0)",
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", MULTIPL_E)
def test_multipl_e_judges_a_right_a_wrong_and_a_leaving_program(name, pool):
    language = installed(name)
    row = next(r for r in load_benchmark("humaneval", language) if "HumanEval_53_add" in r.id)
    right, wrong = ADD[language.name], ADD[language.name].replace("+", "-", 1)
    judge, chat = test_judge(pool, language), test_judge(pool, language, "chat")
    whole = f"<think>x</think><answer>```{language.fence[0]}\n{row.prompt}{right}\n{closing(row)}\n```</answer>"
    texts = [right + row.stop_tokens[0] + " never seen (", wrong, QUIT.get(language.name, wrong)]
    submissions = [judge.submit(row, text) for text in texts] + [
        chat.submit(row, text) for text in (whole, "no code")
    ]
    verdicts = judge.collect(submissions, 300)
    assert [v.correct for v in verdicts] == [True, False, False, True, False], [
        v.status for v in verdicts
    ]


@needs_data
@pytest.mark.parametrize("name", sorted({name for name, *_ in FORGERS}))
def test_forgers_do_not_pass(name, pool):
    """Neither by reading, leaving or printing, nor by other tests; where the status says so, the second run was needed to find out."""
    language = installed(name)
    row = next(r for r in load_benchmark("humaneval", language) if "HumanEval_53_add" in r.id)
    judge, mine = (
        test_judge(pool, language, "chat"),
        [forger[1:] for forger in FORGERS if forger[0] == name],
    )
    verdicts = judge.collect(
        [judge.submit(row, f"```{language.fence[0]}\n{code}\n```") for _, code, _ in mine], 120
    )
    assert [(kind, v.correct, v.status == "forged") for (kind, _, _), v in zip(mine, verdicts)] == [
        (kind, False, status == "forged") for kind, _, status in mine
    ]


@needs_data
@pytest.mark.parametrize("name", MULTIPL_E)
def test_answers_can_be_exchanged_in_every_row(name):
    """So that there is no row whose forgers are not looked for."""
    language = load_language(name)
    for row in load_benchmark("humaneval", language) + load_benchmark("mbpp", language):
        tests = exchange_answers(row, language.answer["tests"]["test"], random.Random(0))
        assert tests and tests != row.tests, row.id
        if (
            "_34_unique" not in row.id and "_432_median" not in row.id
        ):  # these have one test, or one answer
            assert sorted(tests) == sorted(row.tests), row.id


FAIL = {
    "cpp": ' throw std::runtime_error("it ran");',
    "rust": ' panic!("it ran")',
    "java": ' throw new RuntimeException("it ran");',
    "go": ' panic("it ran")\n}',
    "haskell": ' error "it ran"',
}


@needs_data
@pytest.mark.parametrize("name", FAIL)
def test_exchanged_tests_compile(name, pool):
    """Else a forger would seem honest: its second run would not even begin."""
    language = installed(name)
    judge, rows = test_judge(pool, language), load_benchmark("humaneval", language)
    rows = rows if FULL else rows[3 :: len(rows) // 2]
    exchanged = [
        replace(row, tests=exchange_answers(row, judge.table["test"], random.Random(row.id)))
        for row in rows
    ]
    results = pool.run_all(
        [judge.job(program(row, FAIL[name], language, "completion"), (1, 2)) for row in exchanged]
    )
    plain = (
        pool.run_all(
            [judge.job(program(row, FAIL[name], language, "completion"), (1, 2)) for row in rows]
        )
        if FULL
        else results
    )
    silent = [
        row.id
        for row, r, p in zip(rows, results, plain)
        if b"it ran" not in r.stderr + r.stdout and (not FULL or b"it ran" in p.stderr + p.stdout)
    ]
    print(
        f"{name}: {len(rows) - len(silent)} of {len(rows)} rows' exchanged tests compile as the row's own do; not: {silent}"
    )
    assert not silent


def test_a_missing_test_library_is_named(pool):
    language = installed("lua")
    tests = language.answer["tests"] | {"probe": "require('no_such_library')"}
    with pytest.raises(
        ValueError,
        match=r"^MultiPL-E's Lua tests need luaunit, which is not here: apt-get install lua-unit",
    ):
        TestJudge(pool, replace(language, answer=language.answer | {"tests": tests}))


def closing(row):
    """What MultiPL-E leaves for the tests to close, and a whole program closes itself."""
    if not row.tests.lstrip().startswith("}"):
        return ""
    return "}\n}" if "class Problem" in row.prompt else "}"


@needs_data
@pytest.mark.parametrize("bench,right,total", [("humaneval", 160, 161), ("mbpp", 382, 397)])
def test_canonical_python_solutions(bench, right, total, pool):
    installed("python")
    known = known_programs.multipl_e(bench, pool)
    assert len(known) == total
    chosen = known if FULL else known[::4]
    judge = TestJudge(pool, "python", "chat")
    verdicts = judge.collect([judge.submit(row, text) for row, text in chosen], None)
    wrong = [v.problem for v in verdicts if not v.correct]
    print(
        f"{bench}: {len(verdicts) - len(wrong)} of {len(verdicts)} canonical Python solutions pass; not: {wrong}"
    )
    assert len(wrong) <= total - right if FULL else len(wrong) <= 6
    if FULL:
        assert len(verdicts) - len(wrong) == right
    # the same programs with their first return spoilt do not pass
    spoilt = [
        (row, re.sub(r"return ", "return 'spoilt', ", text))
        for row, text in chosen
        if "return " in text.split('"""')[-1]
    ]
    verdicts = judge.collect([judge.submit(row, text) for row, text in spoilt], None)
    passed = [v.problem for v in verdicts if v.correct]
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
@pytest.mark.parametrize("name", EXPLAINED_X)
def test_canonical_humaneval_x_solutions(name, pool):
    installed(name)
    check_known(f"HumanEval-X {name}", known_programs.humaneval_x(name), EXPLAINED_X[name], 5, pool)


@needs_data
@pytest.mark.parametrize("track", EXPLAINED_EXERCISM)
def test_exercism_examples(track, pool):
    installed(track)
    check_known(
        f"Exercism {track}", known_programs.exercism(track), EXPLAINED_EXERCISM[track], 6, pool
    )


def check_known(title, cases, explained, sample, pool):
    cases = list(cases)
    chosen = cases if FULL else cases[:: len(cases) // sample]
    results = pool.run_all([job for _, job, _ in chosen])
    failed = {name: r.status for (name, _, passed), r in zip(chosen, results) if not passed(r)}
    print(
        f"{title}: {len(chosen) - len(failed)} of {len(chosen)} known right programs pass; not: {failed}"
    )
    assert {name.rpartition("/")[2] for name in failed} <= set(explained)


@needs_data
@pytest.mark.parametrize("name,at_least", [("javascript", 140), ("cpp", 100)])
def test_right_programs_are_not_taken_for_forgers(name, at_least, pool):
    """HumanEval-X solutions under MultiPL-E's tests, which judge them by type as well: not all pass, but none may be called forged."""
    installed(name)
    known = list(known_programs.carried_over(name))
    chosen = known if FULL else known[:: len(known) // 5]
    judge = test_judge(pool, name, "chat")
    verdicts = judge.collect([judge.submit(row, text) for row, text in chosen], None)
    passed = sum(v.correct for v in verdicts)
    print(
        f"{name}: {passed} of {len(chosen)} HumanEval-X solutions pass MultiPL-E's tests, {sum(v.status == 'forged' for v in verdicts)} taken for forged"
    )
    assert not [v.problem for v in verdicts if v.status == "forged"] and passed >= (
        at_least if FULL else 3
    )


# ---- benchmark rows and prompts ----


@needs_data
def test_rows_and_prompts():
    rows = load_benchmark("humaneval", "racket")
    assert (
        len(rows) == 161
        and len(load_benchmark("mbpp", "lua")) == 397
        and len(load_benchmark("humaneval", "racket", version="v0.4")) == 161
    )
    assert (
        load_benchmark("mbpp", "lua", count=20, seed=1)
        == load_benchmark("mbpp", "lua", count=20, seed=1)
        != load_benchmark("mbpp", "lua", count=20, seed=2)
    )
    row = next(r for r in rows if "HumanEval_53_add" in r.id)
    text = program(row, "\n  (+ x y))\n(define (g) 1)", "racket", "completion")
    assert text == row.prompt.rstrip() + "\n  (+ x y))\n" + row.tests
    listing = benchmark_prompt(row, "racket", "think")
    assert listing.startswith(
        "# Task: You will be given a question (problem specification) and will generate a correct Racket program"
    )
    assert (
        "; YOUR CODE HERE\n```" in listing
        and listing.endswith("Assistant: <think>")
        and row.prompt.strip() in listing
    )
    assert [m["role"] for m in benchmark_prompt(row, "racket", "chat")] == ["user"]
    answer = "<think>(f)\n```racket\nwrong\n```</think><answer>```racket\n(define (add x y)\n  (+ x y))\n```</answer>"
    assert answer_block(answer, load_language("racket")) == "(define (add x y)\n  (+ x y))"
    assert program(row, answer, "racket", "think").startswith(
        "#lang racket\n(define (add x y)\n  (+ x y))\n(require rackunit)"
    )
    for source in ("python", "cpp"):
        translated = load_benchmark("translate", "lua", source=source)
        assert (
            len(translated) == 161
            and translated[0].source
            and translated[0].id.startswith(f"translate/{source}-lua/")
        )
        assert translated[0].source.splitlines()[0] in benchmark_prompt(
            translated[0], "lua", "completion"
        )
    for call, words in [
        (lambda: load_benchmark("humaneval", "prolog"), "MultiPL-E does not have the language"),
        (lambda: load_benchmark("humanevil", "lua"), "unknown benchmark"),
        (lambda: load_benchmark("translate", "lua", source="cobol"), "no translation sources"),
        (lambda: load_benchmark("crosspleval", "lua"), "give its folder by --data"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_crosspleval_form(tmp_path):
    (tmp_path / "crosspleval").mkdir()
    row = {
        "id": "T1",
        "source": "def f(): ...",
        "prompt": "local function f()\n",
        "tests": "f()",
        "stop_tokens": ["\nlocal"],
    }
    (tmp_path / "crosspleval/python-lua.jsonl").write_text(json.dumps(row))
    (found,) = load_benchmark("crosspleval", "lua", data=tmp_path)
    assert (
        found.id == "crosspleval/python-lua/T1"
        and program(found, "\nend\nlocal x", "lua", "completion") == "local function f()\nend\nf()"
    )


# ---- evaluate() and the command, with a real model ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model that has learnt four test problems by heart, so that some programs are right."""
    folder = tmp_path_factory.mktemp("tiny")
    language, prompt = (
        load_language("prolog"),
        lambda p: program_messages(p, "prolog", 0, system=False),
    )
    problems = load_problems("sums", "test", count=4)
    sft.make_tiny(load_problems("sums", "train", count=300), language, prompt, folder, seed=0)
    tokenizer, model = ChatTokenizer(folder), hugging_face.load_model(folder)
    settings = sft.WarmStart(steps=60, batch=4, lr=3e-3, warmup=5)
    sft.train_supervised(
        model,
        sft.make_optimizer(model),
        sft.encode(problems, language, tokenizer, prompt, 0.0, 0),
        settings,
        torch.device("cpu"),
        lambda *_: None,
    )
    hugging_face.save_model(
        dict(model.named_parameters()), model.config, folder, dtype=torch.float32
    )
    return folder


def test_evaluate_in_the_loop(tiny, pool):
    tokenizer, sampler = ChatTokenizer(tiny), Sampler(hugging_face.load_model(tiny), slots=16)
    problems, seen = load_problems("sums", "test", count=6), []
    metrics, rows = evaluation.evaluate(
        sampler,
        tokenizer,
        Judge(pool, "prolog"),
        problems,
        prompt=lambda p: program_messages(p, "prolog", 0, system=False),
        n=2,
        temperature=0.3,
        max_new_tokens=120,
        seed=5,
        on_rows=seen.append,
    )
    assert [(r["id"], r["sample"]) for r in rows] == [(p.id, n) for p in problems for n in (0, 1)]
    assert (
        metrics["pass@1"] >= 0.5
        and metrics["pass@1"] == sum(r["correct"] for r in rows) / 12
        and sorted(len(s) for s in seen) == [2] * 6
    )
    right = next(r for r in rows if r["correct"])
    assert Fraction(right["answer"]) == Fraction(right["value"]) and right["text"] == solution(
        problems[int(right["id"][-1])], "prolog"
    )


def command(tiny, out):
    words = f"--model {tiny} --bench sums --short_prompt true --examples 0 --problems 10 --samples 2 --temperature 1 --max_new_tokens 100 --out {out}"
    return words.split()


def test_a_killed_evaluation_goes_on_where_it_was(tiny, tmp_path, capsys):
    evaluation.main(command(tiny, tmp_path / "whole"))
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"][0]
    whole = (tmp_path / "whole/prolog/samples.jsonl").read_text()
    assert len(whole.splitlines()) == 20 and figures["problems"] == 10 and 0 < figures["pass@1"] < 1
    # what a kill leaves: some problems and half a line
    folder = tmp_path / "whole/prolog"
    lines = (folder / "partial-0.jsonl").read_text().split("\n")[:-1]
    assert len(lines) == 10
    (folder / "partial-0.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])
    (folder / "samples.jsonl").unlink()
    evaluation.main(command(tiny, tmp_path / "whole"))
    assert (folder / "samples.jsonl").read_text() == whole
    # a real one, after the first problem
    process = subprocess.Popen(
        [sys.executable, "eval.py", *command(tiny, tmp_path / "cut"), "--slots", "2"],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial, deadline = tmp_path / "cut/prolog/partial-0.jsonl", time.monotonic() + 100
    while not (partial.exists() and "\n" in partial.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (
        not (tmp_path / "cut/prolog/samples.jsonl").exists()
        and 1 <= len(partial.read_text().splitlines()) < 10
    )
    evaluation.main(command(tiny, tmp_path / "cut"))
    assert (tmp_path / "cut/prolog/samples.jsonl").read_text() == whole
    with pytest.raises(SystemExit, match="other settings"):
        evaluation.main([*command(tiny, tmp_path / "whole"), "--seed", "1"])


def test_ranks_give_the_numbers_of_one_process(tiny, tmp_path):
    evaluation.main(command(tiny, tmp_path / "one"))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "eval.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command(tiny, tmp_path / "two")],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two/prolog/samples.jsonl").read_text() == (
        tmp_path / "one/prolog/samples.jsonl"
    ).read_text()
    assert (tmp_path / "two/prolog/results.json").read_text() == (
        tmp_path / "one/prolog/results.json"
    ).read_text()


def test_bad_input_has_one_clear_sentence(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "eval.py", "--model", str(tiny), "--lang", "cobol"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and re.fullmatch(
        r"eval.py: unknown language 'cobol': choose one of .+\n", done.stderr
    )
    for words, sentence in [
        (
            ["--model", str(tiny), "--bench", "humaneval", "--lang", "prolog"],
            "MultiPL-E does not have the language",
        ),
        (["--model", str(tmp_path), "--bench", "sums"], str(tmp_path)),
        (["--model", str(tiny), "--mode", "poetry"], "unknown mode 'poetry'"),
    ]:
        with pytest.raises((ValueError, SystemExit), match=re.escape(sentence)):
            evaluation.main(words)
