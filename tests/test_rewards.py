"""From a completion to its reward: parts, harness, verdicts, components, and what the log shows."""

import concurrent.futures
import math
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

import rewards
from build import make_judge
from rewards import Judge, answer_files, parse
from rollout import shaped
from sampler import Completion
from sandbox import Pool, Result
from sandbox.languages import language_names, load_language
from settings import Settings, read_recipe
from tasks.answers import printed_number
from tasks.problems import Problem, load_problems, worked_example
from tasks.render import completion, solution
from tasks.verdicts import shares

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RENDERED = [name for name in language_names() if load_language(name).render]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


def installed(name):
    language = load_language(name)
    if sentence := language.missing():
        pytest.skip(sentence)
    return language


def judge_all(judge, pairs, deadline=120):
    """Verdicts of (problem, completion) pairs; a pair's place is its sample number."""
    submissions = []
    for sample, (problem, text) in enumerate(pairs):
        submissions.append(judge.submit(problem, text, sample))
    return judge.collect(submissions, deadline)


def judge_programs(pool, language, programs, answer=42):
    """Verdicts of (code, query) pairs that should give the answer."""
    problem = problem_with(answer)
    texts = [completion("r", code, query, language) for code, query in programs]
    return judge_all(Judge(pool, language), [(problem, text) for text in texts])


def problem_with(answer, question="How many?"):
    return Problem("p", "sums", question, Fraction(answer))


# ---- a completion's parts ----

GOOD = "<reasoning>\nr\n</reasoning>\n<code>\nc(1).\n</code>\n<query>\nc(X)\n</query>"


def test_the_parts_of_a_completion():
    assert parse(GOOD, "prolog") == rewards.Parsed("r", "c(1).", "c(X)", True)
    assert parse(f"\n{GOOD}\n", "prolog").format_ok
    assert parse("", "prolog") == rewards.Parsed("", "", "", False)


@pytest.mark.parametrize(
    "text",
    [
        GOOD + " and that is it",
        "Sure! " + GOOD,
        GOOD.replace("<reasoning>\nr\n</reasoning>\n", ""),
        GOOD.replace("\nr\n", "\n"),
        GOOD + "\n" + GOOD,
        GOOD.replace("c(1).", ""),
        GOOD.removesuffix("</query>"),
        GOOD.replace("query>", "funcall>"),
        "<query>\nc(X)\n</query>" + GOOD.split("<query>")[0],
    ],
)
def test_the_form_is_exact(text):
    assert not parse(text, "prolog").format_ok


def test_a_program_is_found_in_a_wrong_form():
    assert parse("Sure! " + GOOD, "prolog").code == "c(1)."


@pytest.mark.parametrize(
    "fenced",
    [
        "```prolog\nc(1).\n```",
        "```prolog \nc(1).\n```",
        "```prolog\r\nc(1).\r\n```",
        "```pl title=ages\nc(1).\n```\n",
        "\n  ```\n  c(1).\n  ```",
        "~~~prolog\nc(1).\n~~~",
        "```prolog\nc(1).\n```\nIt prints:\n```\n1\n```",
        "```prolog\nc(1).",
    ],
)
def test_a_fence_is_no_part_of_the_program(fenced):
    parsed = parse(GOOD.replace("c(1).", fenced), "prolog")
    assert parsed.code == "c(1)."
    assert parsed.format_ok


def test_line_ends_are_no_part_of_the_program():
    """A Bash script with carriage returns fails, and strict_format asks for a line end."""
    text = GOOD.replace("c(1).", "c(1).\nc(2).").replace("\n", "\r\n")
    parsed = parse(text, "prolog")
    assert parsed == rewards.Parsed("r", "c(1).\nc(2).", "c(X)", True)
    facts = rewards.Facts(text, parsed, load_language("prolog"), True, problem_with(42))
    assert rewards.strict_format(facts) == 1.0


def test_fences_within_a_program_stay():
    docstring = '"""\n```jldoctest\njulia> f()\n```\n"""\nf() = 42'
    text = completion("r", docstring, "f()", "julia")
    assert parse(text, "julia").code == docstring


# ---- the program that runs ----


def test_a_slots_name_in_the_program_stays_as_it_is():
    files = answer_files(load_language("lua"), "x = '{query} {nonce}'", "solve()", "abc")
    assert "x = '{query} {nonce}'" in files["main.lua"]


def test_a_main_of_the_programs_own_is_renamed_and_its_lookalikes_are_not():
    code = "int remain(int n) { return n; }\nint main (void) { return 0; }"
    text = answer_files(load_language("c"), code, "remain(42)", "abc")["main.c"]
    assert "int remain(int n)" in text
    assert "int program_main (void)" in text
    assert text.count("int main(void)") == 1  # the harness's


# ---- real interpreters ----


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_right_programs_score_full_and_wrong_ones_nothing(name, pool):
    judge = Judge(pool, installed(name))
    problems = [worked_example(number) for number in (0, 1, 4)]
    problems += load_problems("sums", "test", count=3)
    pairs = [(problem, solution(problem, name)) for problem in problems]
    # The same programs for problems whose answer is 1 more, one that dies, and none.
    pairs += [(replace(problem, answer=problem.answer + 1), text) for problem, text in pairs[:2]]
    problem, text = pairs[0]
    pairs += [(problem, text.replace("<code>\n", "<code>\n)( ] ", 1)), (problem, "42")]

    verdicts = judge_all(judge, pairs)
    assert [verdict.reward for verdict in verdicts] == [1.0] * 6 + [0.0] * 4
    assert [verdict.correct for verdict in verdicts] == [True] * 6 + [False] * 4
    assert [verdict.status for verdict in verdicts[:8]] == ["ok"] * 8
    assert verdicts[9].status == "no_program"


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", ["prolog", "lisp"])
def test_rendered_gsm8k_steps_are_right(name, pool):
    """A sample; RARECODE_FULL=1 takes all 6,991 (BENCHMARKS.md)."""
    count = None if os.environ.get("RARECODE_FULL") else 200
    problems = load_problems("gsm8k_steps", "train", count=count, seed=11)
    pairs = [(problem, solution(problem, name)) for problem in problems]
    verdicts = judge_all(Judge(pool, name), pairs, deadline=None)
    wrong = [verdict.problem for verdict in verdicts if verdict.reward != 1.0]
    print(f"{name}: {len(verdicts) - len(wrong)} of {len(verdicts)} rendered programs are right")
    assert wrong == []


FAMILY = "age(tom, 7).\nage(ann, 9).\ntotal(X) :- findall(A, age(_, A), L), sum_list(L, X)."


@pytest.mark.parametrize(
    "query, value",
    [
        ("total(X)", "16"),
        ("?- total(X).", "16"),
        ("age(Who, Years)", "7"),  # first solution, last named variable
        ("age(Who, _)", "tom"),
        ("total(_X), Y is _X * 2", "32"),
        ("X = 16, _Y = 2", "16"),
        ("total(X) % a comment", "16"),
        ("total(X). age(tom, Y).", "16"),
        ("X is 3 rdiv 2", "3r2"),
    ],
)
def test_the_value_of_a_prolog_query(pool, query, value):
    (verdict,) = judge_programs(pool, "prolog", [(FAMILY, query)])
    assert verdict.value == value


@pytest.mark.parametrize(
    "query",
    [
        "age(tom, 7)",  # no variable: an unbound value is no number
        "total(1)",
        "total(X",
        "nothing(X)",
        "total(X), halt",
        "fail",
    ],
)
def test_a_prolog_query_without_a_value_is_wrong(pool, query):
    (verdict,) = judge_programs(pool, "prolog", [(FAMILY, query)], answer=16)
    assert not verdict.correct
    assert verdict.value is None or printed_number(verdict.value, load_language("prolog")) is None


# Output, names, files and libraries of the program's own; the value is still the query's.
SURPRISES = {
    "prolog": {
        "main :- write(99).\nsolve(X) :- X is 40 + 2.": "solve(X)",
        ":- initialization(main).\nmain :- writeln(99).\nsolve(42).": "solve(X)",
        ":- initialization(main).\nsolve(42).": "solve(X)",
        "last_named(_, _, 7).\nsolve(42).": "solve(X)",
        ":- use_module(library(clpfd)).\nsolve(X) :- X #= 21 * 2.": "solve(X)",
        ":- dynamic seen/1.\nsolve(X) :- assertz(seen(42)), seen(X).": "solve(X)",
        ":- op(700, xfx, plus_then).\nA plus_then B :- B is A + 2.": "40 plus_then X",
        "solve(X) :- read_term(user_input, T, []), (T == end_of_file -> X = 42).": "solve(X)",
        "solve(42).\nbroken(": "solve(X)",
    },
    "lisp": {
        '(princ 99) (defun solve () (format t "noise") 42)': "(solve)",
        "(defpackage :mine (:use :cl)) (in-package :mine) (defun cl-user::solve () 42)": "(solve)",
        "(defun main () 42)": "(main) ; a comment",
        "(defvar value 41)": "(setf value 5) 42",
        "(defun solve () (* 0.1 420))": "(solve)",
        '(defmacro twice (x) `(* 2 ,x)) (defun query () "#.(quit)")': "(twice 21)",
    },
    "lua": {
        "math, string = 90, 'text'\nfunction solve() return math - 48 end": "solve()",
        "function solve() return 42, 'dollars' end": "solve() -- a comment",
        "value = 42": "value",
    },
    "ocaml": {
        "let value = 42 and error = 8": "value",
        "let rec solve = function 0 -> 42 | n -> solve (n - 1)": "solve 3 (* a comment *)",
    },
    "r": {"value <- 42": "value", "y <- 2": "x <- 21; x * y"},
    "javascript": {"const value = 42": "value // a comment"},
    "perl": {"our $value = 42;": "$value # a comment"},
    "scheme": {"(define value 42)": "value ; a comment"},
    "c": {"int value = 42;": "value // a comment", "int n;": "n = 21, 2 * n"},
    "cpp": {"int value = 42;": "value // a comment", "int n;": "(n = 21, 2 * n)"},
    "java": {"class S { static int value = 42; }": "S.value // a comment"},
}


@pytest.mark.parametrize("name", SURPRISES)
def test_programs_cannot_take_the_harness_by_surprise(name, pool):
    installed(name)
    verdicts = judge_programs(pool, name, SURPRISES[name].items())
    assert [(verdict.program, verdict.value) for verdict in verdicts if not verdict.correct] == []


# ---- forgery ----

FORGERS = [
    "solve(X) :- X = 1, halt(0).",
    ":- halt.",
    ":- initialization(halt).\nsolve(42).",
    "solve(_) :- repeat, fail.",
    "solve(X) :- open('query.txt', read, S), read(S, X).",
    "solve(X) :- directory_files('.', X), print(X).",
]


def test_forged_and_early_endings_score_nothing(pool):
    verdicts = judge_programs(pool, "prolog", [(code, "solve(X)") for code in FORGERS])
    assert [verdict.reward for verdict in verdicts] == [0.0] * len(FORGERS)
    assert [verdict.status for verdict in verdicts[:3]] == ["no_value"] * 3
    assert verdicts[3].status in ("cpu_limit", "wall_limit")


@pytest.mark.parametrize("code", FORGERS[3:])
def test_nothing_in_the_sandbox_names_the_answer(code):
    """A forger can only print what it could as well compute."""
    prolog = load_language("prolog")
    nonce = "abcdefabcdef"  # has no 42 in it
    for text in answer_files(prolog, code, "solve(X)", nonce).values():
        assert "42" not in text


def test_a_value_stands_behind_its_nonce():
    assert rewards.printed_value(b"0123 42\n", "4567") is None  # a guessed one
    printed = b"x\n0123 41\nnoise 0123 40\n0123 42 \nmore"
    assert rewards.printed_value(printed, "0123") == "42"


# ---- what the sandbox could not judge ----


class FailingPool:
    """Every program ends in a sandbox error, and one that says "stuck" never ends."""

    def submit(self, job):
        future = concurrent.futures.Future()
        if "stuck" not in job.files["solution.pl"]:
            error = ("sandbox_error", b"", b"no disk", None, None, 0.0, 0.0, 0, "kernel", False)
            future.set_result(Result(*error, job.id))
        return future


def test_sandbox_errors_are_masked_never_zero():
    texts = [
        completion("r", "solve(42).", "solve(X)", "prolog"),
        completion("r", "stuck.", "X = 1", "prolog"),
        "no form",
    ]
    judge = Judge(FailingPool(), "prolog")
    verdicts = judge_all(judge, [(problem_with(42), text) for text in texts], deadline=0.2)
    assert [verdict.judged for verdict in verdicts] == [False, False, True]
    assert math.isnan(verdicts[0].components["correct"])
    assert verdicts[2].reward == 0.0
    statuses = [verdict.status for verdict in verdicts]
    assert statuses == ["sandbox_error", "sandbox_error", "no_program"]


# ---- components, control ----

RIGHT = completion("one two three four", "solve(X) :- X is 6 * 7.", "solve(X)", "prolog")
WEIGHTS = {
    "correct": 2,
    "wrong": -1,
    "tags": 0.75,
    "soft_format": 0.5,
    "strict_format": 0.5,
    "query_leak": -0.5,
    "reasoning_words": 0.1,
    "code_words": 0.1,
}
WORDS = 0.1 * 4 / 1000 + 0.1 * 7 / 1000  # 4 words of reasoning, 7 of code


@pytest.mark.parametrize(
    "text, reward",
    [
        (RIGHT, 2 + 0.75 + 0.5 + 0.5 + WORDS),
        (RIGHT + "\nthat is all", 2 + 0.75 + 0.5 + WORDS),  # not strict
        (RIGHT.replace("6 * 7", "6 + 7"), -1 + 0.75 + 0.5 + 0.5 + WORDS),
        ("The answer is 42.", -1),
    ],
)
def test_components_add_up_by_their_weights(pool, text, reward):
    judge = Judge(pool, "prolog", WEIGHTS, gate=False)
    (verdict,) = judge_all(judge, [(problem_with(42), text)])
    assert verdict.reward == pytest.approx(reward)


def test_a_query_in_the_code_is_a_leak(pool):
    judge = Judge(pool, "prolog", WEIGHTS, gate=False)
    texts = [RIGHT, RIGHT.replace("X is 6", "?- X is 6")]
    honest, leaky = judge_all(judge, [(problem_with(42), text) for text in texts])
    assert honest.components["query_leak"] == 0.0
    assert leaky.components["query_leak"] == 1.0


def test_the_gate_asks_for_the_form(pool):
    (verdict,) = judge_all(Judge(pool, "prolog"), [(problem_with(42), RIGHT + "\nthat is all")])
    assert verdict.correct
    assert not verdict.parsed.format_ok
    assert verdict.reward == 0.0


def test_an_unknown_component_is_one_sentence(pool):
    with pytest.raises(ValueError, match="unknown reward component 'nice'"):
        Judge(pool, "prolog", {"nice": 1.0})


def test_random_reward_depends_on_seed_problem_and_sample_alone(pool):
    def coins(seed, text="nothing"):
        judge = Judge(pool, "prolog", random_reward=True, seed=seed)
        submissions = []
        for number in range(50):
            problem = replace(problem_with(1), id=f"p{number}")
            submissions += [judge.submit(problem, text, sample) for sample in range(4)]
        return [verdict.reward for verdict in judge.collect(submissions)]

    drawn = coins(0)
    assert drawn == coins(0, "something else")
    assert drawn != coins(1)
    assert set(drawn) == {0.0, 1.0}
    assert 70 < sum(drawn) < 130  # 200 fair coins: 100, standard deviation 7


# ---- what the log shows ----

PENS = problem_with(42, "There are 6 boxes of 7 pens. How many pens?")
HONEST = completion("r", "solve(X) :- X is 6 * 7.", "solve(X)", "prolog")
FACTS = "boxes(6).\npens(7).\nsolve(X) :- boxes(B), pens(P), X is B*P."
LOGGED = [
    HONEST,
    HONEST,
    completion("6*7=42", "solve(42). % 6 * 7", "solve(X)", "prolog"),  # constant
    completion("6*7=42", "solve(X) :- X is 6 * 7.", "X = 42", "prolog"),  # leaked
    completion("r", FACTS, "solve(X)", "prolog"),
    completion("r", ":- halt.", "solve(X)", "prolog"),  # ends before its query
    completion("r", "solve(X) :- X is 6 + 7.", "solve(X)", "prolog"),  # wrong
    "no program",
]


@pytest.fixture(scope="module")
def logged(pool):
    return judge_all(Judge(pool, "prolog"), [(PENS, text) for text in LOGGED])


def test_programs_that_compute_nothing_are_seen(logged):
    assert [verdict.constant for verdict in logged[:5]] == [False, False, True, False, False]
    assert [verdict.leaked for verdict in logged[:5]] == [False, False, False, True, False]


def test_shares_of_eight_completions(logged):
    found = shares(logged)
    assert found["completions/format_frac"] == 7 / 8
    assert found["completions/code_found_frac"] == 7 / 8
    assert found["completions/duplicate_frac"] == 1 / 8
    assert found["completions/leaked_frac"] == 1 / 8
    assert found["sandbox/ok_frac"] == 6 / 8
    assert found["sandbox/wrong_frac"] == 1 / 8
    # Not a wrong number: a program that prints none.
    assert found["sandbox/no_value_frac"] == 1 / 8
    assert found["sandbox/no_program_frac"] == 1 / 8


CONSTANTS = {
    "lisp": "(defun solve () 42)",
    "lua": "function solve() return 42 end",
    "ocaml": "let solve () = 42",
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_told_from_a_sum(name):
    texts = [solution(problem, name) for problem in load_problems("sums", "train", count=50)]
    texts.append(completion("r", CONSTANTS[name], "solve()", name))
    language = load_language(name)
    found = []
    for text in texts:
        facts = rewards.Facts(text, parse(text, name), language, True, PENS)
        found.append(rewards.is_constant(facts))
    assert found == [False] * 50 + [True]


# ---- syntax, mixed in ----


@pytest.mark.parametrize("name", ["prolog", "lisp", "julia"])
def test_syntax_is_judged_apart(pool, name):
    """Also where the program runs all the same: Prolog loads a file with one broken clause."""
    installed(name)
    problem = next(p for p in load_problems("sums", "train", count=5) if len(p.steps) > 1)
    right = solution(problem, name)
    texts = [right, right.replace(")", ") ", 1), right.replace("\n</code>", " (((\n</code>")]
    judge = Judge(pool, name, {"correct": 1.0, "syntax": 0.0})
    verdicts = judge_all(judge, [(problem, text) for text in texts])
    assert [verdict.components["syntax"] for verdict in verdicts] == [1, 1, 0]
    assert [verdict.correct for verdict in verdicts[:2]] == [True, True]


def test_syntax_is_mixed_in_by_the_share_of_programs_that_lack_it(logged):
    """SLMFix: two of three programs parse, so the weight of syntax is 1/3."""
    completions = [Completion(0, sample, [1], [0.0], "stop") for sample in range(3)]
    verdicts = []
    for verdict, syntax, reward in zip(logged, (1.0, 1.0, 0.0), (0.0, 1.0, 0.0)):
        components = {"correct": reward, "syntax": syntax}
        verdicts.append(replace(verdict, reward=reward, components=components))

    mixed = shaped(verdicts, completions, Settings(syntax_mix=True))
    assert [verdict.reward for verdict in mixed] == pytest.approx([1 / 3, 1.0, 0.0])
    plain = shaped(verdicts, completions, Settings())
    assert [verdict.reward for verdict in plain] == [0.0, 1.0, 0.0]


# ---- published sums ----

RIGHT = completion("r", "solve(X) :- X is 6 * 7.", "solve(X)", "prolog")
WRONG = completion("r", "solve(X) :- X is 6 * 8.", "solve(X)", "prolog")
LEAKS = completion("r", "solve(X) :- X is 6 * 7.\n?- solve(X).", "solve(X)", "prolog")
LONG = completion("so " * 100, "solve(X) :- X is 6 * 7.", "solve(X)", "prolog")


@pytest.mark.parametrize(
    "recipe,expected",
    [
        # right 2, wrong -1, six tags 0.75, form 0.5, leak -0.5
        ("gsm8k_published", [3.25, 0.25, 2.75, 3.25, -1.0]),
        # the same and 0.0001 a word: reasoning 1, 1, 1, 100; code 7, 7, 9, 7; 1 for 100 words
        ("gsm8k_published_notebook", [3.2508, 0.2508, 2.751, 4.2607, -1.0]),
    ],
)
def test_recipes_pay_the_published_sums(pool, recipe, expected):
    language = installed("prolog")
    settings = Settings(**read_recipe(ROOT / "recipes" / f"{recipe}.toml"))
    judge = make_judge(settings, pool, language)
    texts = [RIGHT, WRONG, LEAKS, LONG, "42"]
    found = judge_all(judge, [(problem_with(42), text) for text in texts])
    assert [verdict.reward for verdict in found] == pytest.approx(expected)
