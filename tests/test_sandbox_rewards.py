"""Training rewards through the sandbox, in the languages of the loop.

Right programs of GSM8K, and programs that forge a verdict.
"""

import json
import re
import textwrap
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import Judge, answer_files
from sandbox import Pool
from sandbox.languages import language_names, load_language
from sandbox.languages.headers import with_header, without_header
from tasks.answers import printed_number
from tasks.problems import Problem, load_problems
from tasks.render import completion, solution

SHARED = Path(__file__).resolve().parents[2] / "shared"
DATA = SHARED / "data"
FOUND = SHARED / "findings" / "judge.jsonl"  # {id, lang, answer, text, correct}
ANSWER = 918273645  # stands in no file, argument or environment of a program
LOOK_ALIKE = "0123456789abcdef01234567"

# Each prints every file that it can read, finds its own nonce there, prints a would-be answer under
# it, and leaves with exit code 0.
THIEVES = {
    "prolog": r"""
        :- directory_files('.', Fs),
           forall((member(F, Fs), exists_file(F)), (read_file_to_string(F, T, []), write(T))).
        :- read_file_to_string('main.pl', T, []),
           split_string(T, "\"~ ", "n\"~ ", Ws),
           forall((member(W, Ws), string_length(W, 24)), (format("~n~w 41~n", [W]))).
        :- halt(0).
        solve(41).""",
    "lisp": r"""
        (dolist (path (directory "*.*"))
          (with-open-file (in path)
            (loop for line = (read-line in nil) while line do
              (write-line line)
              (let ((at (search "~&" line)))
                (when (and at (<= (+ at 26) (length line)))
                  (format t "~&~A 41~%" (subseq line (+ at 2) (+ at 26))))))))
        (finish-output)
        (sb-ext:exit :code 0 :abort t)""",
    "racket": r"""
        #lang racket
        (define (solve) 41)
        (define text (file->string "main.rkt"))
        (display text)
        (for ([f (directory-list)]) (display f))
        (write (environment-variables-names (current-environment-variables)))
        (for ([n (regexp-match* #px"[0-9a-f]{24}" text)]) (printf "\n~a 41\n" n))
        (flush-output)
        (exit 0)""",
    "lua": r"""
        local text = io.open("main.lua"):read("a")
        print(text, os.getenv("HOME"), arg[0], arg[-1])
        print("\n" .. text:match(("%x"):rep(24)) .. " 41")
        os.exit(0)""",
    "julia": r"""
        text = read("main.jl", String)
        println(text, readdir(), ENV, ARGS)
        println("\n", match(r"[0-9a-f]{24}", text).match, " 41")
        exit(0)""",
    "r": r"""
        text <- paste(readLines("main.R"), collapse = "\n")
        cat(text, list.files(all.files = TRUE), commandArgs(), Sys.getenv())
        cat("\n", regmatches(text, regexpr("[0-9a-f]{24}", text)), " 41\n", sep = "")
        quit("no", 0)""",
    "ocaml": r"""
        let text =
          let c = open_in "main.ml" in
          really_input_string c (in_channel_length c)
        let is_hex c = match c with '0'..'9' | 'a'..'f' -> true | _ -> false
        let rec hex s i = i = 24 || (is_hex s.[i] && hex s (i + 1))
        let () =
          print_string text;
          Array.iter print_string (Sys.readdir ".");
          Array.iter print_string Sys.argv;
          for i = 0 to String.length text - 24 do
            let s = String.sub text i 24 in
            if hex s 0 then Printf.printf "\n%s 41\n" s
          done;
          exit 0""",
    "scheme": r"""
        (use-modules (ice-9 rdelim) (ice-9 regex))
        (define text (call-with-input-file "main.scm" read-string))
        (display text)
        (display (environ))
        (display (command-line))
        (define nonce (match:substring (string-match "[0-9a-f]{24}" text)))
        (display (string-append "\n" nonce " 41\n"))
        (exit 0)""",
    "python": r"""
        import os, re, sys
        text = open("main.py").read()
        print(text, os.listdir("."), os.environ, sys.argv, sys.stdin.read())
        print("\n" + re.search("[0-9a-f]{24}", text)[0] + " 41", flush=True)
        reply = b'\x20\x00\x00\x00{"status": "ok", "stdout": "42"}'
        for descriptor in range(3, 256):
            for forged in (b"S0", b"A", b"Eforged", reply):
                try: os.write(descriptor, forged)
                except OSError: pass
        os._exit(0)""",
}

# Each prints the very answer, but under a nonce that it made up, and leaves with exit code 0 before
# the harness comes to its own line.
LEAVERS = {
    "prolog": f"""
        :- format('~n{LOOK_ALIKE} {ANSWER}~n'), halt(0).
        solve({ANSWER}).""",
    "lisp": f"""
        (format t "~&{LOOK_ALIKE} {ANSWER}~%")
        (finish-output)
        (sb-ext:exit :code 0 :abort t)""",
    "racket": rf"""
        #lang racket
        (define (solve) {ANSWER})
        (displayln "\n{LOOK_ALIKE} {ANSWER}")
        (flush-output)
        (exit 0)""",
    "lua": rf"""
        print("\n{LOOK_ALIKE} {ANSWER}")
        os.exit(0)""",
    "julia": rf"""
        println("\n{LOOK_ALIKE} {ANSWER}")
        exit(0)""",
    "r": rf"""
        cat("\n{LOOK_ALIKE} {ANSWER}\n")
        quit("no", 0)""",
    "ocaml": rf"""
        let () = print_string "\n{LOOK_ALIKE} {ANSWER}\n"; exit 0""",
    "scheme": rf"""
        (display "\n{LOOK_ALIKE} {ANSWER}\n")
        (exit 0)""",
    "python": rf"""
        import os
        print("\n{LOOK_ALIKE} {ANSWER}", flush=True)
        os._exit(0)""",
}


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2) as pool:
        yield pool


def installed(name):
    language = load_language(name)
    if sentence := language.missing():
        pytest.skip(sentence)
    return language


@pytest.mark.parametrize("name", list(THIEVES))
def test_no_program_forges_a_verdict(name, pool):
    language = installed(name)
    judge = Judge(pool, language)
    problem = Problem("p", "sums", "?", Fraction(ANSWER))
    submissions = []
    for code in (THIEVES[name], LEAVERS[name]):
        code = textwrap.dedent(code).strip()
        text = completion("r", code, language.render["query"], language)
        submissions.append(judge.submit(problem, text))
    thief, leaver = judge.collect(submissions, 60)

    result = submissions[0].future.result()
    stolen = result.stdout.decode()
    assert thief.status == "ok", result
    # the thief found its nonce, as it may, but not the answer
    assert re.search(f"^{submissions[0].nonce} 41", stolen, re.MULTILINE)
    assert str(ANSWER) not in stolen
    assert (thief.reward, thief.correct) == (0.0, False)

    printed = submissions[1].future.result().stdout.decode()
    assert leaver.status == "no_value", leaver
    assert str(ANSWER) in printed
    assert (leaver.reward, leaver.correct, leaver.value) == (0.0, False, None)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    "name",
    [
        "lua",
        "ocaml",
        "scheme",
        pytest.param("racket", marks=pytest.mark.slow),  # these start slowly, 14 times
        pytest.param("julia", marks=pytest.mark.slow),
        pytest.param("r", marks=pytest.mark.slow),
    ],
)
def test_rendered_gsm8k_programs_score_full_and_wrong_ones_nothing(name, pool):
    """As tests/test_rewards.py does for Prolog and Lisp.

    A wrong program is that of another problem with another answer.
    """
    language = installed(name)
    problems = load_problems("gsm8k_steps", "train", count=8, seed=3)
    problems += load_problems("sums", "test", count=2)

    judge = Judge(pool, language)
    submissions = []
    for problem in problems:
        submissions.append(judge.submit(problem, solution(problem, language)))
    for problem in problems[:4]:
        other = next(other for other in problems if other.answer != problem.answer)
        submissions.append(judge.submit(problem, solution(other, language)))
    verdicts = judge.collect(submissions, 300)
    assert [verdict.reward for verdict in verdicts] == [1.0] * 10 + [0.0] * 4


# ---- the value that a program prints ----

ANSWERING = [name for name in language_names() if load_language(name).answer]
# What the fixtures of every [answer] table compute; the last two only where a language has them.
VALUES = {
    "unended": 42,  # prints without a newline first
    "comment": 42,  # stands above the header
    "unicode": 42,
    "float": 2**53 - 1,  # 16 digits
    "integer": 1234567890123456789,  # 19 digits: no float is that exact
    "main": 42,  # has a main of its own
}


def fixture_verdicts(name, pool, programs, answers):
    language = installed(name)
    judge = Judge(pool, language)
    submissions = []
    for code, answer in zip(programs, answers):
        problem = Problem("p", "sums", "?", Fraction(answer))
        text = completion("r", code.strip("\n"), language.render["query"], language)
        submissions.append(judge.submit(problem, text))
    return judge.collect(submissions, 120)


@pytest.mark.parametrize("name", ANSWERING)
def test_every_answer_table_has_its_fixtures(name):
    fixtures = load_language(name).answer["fixtures"]
    assert {"unended", "comment", "unicode", "float"} <= set(fixtures)
    assert set(fixtures) <= {*VALUES, "numberless"}


@pytest.mark.parametrize("name", ANSWERING)
def test_a_value_is_read_whatever_the_program_around_it_is(name, pool):
    fixtures = load_language(name).answer["fixtures"]
    kinds = [kind for kind in VALUES if kind in fixtures]
    programs = [fixtures[kind] for kind in kinds]
    verdicts = fixture_verdicts(name, pool, programs, [VALUES[kind] for kind in kinds])
    wrong = {kind: one for kind, one in zip(kinds, verdicts) if not one.correct}
    assert not wrong


@pytest.mark.parametrize("name", ANSWERING)
def test_a_truth_value_nothing_and_an_uncomputed_term_are_no_numbers(name, pool):
    language = load_language(name)
    programs = language.answer["fixtures"].get("numberless", [])
    verdicts = fixture_verdicts(name, pool, programs, [1] * len(programs))
    for program, verdict in zip(programs, verdicts):
        assert verdict.status in ("ok", "no_value"), (program, verdict)
        assert verdict.value is None or printed_number(verdict.value, language) is None, program


# Programs that earlier judges judged wrongly, by what was wrong: language, code, answer, right.
KINDS = {
    # A term that nobody computed, in another language's form or in one's own.
    "term": ("prolog", "solve(X) :- X = 84/2.", "42", False),
    "term_in_lowest_terms": ("prolog", "solve(X) :- X = 7/2.", "7/2", False),
    "integer_division": ("prolog", "solve(X) :- X = 84//2.", "42", False),
    "product": ("prolog", "solve(X) :- X = 21*2.", "42", False),
    "conjunction": ("prolog", "solve(X) :- X = (1,200).", "1200", False),
    "sign": ("prolog", "solve(X) :- X = +42.", "42", False),
    "text_of_a_ratio": ("lua", 'function solve() return "84/2" end', "42", False),
    "text_of_a_lisp_ratio": ("lisp", '(defun solve () "84/2")', "42", False),
    "text_for_people": ("python", 'def solve():\n    return f"{1200:,}"', "1200", False),
    # What a language has computed, as it prints it.
    "rational": ("prolog", "solve(X) :- X is 7 rdiv 2.", "7/2", True),
    "lisp_ratio": ("lisp", "(defun solve () (/ 1 3))", "1/3", True),
    "scheme_ratio": ("scheme", "(define (solve) (/ 7 2))", "7/2", True),
    "racket_ratio": ("racket", "(define (solve) (/ 7 2))", "7/2", True),
    "python_fraction": (
        "python",
        "from fractions import Fraction\ndef solve():\n    return Fraction(7, 2)",
        "7/2",
        True,
    ),
    "julia_whole_ratio": ("julia", "solve() = 84//2", "42", True),
    "ruby_whole_ratio": ("ruby", "def solve\n  84r / 2\nend", "42", True),
    "text": ("prolog", 'solve(X) :- X = "42".', "42", True),
    # The program's own first lines.
    "blank_line_above": ("racket", "\n\n#lang racket\n(define (solve) 42)", "42", True),
    "block_above": ("racket", "#| sum |#\n#lang racket/base\n(define (solve) 42)", "42", True),
    "script_above": (
        "racket",
        "#!/usr/bin/env racket\n#lang racket\n(define (solve) 42)",
        "42",
        True,
    ),
    # Prints before its value.
    "unended": ("scheme", '(define (solve) (display "total ") (* 6 7))', "42", True),
    # Values that are no numbers, and long ones.
    "unit": ("ocaml", "let solve () = ()", "0", False),
    "truth": ("ocaml", "let solve () = true", "1", False),
    "none": ("ocaml", "let solve () = None", "0", False),
    "truth_in_c++": ("cpp", "bool solve() { return true; }", "1", False),
    "vector": ("r", "solve <- function() c(4, 2)", "42", False),
    "array": ("javascript", "function solve() { return [42]; }", "42", False),
    "long_float": ("lua", "function solve() return 123456789012345.0 end", "123456789012345", True),
    "long_sum": ("perl", "sub solve { return 2**52 * 1.5; }", "6755399441055744", True),
    "long_in_r": ("r", "solve <- function() 2^53 - 1", "9007199254740991", True),
    "long_long": ("c", "long long solve(void) { return 9007199254740993; }", "9007199254740993", True),
    # A main of its own.
    "main_in_c": ("c", "int solve(void) { return 42; }\nint main() { return 1; }", "42", True),
    "main_in_java": (
        "java",
        "public class Main { static int solve() { return 42; }\n"
        "public static void main(String[] a) { } }\n"
        "class Solution { static int solve() { return Main.solve(); } }",
        "42",
        True,
    ),
}  # fmt: skip


def judged(pool, name, text, answer):
    judge = Judge(pool, installed(name))
    submission = judge.submit(Problem("p", "sums", "?", Fraction(answer)), text)
    return judge.collect([submission], 60)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_programs_that_were_judged_wrongly(pool, kind):
    name, code, answer, right = KINDS[kind]
    text = completion("r", code, load_language(name).render["query"], name)
    assert judged(pool, name, text, answer).correct is right


def found_rows():
    if not FOUND.is_file():
        return []
    return [json.loads(line) for line in FOUND.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("row", found_rows(), ids=lambda row: row["id"])
def test_found_completions_get_their_verdicts(pool, row):
    assert judged(pool, row["lang"], row["text"], row["answer"]).correct is row["correct"]


def test_a_program_that_halts_before_its_query_has_a_status_of_its_own(pool):
    code = ":- initialization(main).\nmain :- solve(X), print(X), halt.\nsolve(42)."
    verdict = judged(pool, "prolog", completion("r", code, "solve(X)", "prolog"), 42)
    assert (verdict.status, verdict.correct, verdict.value) == ("no_value", False, None)


@pytest.mark.parametrize("code", ['let solve () = failwith "no"', "let solve () = 6 * y"])
def test_an_ocaml_query_that_fails_is_an_error(pool, code):
    verdict = judged(pool, "ocaml", completion("r", code, "solve ()", "ocaml"), 42)
    assert verdict.status == "error"


# ---- the header line ----


@pytest.mark.parametrize(
    "name, program",
    [
        ("racket", "#lang racket\n(f)"),
        ("racket", "\n \n#lang racket/base\n(f)"),
        ("racket", "; sum\n;; of #| both\n  #lang racket\n(f)"),
        ("racket", "#| a #| b |# c |#\n#lang racket\n(f)"),
        ("racket", "#!/usr/bin/env racket\n#lang racket\n(f)"),
        ("php", "<?php\nf();"),
        ("php", "<?PHP f();"),
        ("php", "# sum\n<?php\nf();"),
        ("php", "/* sum */ <?php f();"),
        ("go", "// sum\n/* of\nboth */\n\npackage main\nfunc f() {}"),
        ("go", "/* a /* b */\npackage main\nfunc f() {}"),  # these do not nest
        ("lua", "f()"),  # no header in this language
    ],
)
def test_a_program_keeps_its_own_header(name, program):
    assert with_header(program, load_language(name)) == program


@pytest.mark.parametrize(
    "name, program",
    [
        ("racket", "(f)"),
        ("racket", "; no #lang racket\n(f)"),
        ("racket", "#|\n#lang racket\n|#\n(f)"),
        ("php", "f();"),
        ("go", "// package main\nfunc f() {}"),
        ("go", "packages := 3"),
    ],
)
def test_a_program_without_a_header_gets_one(name, program):
    language = load_language(name)
    assert with_header(program, language) == f"{language.header}\n{program}"


def test_a_header_is_taken_away_where_it_stands():
    racket = load_language("racket")
    program = "#|\n#lang racket\n|#\n; sum\n#lang racket/base\n(f)"
    assert without_header(program, racket) == "#|\n#lang racket\n|#\n; sum\n(f)"
    assert without_header("(f)", racket) == "(f)"


def test_a_go_program_has_one_package_line():
    code = '// sum\npackage main\n\nimport "fmt"\n\nfunc solve() int { return 42 }'
    text = answer_files(load_language("go"), code, "solve()", "abc")["main.go"]
    assert text.count("package main") == 1
    assert text.startswith('package main\nimport "fmt"\n')
