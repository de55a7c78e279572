"""Self-play: values as data in every language, refusals, rewards, buffers, advantages, exact resume. Real interpreters, real sandbox."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import grpo
import sft
from sandbox import Pool, Result
from sandbox.languages import language_names, load_language
from sandbox.languages.calls import Runner, outcomes, wait
from sandbox.languages.literals import read_one
from sandbox.languages.values import Char, Compound, Map, Pair, Set, Symbol, same, write
from selfplay import loop as selfplay
from selfplay import triples
from selfplay.buffers import Buffers, add_seeds
from selfplay.judge import SolveJudge
from selfplay.parse import compose, parse_proposal
from selfplay.prompts import solve_prompt
from selfplay.proposals import PAIRS, REASONS, Entry, Puzzle, Refused, check
from settings import Settings, read_recipe

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = [name for name in language_names() if load_language(name).call]
here = [
    pytest.param(
        n,
        marks=pytest.mark.skipif(
            bool(load_language(n).missing()), reason=load_language(n).missing() or ""
        ),
    )
    for n in LANGUAGES
]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


@pytest.fixture(scope="module")
def lua(pool):
    return Runner(pool, load_language("lua"))


# ---- values ----

COMMON = [
    [[1, [2, []], -3], "a\"b\\c'd\n\te", -7, 123456, 1.5, -0.25, 1e300, 1e-07, "", "é日"],
    10**30,
]
VALUES = {
    "python": [*COMMON, Map((("k", [1, (2,)]), (3, None))), Set((1, 2)), Set(()), (True, ())],
    "lua": [COMMON[0], Map((("k", [1, 2]), (2.5, True))), 2**63 - 1, [-(2**63)], Map(((0, 1), (2, 3)))],
    "julia": [*COMMON, Map((("k", [1, 2.5]), ("l", "$x"))), Symbol("a_b"), Char("'"), None, Fraction(3, 4), Set((1, 2)), (1,), [True, 1], [[1], [2.5]]],
    "racket": [*COMMON, Map(((Symbol("k"), [1, 2]), ("s", 1.5))), Symbol("list->vector"), Char(" "), Char("("), Fraction(-3, 4), Pair(1, Pair(2, 3)), (1, "a"), [True, False]],
    "lisp": [[[1, [2, []], -3], "a\"b\\c'd\n e", -7, 1.5, 1e300, 1e-07], 10**30, Map((("k", [1, 2]), (Symbol("x"), Fraction(1, 3)))), Symbol("foo-bar"), Symbol(":key"), Char("a"), Pair(1, 2), (1, "a"), [True, []], [1, Map(((1, 2),))]],
    "prolog": [*COMMON, Symbol("it's"), Compound("foo", (Symbol("bar"), -1)), Compound("-", ("k", [1])), Compound("-", (-1, Compound("-", (1, 2)))), Symbol("true"), Fraction(1, 3)],
}  # fmt: skip


@pytest.mark.parametrize("name", here)
def test_values_come_back_from_the_language_as_they_went_in(pool, name):
    """Our literal is read by our parser, and printed by the language's own process, as the same value."""
    language = load_language(name)
    runner = Runner(pool, language)
    for value in VALUES[name]:
        assert same(read_one(write(value, language), language), value, language), write(
            value, language
        )
    started = runner.start(language.call["identity"], [[v] for v in VALUES[name]])
    wait([started])
    for value, (kind, text) in zip(VALUES[name], runner.finish(started)):
        assert kind == "value" and same(read_one(text, language), value, language), (
            value,
            kind,
            text,
        )


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("python", "[1, -2.5]", [1, -2.5]),
        ("python", "(1)", 1),
        ("python", "{'a': [1,],}", Map((("a", [1]),))),
        ("python", "'a\\x41'", "aA"),
        ("julia", 'Dict{String,Int64}("a" => 1)', Map((("a", 1),))),
        ("julia", "Int64[1, 2]", [1, 2]),
        ("julia", "[1, 2.5]", [1.0, 2.5]),
        ("julia", '"\\$5"', "$5"),
        ("racket", "'(1 . (2 3))", [1, 2, 3]),
        ("racket", "(list 'a (list 1))", [Symbol("a"), [1]]),
        ("racket", '(hash "a" 1)', Map((("a", 1),))),
        ("lisp", "'(A b NIL t)", [Symbol("a"), Symbol("b"), [], True]),
        ("lisp", "1.5d0", 1.5),
        ("lua", "{a = 1, ['b c'] = {2}}", Map((("a", 1), ("b c", [2])))),
        ("lua", "{[2] = 'y', [1] = 'x'}", ["x", "y"]),
        ("lua", "9223372036854775808", 2.0**63),
        ("prolog", "[a-1, 'B c', \"s\"]", [Compound("-", (Symbol("a"), 1)), Symbol("B c"), "s"]),
    ],
)
def test_literals_as_people_write_them(name, text, value):
    language = load_language(name)
    assert same(read_one(text, language), value, language)


def test_equality_is_the_languages_own():
    assert (
        same(1, 1.0, load_language("python"))
        and same(1, 1.0, load_language("lua"))
        and not same(1, 1.0, load_language("racket"))
    )
    assert not same(1, 1.0, load_language("prolog")) and not same(1, True, load_language("python"))
    assert same(Map(((1, 2), (3, 4))), Map(((3, 4), (1, 2))), load_language("python")) and not same(
        [1, 2], (1, 2), load_language("julia")
    )


# Answers that would close the call, force a truth or run something, were they pasted into a program.
ATTACKS = {
    "python": ["1) or True or f(1", "1)\nprint('x'", "__import__('os').getcwd()", "f(1)", "[x for x in [1]]", "lambda: 1", "1 if True else 2", "f'{1}'", "'a' 'b' or 1"],
    "lua": ["1) or true or f(1", "f(1)", "(function() return 1 end)()", "os.time()", "{f()}", "1 --", "[[x]]"],
    "julia": ["1) || true || f(1", '"$(run(`ls`))"', '"$x"', "[x for x in 1:2]", "f(1)", "`ls`", "1; exit()", "[1:3]", "begin 1 end"],
    "racket": ["1) (f 1", "(f 1)", "(list (f 1))", ",(f 1)", "`(1 ,(f 1))", "#.(f 1)", "1 ; x", "'(1 2", "#<procedure>", "(hash 'a)"],
    "lisp": ["1) (f 1", "(f 1)", "#.(f 1)", "`(1 ,(f 1))", "'#.(f 1)", "#'f", "sb-ext:*posix-argv*", "'(1 . 2 3)", "|a b|", "1 ; x"],
    "prolog": ["1), true ; f(1", "X", "[A|B]", "f(_)", "1, true ; true", "{a}", "a:-b", "\"a", "[1|2]"],
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_answer_that_is_a_program_is_refused(name):
    language = load_language(name)
    for text in ATTACKS[name]:
        with pytest.raises(ValueError):
            read_one(text, language)
    for text in [
        "[" * 200,
        "(" * 200,
        "'(" * 100,
        '"' + "a" * 3000 + '"',
        "1e999",
        "\x00",
        "",
        "{" * 200,
    ]:
        with pytest.raises(ValueError):
            read_one(text, language)


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_text_breaks_the_parser(name):
    """Random text of literals' parts: a value that can be written and read again, or a ValueError; never anything else, never slowly."""
    language, rng = load_language(name), random.Random(0)
    parts = (
        "1 -2 .5 1e400 'a' \"b\" \" ' ( ) [ ] { } , : = => - . # \\ $ a True true nil f( Dict( Set([ (list (cons :k #( #hash( 1/2 1//2 1r2 ; |".split()
        + [" "]
    )
    long = [
        "[[" * 900,
        "'(" * 900,
        "1" * 1999,
        "1-" * 900 + "1",
        "'(" + "1 " * 800 + ". 2)",
        "-" * 1999,
    ]
    started, accepted = time.perf_counter(), 0
    for text in long + ["".join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(10000)]:
        try:
            value = read_one(text, language)
        except ValueError:
            continue
        assert same(read_one(write(value, language), language), value, language), text
        accepted += 1
    assert accepted > 200 and time.perf_counter() - started < 20


def test_an_answer_cannot_force_true(pool):
    """The public implementation pastes answers into "f(ANSWER) == gold": "1) == 0 or (1" would pass there."""
    judge = SolveJudge(pool, load_language("python"))
    puzzle = Puzzle("p", "abduction", Entry("def f(a):\n    return a + 1", ("5",), ("6",)))
    answers = ["1) == 0 or (1", "5", "5.0", "4", "'x'"]
    verdicts = judge.collect(
        [judge.submit(puzzle, f"t</think><answer>```input\n{a}\n```</answer>") for a in answers], 60
    )
    assert [(v.correct, v.reward, v.status) for v in verdicts] == [
        (False, -0.5, "input_no_value"), (True, 1.0, "ok"), (True, 1.0, "ok"), (False, 0.0, "ok"), (False, -0.5, "error"),
    ]  # fmt: skip


# ---- banned constructs ----

BANNED = {
    "python": [
        "import random as r\ndef f(a):\n    return r.random()", "from time import time as t\ndef f(a):\n    return t()", "def f(a):\n    g = getattr\n    return g(a, 'x', 1)",
        "from statistics import random as r\ndef f(a):\n    return r.random()", "import statistics\ndef f(a):\n    return statistics.random.random()",
        "def f(a):\n    return ().__class__.__base__.__subclasses__()", "def f(a):\n    return __import__('ti' + 'me').time()", "e = exec\ndef f(a):\n    return e('b=1')",
        "def f(a):\n    return __builtins__['open']", "def f(a):\n    return open('main.py').read()", "import string\ndef f(a):\n    return string._re",
    ],
    "lua": [
        "function f(a) return math.random() end", "local m = math\nlocal r = m['ran'..'dom']\nfunction f(a) return r(10) end", "function f(a) return _G['o'..'s']['ti'..'me']() end",
        "local e = _ENV\nfunction f(a) return e.os.clock() end", "function f(a) pcall(function() io.open('x') end) return 1 end", "function f(a) return load('return 1')() end",
        "function f(a) return ('').dump(f) end", "local d = require\nfunction f(a) return d('os').time() end", "function f(a) return getmetatable('').__index.dump(f) end",
    ],
    "julia": [
        "r = rand\nf(a) = r(1:10)", "import Base: rand\nf(a) = rand()", "using Random\nf(a) = shuffle(a)", "const B = Base\nf(a) = B.time()", "f(a) = Base.time_ns()",
        "f(a) = getfield(parentmodule(sum), Symbol(\"ra\", \"nd\"))()", "f(a) = eval(Meta.parse(\"rand()\"))", "f(a) = @eval rand()", "f(a) = read(`ls`, String)",
        "f(a) = ccall(:time, Int, (Ptr{Nothing},), C_NULL)", "f(a) = typeof(sum).name.module.rand()", "f(a) = @elapsed 1+1", "f(a) = [1,2] .|> rand",
    ],
    "racket": [
        "(define r random)\n(define (f a) (r 10))", "(require (rename-in racket/base [random q]))\n(define (f a) (q 10))", "(require (prefix-in b: racket/base))\n(define (f a) (b:random 10))",
        "(require racket/random)\n(define (f a) (crypto-random-bytes 3))", "(define (f a) (eval '(random 10)))", "(define-syntax-rule (r x) (random x))\n(define (f a) (r 10))",
        "(define (f a) ((dynamic-require 'racket/base (string->symbol \"random\")) 10))", "(define (f a) (shuffle '(1 2 3)))", "(begin-for-syntax (displayln 1))\n(define (f a) 1)",
        "(require (only-in racket/base [current-seconds now]))\n(define (f a) (now))", "(require '#%unsafe)\n(define (f a) 1)", "(module m racket/base (random))\n(define (f a) 1)",
        "(define (f a) (file->string \"main.rkt\"))",
    ],
    "lisp": [
        "(defun f (a) (funcall 'random 10))", "(setf (symbol-function 'q) #'random)\n(defun f (a) (q 10))", "(defun f (a) (funcall (intern \"RANDOM\" :cl) 10))",
        "(defun f (a) (sb-ext:run-program \"/bin/ls\" nil))", "(defun f (a) (funcall (find-symbol \"GET-UNIVERSAL-TIME\" \"CL\")))", "(defun f (a) (read-from-string \"(1 2)\"))",
        "(defun f (a) (common-lisp:random 10))", "(defun f (a) (sb-unix:unix-getpid))", "(defun f (a) (format nil \"~/sb-posix:getpid/\" 1))", "(in-package :cl-user)\n(defun f (a) 1)",
    ],
    "prolog": [
        "f(_, B) :- random(B).", "f(_, B) :- G =.. [get_time, B], call(G).", "f(_, B) :- X = random, call(X, B).", "f(_, B) :- atom_concat(ran, dom, X), call(X, B).",
        "f(_, B) :- X = cputime, B is X.", "f(_, B) :- maplist(random, [B]).", "f(_, B) :- shell(ls), B = 1.", ":- initialization(writeln(hi)).\nf(A, A).",
        "f(_, B) :- system:get_time(B).", "term_expansion(a, b).\nf(A, A).", "f(_, B) :- atom_to_term('random(X)', T, _), call(T), B = T.",
    ],
}  # fmt: skip
FINE = {
    "python": ["import math as m\nfrom collections import Counter\ndef f(a):\n    time = 3\n    return [m.gcd(4, 6), Counter('abca'), time, sorted({1, 2})]", "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(a):\n    return A(a).x"],
    "lua": ["local function f(a) local t = {} for i = 1, 3 do t[#t+1] = i * 2 end table.sort(t, function(x, y) return x > y end) return {t, math.max(1, 2), ('x'):rep(3), a} end"],
    "julia": ["using Statistics\nf(a) = mean([1, 2, 3])", "import Base: +\nstruct P; x::Int; end\n+(a::P, b::P) = P(a.x + b.x)\nf(a) = (P(1) + P(2)).x", "f(a) = Base.length([x^2 for x in 1:a if isodd(x)])"],
    "racket": ["(require racket/list racket/string)\n(define time 3)\n(define (f a) (for/list ([i (in-range 3)]) (match (list i 2) [(list x y) (+ x y time)])))", "#lang racket/base\n(struct p (x y))\n(define (f a #:k [k 1]) (with-handlers ([exn:fail? (lambda (e) 1)]) (p-x (p k 2))))"],
    "lisp": ["(defmacro tw (x) `(* 2 ,x))\n(defstruct p x)\n(defun f (a) (let ((h (make-hash-table))) (setf (gethash 'a h) (tw (p-x (make-p :x a)))) (format nil \"~a\" (gethash 'a h))))"],
    "prolog": [":- use_module(library(clpfd)).\nf(_, B) :- X #= 3 + 4, B = X.", "f(_, B) :- maplist([X,Y]>>(Y is X * 2), [1,2], B).", "f(X, Y) :- ( X > 0 -> Y = pos ; Y = neg )."],
}  # fmt: skip


@pytest.mark.parametrize("name", here)
def test_banned_constructs_are_seen_under_other_names_and_ordinary_programs_pass(pool, name):
    runner = Runner(pool, load_language(name))
    programs = [(code, "banned") for code in BANNED[name]] + [
        (code, "value") for code in FINE[name]
    ]
    started = [runner.start(code, [[3]]) for code, _ in programs]
    wait(started)
    for (code, wanted), one in zip(programs, started):
        kind, text = runner.finish(one)[0]
        assert kind == wanted, (code, kind, text)


# ---- proposals ----


def answer(*parts):
    return (
        "plan</think>\n<answer>\n"
        + "\n".join(f"```{name}\n{text}\n```" for name, text in parts)
        + "\n</answer>"
    )


def lua_proposal(code, given="1"):
    return parse_proposal(
        answer(("lua", code), ("input", given)), "deduction", load_language("lua")
    )


@pytest.mark.parametrize(
    "text,task,reason",
    [
        ("no tags at all", "deduction", "format"),
        ("<answer>```lua\nx\n```</answer>", "deduction", "format"),
        (answer(("input", "1")), "deduction", "no_program"),
        (answer(("lua", "function f(a) return a end")), "abduction", "no_input"),
        (
            answer(("lua", "function f(a) return a end"), ("input", "f(1)")),
            "deduction",
            "input_no_value",
        ),
        (
            answer(("lua", "function f(a) return a end"), ("input", "")),
            "deduction",
            "input_no_value",
        ),
        (
            answer(("lua", "function f(a) return a end"), ("input", "1" * 3000)),
            "deduction",
            "too_long",
        ),
        (answer(*[("input", "1")] * 9, ("message", "m")), "induction", "few_inputs"),
        (answer(*[("input", "1")] * 10), "induction", "no_message"),
    ],
)
def test_refusals_before_anything_runs(text, task, reason):
    with pytest.raises(Refused, match=f"^{reason}$"):
        parse_proposal(text, task, load_language("lua"), program="function f(a) return a end")


def test_refusals_by_running(lua):
    """Every reason that a program can give, with the accepted ones among them, as one batch."""
    programs = {
        "syntax": "function f(a) return end end",
        "banned": "function f(a) return os.time() end",
        "no_f": "function g(a) return a end",
        "error": "function f(a) return nil + a end",
        "no_value": "function f(a) return print end",
        "too_long": "function f(a) return ('x'):rep(2500) end",
        "not_deterministic": "function f(a) return tostring({}) end",
        "cpu_limit": "function f(a) while true do end end",
        "output_limit": "function f(a) for i = 1, 1000000 do print('xxxxxxxxxx') end return 1 end",
    }
    counter = "local n = 0\nfunction f(a) n = n + 1 return n end"
    found = check(
        lua,
        [
            *map(lua_proposal, programs.values()),
            lua_proposal(counter),
            lua_proposal("function f(a) return {a, 'x'} end"),
            Refused("format"),
        ],
        120,
    )
    assert [str(r) for r in found[: len(programs)]] == list(programs)
    assert (
        str(found[-3]) == "not_deterministic"
    )  # another value the second time, in the same process
    assert found[-2].outputs == ('{1, "x"}',) and str(found[-1]) == "format"


@pytest.mark.parametrize(
    "name,code",
    [
        ("python", "def f(a):\n    return list({'a', 'b', 'c', 'd', 'e', 'f'})"),
        ("prolog", "f(_, B) :- atom_concat(cpu, time, X), B is X."),
        ("lua", "local seen = {}\nfunction f(a) seen[#seen + 1] = a return #seen end"),
    ],
)
def test_a_program_that_differs_the_second_time_is_refused(pool, name, code):
    """A hash order that changes from process to process, a clock of whole seconds, a state that is kept."""
    entry = Entry(code, ("1",), ())
    assert str(check(Runner(pool, load_language(name)), [entry], 60)[0]) == "not_deterministic"


def test_a_value_that_changes_on_its_way_is_refused(pool):
    """A real run with an identity function that is none."""
    language = load_language("lua")
    broken = replace(
        language, call={**language.call, "identity": "function f(a) return a .. 'x' end"}
    )
    runner = Runner(pool, broken)
    assert (
        str(check(runner, [lua_proposal("function f(a) return 'v' end")], 60)[0]) == "no_round_trip"
    )


def test_ways_a_program_can_end_are_reasons(lua):
    result = lambda status: Result(status, b"", b"", 0, None, 0.0, 0.0, 0, "kernel", False)
    for status in (
        "wall_limit",
        "memory_limit",
        "file_limit",
        "crash",
        "compile_error",
        "sandbox_error",
    ):
        assert outcomes(result(status), "n", 2) == [(status, "")] * 2 and status in REASONS
    forged = replace(result("ok"), stdout=b"\nN value 0 1 N\nn value 0 2 n\n")
    assert outcomes(forged, "n", 2) == [("value", "2"), ("error", "")]


@pytest.mark.parametrize("name", here)
def test_synthetic_triples_are_what_the_interpreter_says(pool, name):
    language = load_language(name)
    entries = [
        triples.triple("test", 0, i, language, pairs=PAIRS if i % 4 == 0 else 1) for i in range(8)
    ]
    found = check(Runner(pool, language), [replace(e, outputs=()) for e in entries], 120)
    assert [f.outputs if isinstance(f, Entry) else str(f) for f in found] == [
        e.outputs for e in entries
    ]
    pairs = lambda split, count: {
        (e.program, e.inputs) for e in (triples.triple(split, 0, i, language) for i in range(count))
    }
    assert not pairs("train", 300) & pairs("test", 300)


def test_composed_programs(lua):
    language = load_language("lua")
    twice = "function f(a)\n  return a * 2\nend"
    whole = compose("function f(a)\n  return g_0(a) + 1\nend", [twice], language)
    assert check(lua, [Entry(whole, ("5",), ())], 60)[0].outputs == ("11",)
    for bad in (
        "function f(a) return a end",
        "function g_0(a) return 0 end\nfunction f(a) return g_0(a) end",
    ):
        with pytest.raises(Refused, match="no_composite"):
            compose(bad, [twice], language)


# ---- answers ----


def test_solver_rewards_every_branch(pool):
    judge = SolveJudge(pool, load_language("lua"))
    entry = Entry("function f(a) return {a, a} end", ("3",), ("{3, 3}",))
    inputs, outputs = (
        tuple(str(i) for i in range(PAIRS)),
        tuple(f"{{{i}, {i}}}" for i in range(PAIRS)),
    )
    induction = Entry(entry.program, inputs, outputs, "twice")
    only_shown = "function f(a) if a < 5 then return {a, a} end return 0 end"
    cases = [
        ("deduction", answer(("output", "{3,3}")), 1.0, "ok"), ("deduction", answer(("output", "{3, 4}")), 0.0, "ok"),
        ("deduction", answer(("output", "f(3)")), -0.5, "no_value"), ("deduction", answer(("lua", "3")), -1.0, "no_output"), ("deduction", "{3, 3}", -1.0, "format"),
        ("abduction", answer(("input", "3.0")), 1.0, "ok"), ("abduction", answer(("input", "4")), 0.0, "ok"),
        ("abduction", answer(("input", "x")), -0.5, "input_no_value"), ("abduction", answer(("output", "3")), -1.0, "no_input"),
        ("induction", answer(("lua", entry.program)), 1.0, "ok"), ("induction", answer(("lua", only_shown)), 0.0, "ok"),
        ("induction", answer(("lua", "function f(a) return nil + 1 end")), -0.5, "error"), ("induction", answer(("lua", "function f(a) return os.time() end")), -0.5, "banned"),
        ("induction", answer(("input", "1")), -1.0, "no_program"),
    ]  # fmt: skip
    submissions = [
        judge.submit(Puzzle("p", task, induction if task == "induction" else entry), text)
        for task, text, *_ in cases
    ]
    found = [(v.reward, v.status) for v in judge.collect(submissions, 60)]
    assert found == [(reward, status) for *_, reward, status in cases]


def test_what_the_sandbox_cannot_judge_is_masked():
    with Pool(workers=1) as closed:
        judge = SolveJudge(closed, load_language("lua"))
        submission = judge.submit(
            Puzzle("p", "abduction", Entry("function f(a) while true do end end", ("3",), ("3",))),
            answer(("input", "3")),
        )
        verdict = judge.collect([submission], deadline=0.01)[0]
    assert math.isnan(verdict.reward) and verdict.status == "sandbox_error"


def test_proposer_rewards_every_branch():
    assert [selfplay.equation_3(a) for a in (0.25, 0.75, 0.0, 1.0, None)] == [
        0.75,
        0.25,
        -0.5,
        -0.5,
        -1.0,
    ]
    assert [selfplay.equation_4(a) for a in (0.0, 0.25, 0.5, 1.0, None)] == [
        0.5,
        0.875,
        1.0,
        0.5,
        -1.0,
    ]
    reward = lambda kind, accuracy, step, solver=0.0: selfplay.proposer_reward(
        kind, accuracy, step, 64, solver
    )
    assert reward("eq3", 0.0, 200) == -0.5 and reward("eq4", 0.0, 1) == 0.5
    assert (
        reward("switch", 0.0, 64) == -0.5
        and reward("switch", 0.0, 65) == 0.5
        and reward("switch", None, 65) == -1.0
    )
    assert (
        reward("blend", 0.0, 1, 0.0) == -0.5
        and reward("blend", 0.0, 1, 1.0) == 0.5
        and reward("blend", 0.25, 1, 0.4) == pytest.approx(0.8)
    )
    assert reward("blend", None, 1, 0.3) == -1.0 and math.isnan(reward("switch", float("nan"), 65))


def test_advantages_are_normal_per_task_and_role_over_tokens():
    """TRR++: rewards 1 of one token and 0 of three: mean 1/4, variance over tokens (9/16 + 3/16) / 3 = 1/4."""
    rewards, rows, lengths = (
        torch.tensor([1.0, 0.0, -0.5, -0.5, 1.0, float("nan")]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.tensor([1, 3, 5, 2, 4, 4]),
    )
    assert grpo.advantages(rewards, rows, "trr++", lengths).tolist() == pytest.approx(
        [1.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    )
    assert grpo.advantages(rewards, rows, "trr++", lengths)[2:].tolist() == [0.0] * 4  # exactly


@pytest.mark.parametrize("short", [True, False])
def test_a_solver_does_not_see_the_answer(short):
    """Deduction hides the output, abduction the input, induction the program and the half of the pairs that it is judged on."""
    language = load_language("racket")
    program = "(define (f a)\n  (+ a 70000))"
    entry = Entry(
        program,
        tuple(str(1111 * i) for i in range(1, 11)),
        tuple(str(1111 * i + 70000) for i in range(1, 11)),
        "a hint",
    )
    seen = {
        task: solve_prompt(Puzzle("p", task, entry), language, short)
        for task in ("deduction", "abduction", "induction")
    }
    assert (
        program in seen["deduction"]
        and "1111" in seen["deduction"]
        and "71111" not in seen["deduction"]
    )
    assert (
        program in seen["abduction"]
        and "71111" in seen["abduction"]
        and "```input\n1111\n" not in seen["abduction"]
    )
    assert all(
        text in seen["induction"] for text in (*entry.inputs[:5], *entry.outputs[:5], "a hint")
    )
    assert not any(
        text in seen["induction"]
        for text in ("(define (f a)\n  (+", *entry.inputs[5:], *entry.outputs[5:])
    )
    assert all(text.endswith("Assistant: <think>") for text in seen.values())


@pytest.mark.parametrize("name", ["azr_racket", "azr_julia"])
def test_recipes_hold_the_papers_values(name):
    s = Settings(**read_recipe(ROOT / "recipes" / f"{name}.toml"))
    assert (s.task, s.prompts, s.learn_samples, s.references, s.seed_problems, s.buffer_size) == (
        "selfplay",
        64,
        8,
        6,
        256,
        16384,
    )
    assert (
        s.lr,
        s.max_norm,
        s.temperature,
        s.eval_temperature,
        s.max_prompt_tokens,
        s.max_new_tokens,
    ) == (1e-6, 1.0, 1.0, 0.0, 6144, 8096)
    assert (s.propose_reward, s.steps, s.clip_low, s.clip_high, s.kl_coef) == (
        "switch:64",
        256,
        0.2,
        0.2,
        0.0,
    )


@pytest.mark.parametrize(
    "wrong,sentence",
    [
        ({"propose_reward": "eq5"}, "eq3, eq4"),
        ({"composite": 2.0}, "from 0 to 1"),
        ({"seeds": "nowhere.jsonl"}, "does not exist"),
    ],
)
def test_wrong_settings_get_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        selfplay.load_evaluation(Settings(task="selfplay", **wrong), load_language("lua"), None)


# ---- buffers ----


def entry(i, step=0, program=None):
    return Entry(program or f"function f(a) return a + {i} end", ("1",), (str(i + 1),), "", step)


def test_buffers_are_capped_distinct_and_come_back_exactly():
    language = load_language("lua")
    buffers = Buffers(3, language)
    b = buffers["deduction"]
    assert b.add(entry(1)) and not b.add(entry(1, step=5))
    assert not b.add(
        entry(1, program="function f(a)  -- a comment\n  return a + 1\nend")
    )  # the same but for comments and white space
    assert (
        b.add(Entry(entry(1).program, ("2",), ("3",))) and b.add(entry(2, 4)) and b.add(entry(3, 5))
    )
    assert [e.step for e in b.entries.values()] == [0, 4, 5] and entry(
        1
    ) not in b.entries.values()  # the oldest went
    picked = b.newest_first(random.Random(0), 5, step=5)
    assert (
        picked[0] == entry(3, 5)
        and len(picked) == 5
        and b.newest_first(random.Random(0), 5, 5) == picked
    )
    assert (
        len(b.draw(random.Random(0), 6)) == 3
        and buffers["abduction"].newest_first(random.Random(0), 2, 5) == []
    )
    buffers["induction"].add(Entry("p", tuple("12"), tuple("34"), "m", 7))
    buffers.solver_accuracy = 1 / 3
    other = Buffers(3, language)
    other.from_text(buffers.to_text())
    assert (
        other.to_text() == buffers.to_text()
        and list(other["deduction"].entries) == list(b.entries)
        and other["induction"].entries == buffers["induction"].entries
    )


def test_seeds_from_the_public_buffers(pool, tmp_path):
    path = ROOT.parent / "shared" / "data" / "azr_seeds"
    if not path.is_dir():
        pytest.skip("azr_seeds is not in ../shared/data")
    language = load_language("python")
    buffers, runner = Buffers(100, language), Runner(pool, language)
    refused = add_seeds(buffers, path / "3b_coder_seed_io.jsonl.gz", runner, 8, 120)
    refused |= add_seeds(buffers, path / "3b_coder_code_f_seed_io.jsonl.gz", runner, 4, 120)
    assert (
        len(buffers["deduction"]) == len(buffers["abduction"]) == 8
        and len(buffers["induction"]) >= 2
        and set(refused) <= set(REASONS)
    )
    assert all(
        len(e.inputs) == len(e.outputs) == PAIRS and e.message
        for e in buffers["induction"].entries.values()
    )


# ---- the loop ----

LOOP = "--steps 4 --save_every 2 --prompts 3 --seed_problems 4 --learn_samples 2 --references 0 --max_new_tokens 140 --eval_every 0 --eval_problems 3 --eval_samples 1 --wandb off".split()


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A tiny model that nearly knows six demonstrations by heart (without references a proposer's prompt is always the same), and a file of seeds."""
    folder = tmp_path_factory.mktemp("warm")
    language = load_language("lua")
    s = sft.WarmStart(
        task="selfplay",
        lang="lua",
        model="tiny",
        out=str(folder / "model"),
        problems=6,
        short_prompt=True,
        references=0,
        steps=26,
        warmup=5,
        batch=6,
        lr=4e-3,
    )
    sft.run(s, [], language, torch.device("cpu"), lambda *_: None)
    rows = [triples.triple("train", 0, i, language, PAIRS if i % 3 == 0 else 1) for i in range(18)]
    lines = [
        {"program": e.program, "inputs": e.inputs, "message": e.message}
        if len(e.inputs) > 1
        else {"code": e.program, "input": e.inputs[0]}
        for e in rows
    ]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def loop(warm, *more):
    return [
        "--recipe",
        str(ROOT / "recipes/azr_tiny.toml"),
        "--lang",
        "lua",
        "--model",
        str(warm / "model"),
        "--seeds",
        str(warm / "seeds.jsonl"),
        *LOOP,
        *more,
    ]


@pytest.fixture(scope="module")
def straight(warm):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *loop(warm, "--name", "straight")],
        cwd=warm,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return warm / "runs" / "straight"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_self_play_learns_from_proposals_and_answers(straight):
    last = rows(straight)[-1]
    assert (
        last["buffer/deduction"] > 4
        and any(r["propose/valid_frac"] > 0 for r in rows(straight))
        and any(r["grad_norm"] > 0 for r in rows(straight))
    )
    assert all(
        sum(r[f"refused/{reason}"] for reason in REASONS)
        == round(9 * (1 - r["propose/valid_frac"]))
        for r in rows(straight)
    )
    stored = json.loads((straight / "checkpoints/step_4/selfplay.json").read_text())
    assert len(stored["deduction"]) == last["buffer/deduction"] and {
        e["step"] for e in stored["deduction"]
    } - {0}


def test_a_resumed_run_is_the_straight_run_to_the_last_bit(warm, straight):
    cut = warm / "runs" / "cut"
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "checkpoints" / "step_4")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--resume", str(cut)],
        cwd=warm,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in (
        "metrics.jsonl",
        "checkpoints/step_4/selfplay.json",
        "checkpoints/step_4/model.safetensors",
        "checkpoints/step_4/optimizer.safetensors",
    ):
        assert (cut / name).read_bytes() == (straight / name).read_bytes(), name


def test_two_ranks_propose_and_solve_the_same(warm, straight):
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *loop(warm, "--name", "two", "--steps", "2")],
        cwd=warm,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    exact = lambda row: {
        k: v
        for k, v in row.items()
        if k.split("/")[0] in ("propose", "solve", "buffer", "refused", "learn")
    }
    assert exact(rows(warm / "runs" / "two")[0]) == exact(rows(straight)[0])


def test_crux_evaluation_of_a_buffer(warm, straight, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        "--model",
        str(warm / "model"),
        "--bench",
        "crux",
        "--lang",
        "lua",
        "--short_prompt",
        "true",
        "--problems",
        "4",
    ]
    buffer = straight / "checkpoints/step_4/selfplay.json"
    done = subprocess.run(
        [*command, "--programs", str(buffer), "--max_new_tokens", "60", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [r["cell"] for r in results] == ["crux output lua", "crux input lua"] and all(
        r["problems"] == 4 for r in results
    )
