"""The syntax check of every language: right programs pass, and none ends it before it has read all."""

from fractions import Fraction

import pytest

from rewards import Judge
from sandbox import Pool
from sandbox.languages import language_names, load_language
from tasks.problems import Problem

PROBLEM = Problem("p", "sums", "?", Fraction(42))
BROKEN = "\n(((] this is } no program ][ \" '"  # in no language

# Where a run, a load or a reader of the program would end before it comes to what is broken.
LEAVERS = {
    "bash": ["exit 0"],
    "javascript": ["process.exit(0)", "#!/usr/bin/env node --help"],
    "elixir": ["System.halt(0)", "#!/usr/bin/env elixir -v", "exit(:normal)"],
    "go": ["package main\nfunc init() {}\n//go:build ignore", "//go:build ignore"],
    "haskell": [
        "{-# LANGUAGE TemplateHaskell #-}\nimport Language.Haskell.TH.Syntax\n"
        "import System.Exit\nimport System.Posix.Process\n"
        "$(runIO (exitImmediately ExitSuccess) >> return [])",
        "{-# OPTIONS_GHC -F -pgmF /bin/true #-}",
        "{-# OPTIONS_GHC --version #-}",
        "{-# LANGUAGE CPP #-}\n#if 0",
    ],
    "julia": ["exit(0)", "#=\n=#exit()", "@eval exit(0)", "__precompile__(exit(0))"],
    "lisp": ["(sb-ext:exit)", "#.(sb-ext:exit :code 0)", "(eval-when (:compile-toplevel) (exit))"],
    "lua": ["os.exit(0)", "#!/usr/bin/lua -v"],
    "ocaml": ["exit 0;;", "#quit;;", '#use "/dev/null";;'],
    "perl": [
        "BEGIN { exit 0 }",
        "exit 0;",
        "use POSIX; BEGIN { POSIX::_exit(0) }",
        "use constant X => exit 0;",
        'BEGIN { print "nonce\\nmain.pl syntax OK\\n"; exit 0 }',
        "BEGIN { $SIG{__DIE__} = sub { exit 0 } }",
        "END { $? = 0 }",
        "__END__",
        "return 1;",
        "} return 1; {",
        "#!/usr/bin/perl -v",
    ],
    "php": [
        "<?php exit(0);",
        "<?php __halt_compiler();",
        "<?php __HALT_COMPILER /**/ ();",
        "#!/usr/bin/php -v\n<?php",
        "exit(0);",  # without the line that makes it a program, all would be text to print
    ],
    "prolog": [
        ":- halt.",
        ":- halt(0).",
        ":- initialization(halt).",
        "end_of_file.",
        "term_expansion(_, []). :- halt.",
        ":- op(700, xfx, [===>]), halt.",
        ":- use_module(main).",
        ":- use_module(library('../../../../../../proc/self/cwd/main')).",
        ":- set_prolog_flag(toplevel_goal, halt).",
        ":- if(halt).",
        "user:portray(_) :- halt.",
        "#!/usr/bin/swipl",
    ],
    "python": ["exit()", "import os; os._exit(0)", "# coding: rot13"],
    "r": ["quit()", "q('no', 0)"],
    "racket": [
        "#lang racket/base\n(exit 0)",
        "#lang racket/base\n(begin-for-syntax (exit 0))",
        '#lang reader "main.rkt"',
        "#lang racket/base\n#reader(submod)",
        '#reader "main.rkt"',
        "1",
        '(module reader racket/base (exit 0)) #reader(submod "main.rkt" reader)',
    ],
    "ruby": ["exit 0", "BEGIN { exit 0 }", "__END__", "#!/usr/bin/ruby -v", "#!ruby --version"],
    "scheme": ["(exit 0)", "#!eof", "#.(exit 0)", "(eval-when (expand load eval) (exit 0))"],
}


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as pool:
        yield pool


def checked(pool, language, programs):
    """The syntax component of each program, and the results of the checks."""
    judge = Judge(pool, language, {"syntax": 1.0}, gate=False)
    tag = language.answer["tag"]
    submissions = []
    for code in programs:
        text = f"<code>\n{code}\n</code>\n<{tag}>\nx\n</{tag}>"
        submissions.append(judge.submit(PROBLEM, text))
    verdicts = judge.collect(submissions, 120)
    found = [verdict.components["syntax"] for verdict in verdicts]
    return found, [submission.syntax.result() for submission in submissions]


def language_with_check(name):
    language = load_language(name)
    if sentence := language.missing():
        pytest.skip(sentence)
    if not language.check:
        pytest.skip(f"{name} has no check")
    return language


@pytest.mark.parametrize("name", language_names())
def test_right_programs_pass_and_broken_ones_do_not(name, pool):
    language = language_with_check(name)
    right = [language.fixtures["pass"], language.fixtures["loop"]]
    found, results = checked(pool, language, [*right, right[0] + BROKEN, BROKEN])
    assert found == [1.0, 1.0, 0.0, 0.0], results


@pytest.mark.parametrize("name", sorted(LEAVERS))
def test_nothing_in_a_program_ends_its_check_early(name, pool):
    language = language_with_check(name)
    programs = [leaver + BROKEN for leaver in LEAVERS[name]]
    found, results = checked(pool, language, programs)
    passed = [case for case, one in zip(zip(programs, results), found, strict=True) if one]
    assert not passed, passed


@pytest.mark.parametrize("name", ["c", "javascript", "lua", "perl", "prolog", "python", "racket"])
def test_a_program_of_nothing_but_comments_has_right_syntax(name, pool):
    """As each language has it. Who rewards syntax alone also pays for `1`."""
    language = language_with_check(name)
    found, results = checked(pool, language, [f"{language.comment} nothing"])
    assert found == [1.0], results
