"""Training rewards through the sandbox: right programs of GSM8K in the languages of the loop, and programs that forge a verdict."""

import re
import textwrap
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import Judge
from sandbox import Pool
from sandbox.languages import load_language
from tasks.problems import Problem, load_problems
from tasks.render import completion, solution

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ANSWER = 918273645  # stands in no file, argument or environment of a program
LOOK_ALIKE = "0123456789abcdef01234567"

# Each prints every file that it can read, finds its own nonce there, prints a would-be answer under it, and leaves with exit code 0.
THIEVES = {
    "prolog": r"""
        :- directory_files('.', Fs), forall((member(F, Fs), exists_file(F)), (read_file_to_string(F, T, []), write(T))).
        :- read_file_to_string('main.pl', T, []), split_string(T, "\"~ ", "n\"~ ", Ws), forall((member(W, Ws), string_length(W, 24)), (format("~n~w 41~n", [W]))).
        :- halt(0).
        solve(41).""",
    "lisp": r"""
        (dolist (path (directory "*.*")) (with-open-file (in path) (loop for line = (read-line in nil) while line do (write-line line)
          (let ((at (search "~&" line))) (when at (format t "~&~A 41~%" (subseq line (+ at 2) (+ at 26))))))))
        (finish-output) (sb-ext:exit :code 0 :abort t)""",
    "racket": r"""
        #lang racket
        (define (solve) 41)
        (define text (file->string "main.rkt"))
        (display text) (for ([f (directory-list)]) (display f)) (write (environment-variables-names (current-environment-variables)))
        (for ([n (regexp-match* #px"[0-9a-f]{24}" text)]) (printf "\n~a 41\n" n))
        (flush-output) (exit 0)""",
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
        let text = let c = open_in "main.ml" in really_input_string c (in_channel_length c)
        let rec hex s i = i = 24 || ((match s.[i] with '0'..'9' | 'a'..'f' -> true | _ -> false) && hex s (i + 1))
        let () = print_string text; Array.iter print_string (Sys.readdir "."); Array.iter print_string Sys.argv;
          for i = 0 to String.length text - 24 do let s = String.sub text i 24 in if hex s 0 then Printf.printf "\n%s 41\n" s done; exit 0""",
    "scheme": r"""
        (use-modules (ice-9 rdelim) (ice-9 regex))
        (define text (call-with-input-file "main.scm" read-string))
        (display text) (display (environ)) (display (command-line))
        (display (string-append "\n" (match:substring (string-match "[0-9a-f]{24}" text)) " 41\n"))
        (exit 0)""",
    "python": r"""
        import os, re, sys
        text = open("main.py").read()
        print(text, os.listdir("."), os.environ, sys.argv, sys.stdin.read())
        print("\n" + re.search("[0-9a-f]{24}", text)[0] + " 41", flush=True)
        for descriptor in range(3, 256):
            for forged in (b"S0", b"A", b"Eforged", b'\x20\x00\x00\x00{"status": "ok", "stdout": "42"}'):
                try: os.write(descriptor, forged)
                except OSError: pass
        os._exit(0)""",
}
# Each prints the very answer, but under a nonce that it made up, and leaves with exit code 0 before the harness comes to its own line.
LEAVERS = {
    "prolog": f":- format('~n{LOOK_ALIKE} {ANSWER}~n'), halt(0).\nsolve({ANSWER}).",
    "lisp": f'(format t "~&{LOOK_ALIKE} {ANSWER}~%") (finish-output) (sb-ext:exit :code 0 :abort t)',
    "racket": f'#lang racket\n(define (solve) {ANSWER})\n(displayln "\\n{LOOK_ALIKE} {ANSWER}") (flush-output) (exit 0)',
    "lua": f'print("\\n{LOOK_ALIKE} {ANSWER}") os.exit(0)',
    "julia": f'println("\\n{LOOK_ALIKE} {ANSWER}"); exit(0)',
    "r": f'cat("\\n{LOOK_ALIKE} {ANSWER}\\n"); quit("no", 0)',
    "ocaml": f'let () = print_string "\\n{LOOK_ALIKE} {ANSWER}\\n"; exit 0',
    "scheme": f'(display "\\n{LOOK_ALIKE} {ANSWER}\\n") (exit 0)',
    "python": f'import os\nprint("\\n{LOOK_ALIKE} {ANSWER}", flush=True)\nos._exit(0)',
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
    judge, problem = Judge(pool, language), Problem("p", "sums", "?", Fraction(ANSWER))
    texts = [
        completion("r", textwrap.dedent(code).strip(), language.render["query"], language)
        for code in (THIEVES[name], LEAVERS[name])
    ]
    submissions = [judge.submit(problem, text) for text in texts]
    thief, leaver = judge.collect(submissions, 60)
    printed = submissions[0].future.result().stdout.decode()
    assert thief.status == leaver.status == "ok", (submissions[0].future.result(), leaver)
    assert re.search(f"^{submissions[0].nonce} 41", printed, re.MULTILINE), (
        "the thief found its nonce, as it may"
    )
    assert str(ANSWER) not in printed and (thief.reward, thief.correct) == (0.0, False)
    assert (leaver.reward, leaver.correct, leaver.value) == (0.0, False, None)
    assert str(ANSWER) in submissions[1].future.result().stdout.decode()


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", ["racket", "lua", "julia", "r", "ocaml", "scheme"])
def test_rendered_gsm8k_programs_score_full_and_wrong_ones_nothing(name, pool):
    """As tests/test_rewards.py does for Prolog and Lisp; a wrong program is that of another problem with another answer."""
    language = installed(name)
    problems = load_problems("gsm8k_steps", "train", count=8, seed=3) + load_problems(
        "sums", "test", count=2
    )
    others = [
        next(other for other in problems if other.answer != problem.answer) for problem in problems
    ]
    judge = Judge(pool, language)
    pairs = [
        (problem, solution(source, language))
        for source in (problems, others[:4])
        for problem, source in zip(problems, source)
    ]
    verdicts = judge.collect(
        [
            judge.submit(replace(problem, id=f"{n}"), text)
            for n, (problem, text) in enumerate(pairs)
        ],
        300,
    )
    assert [
        (v.problem, v.reward)
        for v in verdicts
        if v.reward != (1.0 if int(v.problem) < len(problems) else 0.0)
    ] == []
