"""Rewards: parsing, numbers, components, and right and wrong programs judged by every interpreter that is installed."""

import concurrent.futures
import math
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

import rewards
from rewards import Judge, parse
from rollout import shaped
from sampler import Completion
from sandbox import Pool, Result
from sandbox.languages import language_names, load_language
from settings import Settings
from tasks.answers import parse_number, same_number
from tasks.problems import Problem, load_problems, worked_example
from tasks.render import completion, solution
from tasks.verdicts import shares

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RENDERED = [name for name in language_names() if load_language(name).render]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


def judge_all(judge, pairs, deadline=120):
    return judge.collect(
        [judge.submit(problem, text, n) for n, (problem, text) in enumerate(pairs)], deadline
    )


def problem_with(answer, question="How many?"):
    return Problem("p", "sums", question, Fraction(answer))


# ---- parsing and numbers ----


def test_parse_gates_the_form_but_finds_the_program_anyway():
    good = "<reasoning>\nr\n</reasoning>\n<code>\nc(1).\n</code>\n<query>\nc(X)\n</query>"
    assert parse(good, "prolog") == rewards.Parsed("r", "c(1).", "c(X)", True)
    assert parse(f"\n{good}\n", "prolog").format_ok
    broken = [
        good + " and that is it",
        "Sure! " + good,
        good.replace("<reasoning>\nr\n</reasoning>\n", ""),
        good.replace("\nr\n", "\n"),
        good + "\n" + good,
        good.replace("c(1).", ""),
        good.removesuffix("</query>"),
        good.replace("query>", "funcall>"),
        "<query>\nc(X)\n</query>" + good.split("<query>")[0],
    ]
    assert not any(parse(text, "prolog").format_ok for text in broken)
    assert parse(broken[1], "prolog").code == "c(1)."
    assert parse(good.replace("c(1).", "```prolog\nc(1).\n```"), "prolog").code == "c(1)."
    assert parse("", "prolog") == rewards.Parsed("", "", "", False)


def test_numbers_are_compared_as_numbers():
    same = {
        "1,200": 1200,
        "3r2": "3/2",
        "3/2": "3/2",
        "3//2": "3/2",
        "3 % 2": "3/2",
        "42.0": 42,
        "42.0d0": 42,
        "1e3": 1000,
        "2.5E+2": 250,
        "-7": -7,
        "+.5": "1/2",
        "5.": 5,
        "1,234,567.5": "1234567.5",
        "1.5L0": "3/2",
        " 12\t": 12,
    }
    for text, value in same.items():
        assert parse_number(text) == Fraction(value), text
    for text in (
        "",
        "x",
        "1,20",
        "12,3456",
        "1.2.3",
        "3r0",
        "1/0",
        "inf",
        "nan",
        "1e",
        "e5",
        "1e9999",
        ".",
        "-",
        "4 2",
        "0x1F",
        "9" * 401,
        "_12",
        "[1]",
    ):
        assert parse_number(text) is None, text
    assert same_number(Fraction("3.3333333"), Fraction(10, 3)) and same_number(
        Fraction("10.000000000000002"), Fraction(10)
    )
    assert not same_number(Fraction(10000001), Fraction(10000000)) and not same_number(
        Fraction("3.33"), Fraction(10, 3)
    )
    assert same_number(Fraction(0), Fraction(0)) and not same_number(Fraction("0.001"), Fraction(0))


# ---- real interpreters ----


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_right_programs_score_full_and_wrong_ones_nothing(name, pool):
    language = load_language(name)
    if language.missing():
        pytest.skip(language.missing())
    judge = Judge(pool, language)
    problems = [worked_example(n) for n in (0, 1, 4)] + load_problems("sums", "test", count=3)
    right = [(p, solution(p, language)) for p in problems]
    wrong = [(Problem(p.id, p.task, p.question, p.answer + 1), text) for p, text in right[:2]]
    verdicts = judge_all(judge, right + wrong)
    assert [(v.reward, v.correct, v.status) for v in verdicts] == [(1.0, True, "ok")] * 6 + [
        (0.0, False, "ok")
    ] * 2
    # a program that dies, and one that is no program
    broken = right[0][1].replace("<code>\n", "<code>\n)( ] ", 1)
    assert [v.reward for v in judge_all(judge, [(problems[0], broken), (problems[0], "42")])] == [
        0.0,
        0.0,
    ]


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", ["prolog", "lisp"])
def test_rendered_gsm8k_steps_are_right(name, pool):
    """A sample; RARECODE_FULL=1 takes all 6,991 (BENCHMARKS.md)."""
    problems = load_problems(
        "gsm8k_steps", "train", count=None if os.environ.get("RARECODE_FULL") else 200, seed=11
    )
    verdicts = judge_all(
        Judge(pool, name), [(p, solution(p, name)) for p in problems], deadline=None
    )
    print(
        f"{name}: {sum(v.reward == 1.0 for v in verdicts)} of {len(verdicts)} rendered programs are right"
    )
    assert [v.problem for v in verdicts if v.reward != 1.0] == []


def test_what_a_prolog_query_means(pool):
    code = "age(tom, 7).\nage(ann, 9).\ntotal(X) :- findall(A, age(_, A), L), sum_list(L, X)."
    cases = {
        "total(X)": "16",
        "?- total(X).": "16",
        "age(Who, Years)": "7",  # first solution, last named variable
        "age(Who, _)": "tom",
        "total(_X), Y is _X * 2": "32",
        "X = 16, _Y = 2": "16",
        "total(X) % a comment": "16",
        "total(X). age(tom, Y).": "16",
        "X is 3 rdiv 2": "3r2",
        "age(tom, 7)": None,  # no variable: an unbound value is no number
        "total(1)": None,
        "total(X": None,
        "nothing(X)": None,
        "total(X), halt": None,
        "fail": None,
    }
    verdicts = judge_all(
        Judge(pool, "prolog"),
        [(problem_with(16), completion("r", code, query, "prolog")) for query in cases],
    )
    for (query, expected), verdict in zip(cases.items(), verdicts):
        number = verdict.value is not None and parse_number(verdict.value)
        assert verdict.value == expected if expected else not number and not verdict.correct, (
            query,
            verdict,
        )


def test_programs_cannot_take_the_harness_by_surprise(pool):
    """Output, names, files and libraries of the program's own; the value is still the query's."""
    prolog = {
        "main :- write(99).\nsolve(X) :- X is 40 + 2.": "solve(X)",
        ":- initialization(main).\nmain :- writeln(99).\nsolve(42).": "solve(X)",
        ":- initialization(main).\nsolve(42).": "solve(X)",
        "last_named(_, _, 7).\nsolve(42).": "solve(X)",
        ":- use_module(library(clpfd)).\nsolve(X) :- X #= 21 * 2.": "solve(X)",
        ":- dynamic seen/1.\nsolve(X) :- assertz(seen(42)), seen(X).": "solve(X)",
        ":- op(700, xfx, plus_then).\nA plus_then B :- B is A + 2.": "40 plus_then X",
        "solve(X) :- read_term(user_input, T, []), (T == end_of_file -> X = 42 ; X = 0).": "solve(X)",
        "solve(42).\nbroken(": "solve(X)",
    }
    lisp = {
        '(princ 99) (defun solve () (format t "noise") 42)': "(solve)",
        "(defpackage :mine (:use :cl)) (in-package :mine) (defun cl-user::solve () 42)": "(solve)",
        "(defun main () 42)": "(main) ; a comment",
        "(defvar value 41)": "(setf value 5) 42",
        "(defun solve () (* 0.1 420))": "(solve)",
        '(defmacro twice (x) `(* 2 ,x)) (defun query () "#.(quit)")': "(twice 21)",
    }
    for name, programs in (("prolog", prolog), ("lisp", lisp)):
        verdicts = judge_all(
            Judge(pool, name),
            [
                (problem_with(42), completion("r", code, query, name))
                for code, query in programs.items()
            ],
        )
        assert [(v.program, v.value) for v in verdicts if not v.correct] == []


def test_forged_and_early_endings_score_nothing(pool):
    """Nothing that stands in the sandbox names the answer, so a forger can only print what it could as well compute."""
    code = [
        "solve(X) :- X = 1, halt(0).",
        ":- halt.",
        ":- initialization(halt).\nsolve(42).",
        "solve(_) :- repeat, fail.",
        "solve(X) :- open('query.txt', read, S), read(S, X).",
        "solve(X) :- directory_files('.', X), print(X).",
    ]
    judge = Judge(pool, "prolog")
    texts = [completion("r", c, "solve(X)", "prolog") for c in code]
    submissions = [judge.submit(problem_with(42), text) for text in texts]
    verdicts = judge.collect(submissions, 60)
    assert [v.reward for v in verdicts] == [0.0] * len(code)
    assert verdicts[3].status in ("cpu_limit", "wall_limit")
    for submission in submissions:
        files = rewards.answer_files(
            judge.language, submission.parsed.code, submission.parsed.query, submission.nonce
        )
        assert "42" not in files["query.txt"] and "42" not in files[judge.language.file].replace(
            submission.nonce, ""
        )
    # A value printed under a guessed nonce does not count, and neither does one of a program that then fails.
    assert rewards.printed_value(b"0123 42\n", "4567") is None
    assert rewards.printed_value(b"x\n0123 41\nnoise 0123 40\n0123 42 \nmore", "0123") == "42"


def test_infrastructure_errors_are_masked_never_zero(pool):
    good = completion("r", "solve(42).", "solve(X)", "prolog")

    class Failing:
        def submit(self, job):
            future = concurrent.futures.Future()
            if "stuck" not in job.files["solution.pl"]:
                future.set_result(
                    Result(
                        "sandbox_error",
                        b"",
                        b"no disk",
                        None,
                        None,
                        0.0,
                        0.0,
                        0,
                        "kernel",
                        False,
                        job.id,
                    )
                )
            return future

    judge = Judge(Failing(), "prolog")
    stuck = completion("r", "stuck.", "X = 1", "prolog")
    verdicts = judge_all(
        judge,
        [(problem_with(42), good), (problem_with(42), stuck), (problem_with(42), "no form")],
        deadline=0.2,
    )
    assert [math.isnan(v.reward) for v in verdicts] == [True, True, False] and verdicts[
        2
    ].reward == 0.0
    assert [v.status for v in verdicts] == ["sandbox_error", "sandbox_error", "no_program"]


# ---- components, control, log ----


def test_components_by_hand(pool):
    right = completion("one two three four", "solve(X) :- X is 6 * 7.", "solve(X)", "prolog")
    weights = dict(
        correct=2,
        wrong=-1,
        tags=0.75,
        soft_format=0.5,
        strict_format=0.5,
        query_leak=-0.5,
        reasoning_words=0.1,
        code_words=0.1,
    )
    judge = Judge(pool, "prolog", weights, gate=False)
    texts = [
        right,
        right + "\nthat is all",
        right.replace("6 * 7", "6 + 7"),
        right.replace("X is 6", "?- X is 6"),
        "The answer is 42.",
    ]
    verdicts = judge_all(judge, [(problem_with(42), text) for text in texts])
    words = 0.1 * 4 / 1000 + 0.1 * 7 / 1000
    assert verdicts[0].reward == pytest.approx(2 + 0.75 + 0.5 + 0.5 + words)
    assert verdicts[1].reward == pytest.approx(2 + 0.75 + 0.5 + words)  # not strict
    assert verdicts[2].reward == pytest.approx(-1 + 0.75 + 0.5 + 0.5 + words)
    assert (
        verdicts[3].components["query_leak"] == 1.0 and verdicts[0].components["query_leak"] == 0.0
    )
    assert verdicts[4].reward == -1.0
    assert Judge(pool, "prolog").submit(problem_with(42), texts[1]).parsed.format_ok is False
    assert (
        judge_all(Judge(pool, "prolog"), [(problem_with(42), texts[1])])[0].reward == 0.0
    )  # the gate
    with pytest.raises(ValueError, match="unknown reward component 'nice'"):
        Judge(pool, "prolog", {"nice": 1.0})


def test_random_reward_depends_on_seed_problem_and_sample_alone(pool):
    def draw(seed, text="nothing"):
        judge = Judge(pool, "prolog", random_reward=True, seed=seed)
        problems = [Problem(f"p{n}", "sums", "?", Fraction(1)) for n in range(50)]
        return [
            v.reward
            for v in judge.collect(
                [judge.submit(p, text, sample) for p in problems for sample in range(4)]
            )
        ]

    first = draw(0)
    assert first == draw(0, "something else") != draw(1)
    assert set(first) == {0.0, 1.0} and 70 < sum(first) < 130


def test_hacking_shows_in_the_shares(pool):
    problem = problem_with(42, "There are 6 boxes of 7 pens. How many pens?")
    texts = [
        completion("r", "solve(X) :- X is 6 * 7.", "solve(X)", "prolog"),
        completion("r", "solve(X) :- X is 6 * 7.", "solve(X)", "prolog"),
        completion("6*7=42", "solve(42). % 6 * 7", "solve(X)", "prolog"),
        completion("6*7=42", "solve(X) :- X is 6 * 7.", "X = 42", "prolog"),
        completion(
            "r",
            "boxes(6).\npens(7).\nsolve(X) :- boxes(B), pens(P), X is B*P.",
            "solve(X)",
            "prolog",
        ),
        "no program",
    ]
    verdicts = judge_all(Judge(pool, "prolog"), [(problem, text) for text in texts])
    assert [v.constant for v in verdicts] == [False, False, True, False, False, False]
    assert [v.leaked for v in verdicts] == [False, False, False, True, False, False]
    found = shares(verdicts)
    assert found["completions/duplicate_frac"] == pytest.approx(1 / 6) and found[
        "completions/constant_frac"
    ] == pytest.approx(1 / 6)
    assert (
        found["completions/format_frac"]
        == found["completions/code_found_frac"]
        == found["sandbox/ok_frac"]
        == pytest.approx(5 / 6)
    )
    constants = {
        "lisp": "(defun solve () 42)",
        "lua": "function solve() return 42 end",
        "ocaml": "let solve () = 42",
    }
    for name in set(constants) & set(RENDERED):
        language = load_language(name)
        sums = [solution(p, name) for p in load_problems("sums", "train", count=50)]
        facts = [
            rewards.Facts(t, parse(t, name), language, True, problem, 0.0)
            for t in [*sums, completion("r", constants[name], "solve()", name)]
        ]
        assert [rewards.is_constant(f) for f in facts] == [False] * 50 + [True], name


@pytest.mark.parametrize(
    "language", [name for name in ("prolog", "lisp", "julia") if not load_language(name).missing()]
)
def test_syntax_is_judged_apart_and_mixed_in_by_the_share_of_programs_that_lack_it(pool, language):
    """SLMFix: two of three programs parse, so the weight of syntax is 1/3."""
    problem = next(p for p in load_problems("sums", "train", count=5) if len(p.steps) > 1)
    right = solution(problem, language)
    cut = right.replace("\n</code>", " (((\n</code>")
    judge = Judge(pool, language, {"correct": 1.0, "syntax": 0.0})
    verdicts = judge_all(
        judge, [(problem, text) for text in (right, right.replace(")", ") ", 1), cut)]
    )
    assert [v.components["syntax"] for v in verdicts] == [
        1,
        1,
        0,
    ]  # Prolog runs a file with one broken clause all the same
    assert verdicts[0].correct and verdicts[1].correct
    completions = [Completion(0, i, [1], [0.0], "stop") for i in range(3)]
    rewarded = [replace(v, reward=r) for v, r in zip(verdicts, (0.0, 1.0, 0.0))]
    assert [
        v.reward for v in shaped(rewarded, completions, Settings(syntax_mix=True))
    ] == pytest.approx([1 / 3, 1.0, 0.0])
    assert [v.reward for v in shaped(rewarded, completions, Settings())] == [0.0, 1.0, 0.0]
