"""Values as data in every language: literals, equality, and f of a program called on them.

Real interpreters, real sandbox.
"""

import random
import time
from dataclasses import replace
from fractions import Fraction

import pytest

from sandbox import Pool, Result
from sandbox.languages import language_names, load_language
from sandbox.languages.calls import Runner, outcomes, wait
from sandbox.languages.literals import read_one
from sandbox.languages.values import Char, Compound, Map, Pair, Set, Symbol, same, write

LANGUAGES = [name for name in language_names() if load_language(name).call]


def if_here(name):
    """A parameter that is skipped where the language's interpreter is missing."""
    missing = load_language(name).missing()
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=missing or ""))


HERE = [if_here(name) for name in LANGUAGES]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as started:
        yield started


# ---- literals ----

COMMON = [
    [[1, [2, []], -3], "a\"b\\c'd\n\te", -7, 123456, 1.5, -0.25, 1e300, 1e-07, "", "é日"],
    10**30,
]
VALUES = {
    "python": [
        *COMMON, Map((("k", [1, (2,)]), (3, None))), Set((1, 2)), Set(()), (True, ()),
    ],
    "lua": [
        COMMON[0], Map((("k", [1, 2]), (2.5, True))), 2**63 - 1, [-(2**63)],
        Map(((0, 1), (2, 3))),
    ],
    "javascript": [
        COMMON[0], Map((("k", [1, None]), ("a b", Map(())), ("7", True))), 2**53 - 1, 2.0**60,
        Set((1, "2")), Set(()), [True, False],
    ],
    "ruby": [
        *COMMON, Map((("k", [1, None]), (Symbol("ok?"), Map(())), (3, True))), "#{x} # $y",
        Symbol("a_b"), Set((1, "2")), Set(()), [True, False],
    ],
    "perl": [
        COMMON[0], Map((("k", [1, None]), ("a b", Map(())), ("7", 1))), 2**63 - 1, [-(2**63)],
        2.0**70, "$x @y %z", ["3", 3, "3.0", "03"], [],
    ],
    "r": [
        COMMON[0], [1, 2.5, -3], ["a", "é日"], [True, False], True, None, (), (1, "a", (2, [3, 4])),
        Map((("k", [1, 2]), ("a b", Map((("c", None),))))), [5], ["x"], [[1, 2], [3]], 2**53 - 1,
        1e300, 1e-07, "a\"b\\c'd\n\te$x", "",
    ],
    "ocaml": [
        [1, -2, 3], [[1.5, -0.25], [1e300, 1e-07]], ("a\"b\\c'd\n\te", "", "é日"), 2**62 - 1, [],
        -(2**62), (1, (2.0, [True, False]), ()), Char("'"), Char('"'), [(1, "a"), (2, "b")],
    ],
    "julia": [
        *COMMON, Map((("k", [1, 2.5]), ("l", "$x"))), Symbol("a_b"), Char("'"), None,
        Fraction(3, 4), Set((1, 2)), (1,), [True, 1], [[1], [2.5]],
    ],
    "racket": [
        *COMMON, Map(((Symbol("k"), [1, 2]), ("s", 1.5))), Symbol("list->vector"), Char(" "),
        Char("("), Fraction(-3, 4), Pair(1, Pair(2, 3)), (1, "a"), [True, False],
    ],
    "scheme": [
        *COMMON, Symbol("list->vector"), Char(" "), Char("("), Fraction(-3, 4),
        Pair(1, Pair(2, 3)), (1, "a"), [True, False],
    ],
    "lisp": [
        [[1, [2, []], -3], "a\"b\\c'd\n e", -7, 1.5, 1e300, 1e-07], 10**30,
        Map((("k", [1, 2]), (Symbol("x"), Fraction(1, 3)))), Symbol("foo-bar"), Symbol(":key"),
        Char("a"), Pair(1, 2), (1, "a"), [True, []], [1, Map(((1, 2),))],
    ],
    "prolog": [
        *COMMON, Symbol("it's"), Compound("foo", (Symbol("bar"), -1)), Compound("-", ("k", [1])),
        Compound("-", (-1, Compound("-", (1, 2)))), Symbol("true"), Fraction(1, 3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_literal_is_read_as_the_value_that_was_written(name):
    language = load_language(name)
    for value in VALUES[name]:
        text = write(value, language)
        assert same(read_one(text, language), value, language), text


@pytest.mark.parametrize("name", HERE)
def test_values_come_back_from_the_language_as_they_went_in(pool, name):
    language = load_language(name)
    runner = Runner(pool, language)
    running = runner.start(language.call["identity"], [[value] for value in VALUES[name]])
    wait([running])
    for value, outcome in zip(VALUES[name], runner.finish(running)):
        assert outcome.kind == "value", (value, outcome)
        assert same(read_one(outcome.text, language), value, language), (value, outcome)


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
        ("scheme", "(list 'a (list 1) #t)", [Symbol("a"), [1], True]),
        ("lisp", "'(A b NIL t)", [Symbol("a"), Symbol("b"), [], True]),
        ("lisp", "1.5d0", 1.5),
        ("lua", "{a = 1, ['b c'] = {2}}", Map((("a", 1), ("b c", [2])))),
        ("lua", "{[2] = 'y', [1] = 'x'}", ["x", "y"]),
        ("lua", "9223372036854775808", 2.0**63),
        (
            "javascript",
            "{a: 1, 'b c': [2,], $x: {}, 7: null,}",
            Map((("a", 1), ("b c", [2]), ("$x", Map(())), ("7", None))),
        ),
        ("javascript", "new Set([1, 2])", Set((1, 2))),
        ("javascript", "9007199254740993", 2.0**53),
        (
            "ruby",
            "{a: 1, 'b' => :c?, d!: {},}",
            Map(((Symbol("a"), 1), ("b", Symbol("c?")), (Symbol("d!"), Map(())))),
        ),
        ("ruby", r"""['a\n', 'it\'s', "# \#{x}"]""", ["a\\n", "it's", "# #{x}"]),
        ("ruby", "Set[1, 2]", Set((1, 2))),
        ("ocaml", "[1; -2;]", [1, -2]),
        ("ocaml", '(1., ["a"; "b"])', (1.0, ["a", "b"])),
        ("ocaml", "()", ()),
        ("r", "c(1, -2.5)", [1, -2.5]),
        ("r", "list(1, 'a', c(TRUE, FALSE), NULL)", (1, "a", [True, False], None)),
        ("r", "list(a = 1, 'b c' = list(2))", Map((("a", 1), ("b c", (2,))))),
        ("r", "c(a = 1, b = 2)", Map((("a", 1), ("b", 2)))),
        ("r", "c()", None),
        (
            "perl",
            "{a => 1, 'b c' => [2,], 7 => undef,}",
            Map((("a", 1), ("b c", [2]), ("7", None))),
        ),
        ("perl", r"""['a\n', 'it\'s $x', "\$5 \@home"]""", ["a\\n", "it's $x", "$5 @home"]),
        ("prolog", "[a-1, 'B c', \"s\"]", [Compound("-", (Symbol("a"), 1)), Symbol("B c"), "s"]),
    ],
)
def test_literals_as_people_write_them(name, text, value):
    language = load_language(name)
    assert same(read_one(text, language), value, language)


@pytest.mark.parametrize(
    "name,a,b,equal",
    [
        ("python", 1, 1.0, True),
        ("lua", 1, 1.0, True),
        ("javascript", 1, 1.0, True),
        ("javascript", 1, "1", False),
        ("ruby", Symbol("a"), "a", False),
        ("perl", 1, 1.0, True),
        ("ocaml", 1, 1.0, False),
        ("r", [5], 5, True),
        ("r", [], None, True),
        ("r", [1, 2], (1, 2), False),
        ("r", [[1], "a"], (1, "a"), True),
        ("perl", ["15", "1.5", "1e+20"], [15, 1.5, 1e20], True),
        ("perl", "1.50", 1.5, False),
        ("perl", "-0", 0, False),
        ("racket", 1, 1.0, False),
        ("scheme", 1, 1.0, False),
        ("prolog", 1, 1.0, False),
        ("python", 1, True, False),
        ("python", Map(((1, 2), (3, 4))), Map(((3, 4), (1, 2))), True),
        ("julia", [1, 2], (1, 2), False),
    ],
)
def test_equality_is_the_languages_own(name, a, b, equal):
    assert same(a, b, load_language(name)) == equal


# Answers that would close the call, force a truth or run something, if pasted into a program.
ATTACKS = {
    "python": [
        "1) or True or f(1", "1)\nprint('x'", "__import__('os').getcwd()", "f(1)",
        "[x for x in [1]]", "lambda: 1", "1 if True else 2", "f'{1}'", "'a' 'b' or 1",
    ],
    "lua": [
        "1) or true or f(1", "f(1)", "(function() return 1 end)()", "os.time()", "{f()}", "1 --",
        "[[x]]",
    ],
    "javascript": [
        "1) || true || f(1", "f(1)", "(() => 1)()", "new Date()", "`${f(1)}`", "[...[1]]", "1n",
        "{get a() { return 1 }}", "{__proto__: null}", "{[1]: 2}", "undefined", "NaN", "[1, , 2]",
        "new Set(f(1))", "new Map([])", "1; process.exit()", "/x/", "0x10",
    ],
    "ruby": [
        "1) || true || f(1", "f(1)", '"#{f(1)}"', '"#$x"', "`ls`", "%w[a b]", "[1].map", "1..3",
        "-> { 1 }", ":'a b'", "{a => 1}", "Set.new", "1; exit", "[*[1]]", "x", "3r",
    ],
    "perl": [
        "1) || 1 || f(1", "f(1)", '"$x"', '"@x"', '"@{[f(1)]}"', "`ls`", "qw(a b)", "[1..3]",
        "sub { 1 }", "\\1", "%h", "<STDIN>", "{a => 1, 2}", "do { 1 }", "1; exit", "x", "__FILE__",
        "0x10", "q(a)", "(1, 2)",
    ],
    "r": [
        "1) || TRUE || f(1", "f(1)", "c(f(1))", "c(1, 'a')", "c(c(1), 2)", "1:3", "c(1, TRUE)",
        "function(x) 1", "x", "NA", "Inf", "list(1", "`f`(1)", "1; quit()", "1 + 1", "TRUE && FALSE",
        "seq(1, 3)", "c(list(1))", "T", "list(a = f(1))",
    ],
    "ocaml": [
        "1) || true || f (1", "f 1", "[1, 2]", "[f 1]", "(fun x -> x)", "x", "Some 1", "[1; 2.5]",
        "[|1|]", "{a = 1}", "1 + 1", "exit 0", "!r", "begin 1 end", "[1; \"a\"]", "`A",
        "9223372036854775807",
    ],
    "julia": [
        "1) || true || f(1", '"$(run(`ls`))"', '"$x"', "[x for x in 1:2]", "f(1)", "`ls`",
        "1; exit()", "[1:3]", "begin 1 end",
    ],
    "racket": [
        "1) (f 1", "(f 1)", "(list (f 1))", ",(f 1)", "`(1 ,(f 1))", "#.(f 1)", "1 ; x", "'(1 2",
        "#<procedure>", "(hash 'a)",
    ],
    "scheme": [
        "1) (f 1", "(f 1)", "(list (f 1))", ",(f 1)", "`(1 ,(f 1))", "#.(f 1)", "1 ; x", "'(1 2",
        "#<procedure>", "#:key", "x",
    ],
    "lisp": [
        "1) (f 1", "(f 1)", "#.(f 1)", "`(1 ,(f 1))", "'#.(f 1)", "#'f", "sb-ext:*posix-argv*",
        "'(1 . 2 3)", "|a b|", "1 ; x",
    ],
    "prolog": [
        "1), true ; f(1", "X", "[A|B]", "f(_)", "1, true ; true", "{a}", "a:-b", "\"a", "[1|2]",
    ],
}  # fmt: skip
NEVER_LITERALS = [
    "", "\x00", "1e999", "[" * 200, "(" * 200, "'(" * 100, "{" * 200, '"' + "a" * 3000 + '"',
]  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_answer_that_is_a_program_is_refused(name):
    for text in [*ATTACKS[name], *NEVER_LITERALS]:
        with pytest.raises(ValueError):
            read_one(text, load_language(name))


PARTS = [
    *"1 -2 .5 1e400 'a' \"b\" \" ' ( ) [ ] { } , : = => - . # \\ $ a True true nil f(".split(),
    *"Dict( Set([ (list (cons :k #( #hash( 1/2 1//2 1r2 ; |".split(),
    " ",
]
LONG = [
    "[[" * 900, "'(" * 900, "1" * 1999, "1-" * 900 + "1", "'(" + "1 " * 800 + ". 2)", "-" * 1999,
]  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_text_breaks_the_parser(name):
    """Parts of literals at random: a value that can be written and read again, or a ValueError.

    Never anything else, and never slowly: 10,000 texts take 0.2 s.
    """
    language = load_language(name)
    rng = random.Random(0)
    texts = ["".join(rng.choices(PARTS, k=rng.randint(1, 6))) for _ in range(10000)]
    started = time.perf_counter()
    accepted = 0
    for text in [*LONG, *texts]:
        try:
            value = read_one(text, language)
        except ValueError:
            continue
        assert same(read_one(write(value, language), language), value, language), text
        accepted += 1
    assert accepted > 200
    assert time.perf_counter() - started < 20


# ---- calls ----

BANNED = {
    "python": [
        "import random as r\ndef f(a):\n    return r.random()",
        "from time import time as t\ndef f(a):\n    return t()",
        "def f(a):\n    g = getattr\n    return g(a, 'x', 1)",
        "from statistics import random as r\ndef f(a):\n    return r.random()",
        "import statistics\ndef f(a):\n    return statistics.random.random()",
        "def f(a):\n    return ().__class__.__base__.__subclasses__()",
        "def f(a):\n    return __import__('ti' + 'me').time()",
        "e = exec\ndef f(a):\n    return e('b=1')",
        "def f(a):\n    return __builtins__['open']",
        "def f(a):\n    return open('main.py').read()",
        "import string\ndef f(a):\n    return string._re",
    ],
    "lua": [
        "function f(a) return math.random() end",
        "local m = math\nlocal r = m['ran'..'dom']\nfunction f(a) return r(10) end",
        "function f(a) return _G['o'..'s']['ti'..'me']() end",
        "local e = _ENV\nfunction f(a) return e.os.clock() end",
        "function f(a) pcall(function() io.open('x') end) return 1 end",
        "function f(a) return load('return 1')() end",
        "function f(a) return ('').dump(f) end",
        "local d = require\nfunction f(a) return d('os').time() end",
        "function f(a) return getmetatable('').__index.dump(f) end",
    ],
    "javascript": [
        "function f(a) { return Math.random(); }",
        "const m = Math, r = m['ran' + 'dom'];\nfunction f(a) { return r(); }",
        "const f = (a) => Date.now();",
        "const f = (a) => new Date();",
        "function f(a) { try { require('fs'); } catch (e) {} return 1; }",
        "function f(a) { return (() => {}).constructor('return process')().pid; }",
        "function f(a) { return [].map.constructor('return 1')(); }",
        "async function g() {}\nfunction f(a) { return g.constructor('return 1'); }",
        "function f(a) { return eval('1'); }",
        "function f(a) { return globalThis['pro' + 'cess'].pid; }",
        "function f(a) { return this.constructor.constructor('return 1')(); }",
        "const o = { get x() { return Math.random(); } };\nfunction f(a) { return o.x; }",
        "function f(a) { return new Intl.DateTimeFormat().format(); }",
    ],
    "ruby": [
        "def f(a) rand end",
        "def f(a) send('ra' + 'nd', 10) end",
        "def f(a) Kernel.rand(10) end",
        "R = Random\ndef f(a) R.rand end",
        "def f(a) Object.const_get('Ti' + 'me').now end",
        "def f(a) $stdin.class.read('main.rb') end",
        "def f(a) begin; Time.now; rescue NameError; 1; end end",
        "def f(a) [1, 2].shuffle end",
        "def f(a) eval('1') end",
        "def f(a) instance_eval('1') end",
        "def f(a) `ls` end",
        "require 'socket'\ndef f(a) 1 end",
        "M = Kernel.method(:rand)\ndef f(a) M.call end",
        "def f(a) ObjectSpace.count_objects end",
        "def f(a) Thread.new { 1 }.value end",
        "def f(a) File.read('main.rb') end",
    ],
    "perl": [
        "sub f { return rand(10) }",
        "sub f { my $r = \\&CORE::rand; return &$r(3) }",
        "sub f { return time }",
        "use Time::HiRes qw(time);\nsub f { return time() }",
        "sub f { return eval 'rand' }",
        "sub f { eval { require Time::HiRes }; return 1 }",
        "sub f { open(my $f, '<', 'main.pl'); return <$f> }",
        "use POSIX;\nsub f { return POSIX::clock() }",
        "sub f { return `ls` }",
        "sub f { return system('ls') }",
        "use List::Util qw(shuffle);\nsub f { return [shuffle(1,2)] }",
        "sub f { return (stat 'x')[9] }",
        "sub f { return localtime }",
        "sub f { exit 0 }",
        "use POSIX qw(getpid);\nsub f { return getpid() }",
        "sub f { my $m = 'POSIX'->can('ti'.'mes'); return $m->() }",
        "BEGIN { require Socket }\nsub f { 1 }",
        "sub f { return do 'x.pl' }",
        "sub f { my $x = \\&{'POSIX::ti'.'me'}; return $x->() }",
        "sub f { return CORE::GLOBAL::time() + CORE::time() }",
        "sub f { (caller(0))[3] }",
    ],
    "r": [
        "f <- function(a) runif(1)",
        "r <- stats::rnorm\nf <- function(a) r(1)",
        "f <- function(a) do.call('run' |> paste0('if'), list(1))",
        "f <- function(a) sample(10)[1]",
        "f <- function(a) get('Sys.time')()",
        "f <- function(a) base::Sys.time()",
        "f <- function(a) match.fun('Sys.getpid')()",
        "f <- function(a) eval(parse(text = '1'))",
        "f <- function(a) tryCatch(Sys.time(), error = function(e) 1)",
        "f <- function(a) sapply(1:2, set.seed)",
        "f <- function(a) system('ls')",
        "f <- function(a) readLines('main.R')",
        "f <- function(a) .Internal(date())",
        "f <- function(a) quit()",
        "library(parallel)\nf <- function(a) 1",
        "f <- function(a) getFromNamespace('Sys.time', 'base')()",
        "f <- function(a) stats:::runif(1)",
    ],
    "ocaml": [
        "let f a = Random.int 10",
        "module R = Random\nlet f a = R.int 10",
        "open Stdlib.Random\nlet f a = int 10",
        "let f a = let open Sys in time ()",
        "let g = Sys.time\nlet f a = g ()",
        'let f a = try ignore (Sys.command "ls"); 1 with _ -> 1',
        'external time : unit -> float = "caml_sys_time"\nlet f a = time ()',
        'module M = struct external t : unit -> float = "caml_sys_time" end\nlet f a = M.t ()',
        'let f a = input_line (open_in "main.ml")',
        "let f a = Stdlib.exit 0",
        "let f (a : int) : string = Obj.magic a",
        '#use "main.ml";;\nlet f a = 1',
        "let f a = Hashtbl.randomize (); 1",
        "include Random\nlet f a = int 10",
        "let f a = let module M = struct include Random end in M.int 9",
        'let f a = Toploop.getvalue "f" == Toploop.getvalue "f"',
    ],
    "julia": [
        "r = rand\nf(a) = r(1:10)",
        "import Base: rand\nf(a) = rand()",
        "using Random\nf(a) = shuffle(a)",
        "const B = Base\nf(a) = B.time()",
        "f(a) = Base.time_ns()",
        'f(a) = getfield(parentmodule(sum), Symbol("ra", "nd"))()',
        'f(a) = eval(Meta.parse("rand()"))',
        "f(a) = @eval rand()",
        "f(a) = read(`ls`, String)",
        "f(a) = ccall(:time, Int, (Ptr{Nothing},), C_NULL)",
        "f(a) = typeof(sum).name.module.rand()",
        "f(a) = @elapsed 1+1",
        "f(a) = [1,2] .|> rand",
    ],
    "racket": [
        "(define r random)\n(define (f a) (r 10))",
        "(require (rename-in racket/base [random q]))\n(define (f a) (q 10))",
        "(require (prefix-in b: racket/base))\n(define (f a) (b:random 10))",
        "(require racket/random)\n(define (f a) (crypto-random-bytes 3))",
        "(define (f a) (eval '(random 10)))",
        "(define-syntax-rule (r x) (random x))\n(define (f a) (r 10))",
        '(define (f a) ((dynamic-require \'racket/base (string->symbol "random")) 10))',
        "(define (f a) (shuffle '(1 2 3)))",
        "(begin-for-syntax (displayln 1))\n(define (f a) 1)",
        "(require (only-in racket/base [current-seconds now]))\n(define (f a) (now))",
        "(require '#%unsafe)\n(define (f a) 1)",
        "(module m racket/base (random))\n(define (f a) 1)",
        '(define (f a) (file->string "main.rkt"))',
    ],
    "scheme": [
        "(define r random)\n(define (f a) (r 10))",
        "(define (f a) ((@ (guile) random) 10))",
        "(use-modules (ice-9 popen))\n(define (f a) 1)",
        "(use-modules ((ice-9 popen) #:select (open-pipe)))\n(define (f a) 1)",
        "(define (f a) (eval '(random 10) (interaction-environment)))",
        "(define-syntax-rule (r x) (random x))\n(define (f a) (r 10))",
        "(define (f a) (catch #t (lambda () (current-time)) (lambda _ 1)))",
        "(define (f a) (use-modules (srfi srfi-1)) 1)",
        '(define (f a) (open-input-file "main.scm"))',
        "(define (f a) (random 10 *random-state*))",
        "(define-module (m))\n(define (f a) 1)",
        "(define (f a) (module-ref (resolve-module '(guile)) 'random))",
        '(define (f a) (map getenv \'("HOME")))',
    ],
    "lisp": [
        "(defun f (a) (funcall 'random 10))",
        "(setf (symbol-function 'q) #'random)\n(defun f (a) (q 10))",
        '(defun f (a) (funcall (intern "RANDOM" :cl) 10))',
        '(defun f (a) (sb-ext:run-program "/bin/ls" nil))',
        '(defun f (a) (funcall (find-symbol "GET-UNIVERSAL-TIME" "CL")))',
        '(defun f (a) (read-from-string "(1 2)"))',
        "(defun f (a) (common-lisp:random 10))",
        "(defun f (a) (sb-unix:unix-getpid))",
        '(defun f (a) (format nil "~/sb-posix:getpid/" 1))',
        "(in-package :cl-user)\n(defun f (a) 1)",
    ],
    "prolog": [
        "f(_, B) :- random(B).",
        "f(_, B) :- G =.. [get_time, B], call(G).",
        "f(_, B) :- X = random, call(X, B).",
        "f(_, B) :- atom_concat(ran, dom, X), call(X, B).",
        "f(_, B) :- X = cputime, B is X.",
        "f(_, B) :- maplist(random, [B]).",
        "f(_, B) :- shell(ls), B = 1.",
        ":- initialization(writeln(hi)).\nf(A, A).",
        "f(_, B) :- system:get_time(B).",
        "term_expansion(a, b).\nf(A, A).",
        "f(_, B) :- atom_to_term('random(X)', T, _), call(T), B = T.",
    ],
}
FINE = {
    "python": [
        "import math as m\nfrom collections import Counter\ndef f(a):\n    time = 3\n"
        "    return [m.gcd(4, 6), Counter('abca'), time, sorted({1, 2})]",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def f(a):\n    return A(a).x",
    ],
    "lua": [
        "local function f(a) local t = {} for i = 1, 3 do t[#t+1] = i * 2 end "
        "table.sort(t, function(x, y) return x > y end) "
        "return {t, math.max(1, 2), ('x'):rep(3), a} end"
    ],
    "javascript": [
        "const g = (x) => x * 2;\nconst f = (a) => { console.log(a); return [g(a), "
        "Math.max(1, 2), 'x'.repeat(3), { k: [...'ab'].map((c) => c.charCodeAt(0)) }]; };",
        "class P { constructor(x) { this.x = x; } }\nfunction* g() { yield 1; }\n"
        "function f(a) { return { ...new P(a), n: [...g()], s: new Set([a]) }; }",
        "module.exports = f;\nfunction f(a) { const m = new Map([[a, 1]]); return m.get(a); }",
        "'use strict';\nlet f = function (a) { return [3, 1].sort()[0] / 3; };",
    ],
    "ruby": [
        "require 'set'\nrequire 'prime'\nP = Struct.new(:x)\n"
        "def f(a) puts a; [P.new(a).x, Set[1, 2].include?(2), Prime.first(3), a.digits] end",
        "class Q; attr_reader :y; def initialize(y) = @y = y; end\n"
        "def f(a) { 'k' => Q.new(a).y, s: %w[b a].sort, t: \"#{Set[a]}\".size > 3 } end",
        "def f(a) nil.foo; rescue NoMethodError => e; e.message.size > 9; end",
        "def f(a) = Marshal.load(Marshal.dump([a, a.to_s * 2, 10.divmod(3)]))",
    ],
    "perl": [
        "use strict; use warnings;\n"
        "use List::Util qw(sum max first reduce);\nuse POSIX qw(floor ceil fmod);\n"
        "sub f { my ($a) = @_; my %h = (k => [map { $_ * 2 } 1..3]); print 'x'; "
        "return [sum(1,2), floor(2.5), \\%h, join(',', sort { $a <=> $b } 3, 1), sprintf('%05.2f', 3.14159)]; "
        "}",
        "package P; sub new { my ($c, $x) = @_; return bless { x => $x }, $c } sub x { $_[0]{x} }\n"
        "package main;\nsub f { my $p = P->new(3); my @q = reverse split //, 'abc'; "
        "return { x => $p->x, q => \\@q, s => scalar(@q) }; }",
        "use Data::Dumper; use Storable qw(dclone); use constant PI => 3;\n"
        "my $total = 0;\nsub g { $total += $_[0]; return $total }\n"
        "sub f { my $c = dclone([1,[2]]); "
        "return [g(2), g(3), PI, $c, 'abc' =~ /b(.)/ ? $1 : undef, local $_ = 5] }",
        "sub f { my ($a) = @_; my @s = eval { die { code => 5 } }; return $@->{code} + $a }",
        "sub f { my $f; $f = sub { my $n = shift; $n < 2 ? 1 : $n * $f->($n - 1) }; "
        "return $f->(10) }",
    ],
    "r": [
        "library(stats)\ng <- function(x) x * 2\nf = function(a) { cat(a); print(a)\n"
        "list(g(a), max(1, 2), strrep('x', 3), sapply(1:3, function(i) i^2), median(c(3, 1, 2))) }",
        "f <- function(a) { s <- strsplit('b,a', ',')[[1]]; names(s) <- c('k', 'l')\n"
        "list(s, sort(unlist(s)), rev(1:3), 7 %/% 2, is.null(NULL), sprintf('%05.2f', pi)) }",
        "c <- function(...) base::c(...)\nf <- function(a) { x <- c(b = 2, a = 1); x[order(x)] }",
        "f <- function(a) { m <- matrix(1:4, 2); apply(m, 1, sum) + Reduce(`+`, 1:a) }",
        "f <- function(a) tryCatch(stop('x'), error = function(e) conditionMessage(e))",
        "f <- \\(a) { d <- data.frame(x = 1:3); d$x[d$x > 1] }",
        "setClass('P', representation(x = 'numeric'))\nf <- function(a) new('P', x = a)@x",
    ],
    "ocaml": [
        "let rec g n = if n < 2 then 1 else n * g (n - 1)\n"
        "let f a = print_string \"x\"; (g a, List.map (fun x -> x * 2) [1; 2], String.make 3 'x')",
        "type shape = Circle of float | Square of float\n"
        "let area = function Circle r -> r *. 2.0 | Square s -> s *. s\n"
        "let f a = area (Square (float_of_int a))",
        "module P = Map.Make (String)\n"
        'let f a = P.bindings (P.add "b" a (P.singleton "a" 1));;\n'
        'let () = Printf.printf "%d" 3',
        'let f a = try failwith "no" with Failure text -> text ^ string_of_int a',
        'let f a = let t = Hashtbl.create 9 in Hashtbl.add t "k" a; Hashtbl.find t "k"',
    ],
    "julia": [
        "using Statistics\nf(a) = mean([1, 2, 3])",
        "import Base: +\nstruct P; x::Int; end\n+(a::P, b::P) = P(a.x + b.x)\n"
        "f(a) = (P(1) + P(2)).x",
        "f(a) = Base.length([x^2 for x in 1:a if isodd(x)])",
    ],
    "racket": [
        "(require racket/list racket/string)\n(define time 3)\n(define (f a) "
        "(for/list ([i (in-range 3)]) (match (list i 2) [(list x y) (+ x y time)])))",
        "#lang racket/base\n(struct p (x y))\n(define (f a #:k [k 1]) "
        "(with-handlers ([exn:fail? (lambda (e) 1)]) (p-x (p k 2))))",
    ],
    "scheme": [
        "(use-modules (srfi srfi-1) ((ice-9 match) #:select (match)))\n(define time 3)\n"
        "(define (f a) (map (lambda (i) (match (list i 2) ((x y) (+ x y time)))) (iota 3)))",
        "(use-modules (srfi srfi-9))\n"
        "(define-record-type point (make-point x y) point? (x point-x) (y point-y))\n"
        "(define (f a) (let loop ((i 0)) (if (< i a) (loop (+ i 1)) (point-x (make-point i 2)))))",
        "(define (f a) (let ((h (make-hash-table))) (hash-set! h 'a 1) (display a) "
        "(call-with-output-string (lambda (p) (write (hash-ref h 'a) p)))))",
    ],
    "lisp": [
        "(defmacro tw (x) `(* 2 ,x))\n(defstruct p x)\n(defun f (a) (let ((h (make-hash-table))) "
        "(setf (gethash 'a h) (tw (p-x (make-p :x a)))) (format nil \"~a\" (gethash 'a h))))"
    ],
    "prolog": [
        ":- use_module(library(clpfd)).\nf(_, B) :- X #= 3 + 4, B = X.",
        "f(_, B) :- maplist([X,Y]>>(Y is X * 2), [1,2], B).",
        "f(X, Y) :- ( X > 0 -> Y = pos ; Y = neg ).",
    ],
}


@pytest.mark.parametrize("name", HERE)
def test_banned_constructs_are_seen_under_other_names_and_ordinary_programs_pass(pool, name):
    runner = Runner(pool, load_language(name))
    wanted = {code: "banned" for code in BANNED[name]} | {code: "value" for code in FINE[name]}
    jobs = [runner.start(code, [[3]]) for code in wanted]
    wait(jobs)
    for code, running in zip(wanted, jobs):
        outcome = runner.finish(running)[0]
        assert outcome.kind == wanted[code], (code, outcome)


OK = Result("ok", b"", b"", 0, None, 0.0, 0.0, 0, "kernel", False)


def test_how_a_job_ended_is_the_outcome_of_all_its_calls():
    assert outcomes(replace(OK, status="wall_limit"), "n", 2) == [("wall_limit", "")] * 2


def test_lines_without_the_nonce_are_not_outcomes():
    printed = replace(OK, stdout=b"\nN value 0 1 N\nn value 0 2 n\n")
    assert outcomes(printed, "n", 2) == [("value", "2"), ("error", "")]
