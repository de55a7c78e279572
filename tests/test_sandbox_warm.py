"""A warm Prolog gives the same results as a cold start."""

import os
import re
import shutil
import tempfile
import tomllib
from pathlib import Path

import pytest

from rewards import answer_files
from sandbox import Job, Limits, Pool
from sandbox.languages import find_program, load_language
from tasks.problems import load_problems
from tasks.render import solution

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data"
PROLOG = load_language("prolog")
pytestmark = pytest.mark.skipif(PROLOG.missing() is not None, reason=str(PROLOG.missing()))
FULL = bool(os.environ.get("SANDBOX_FULL"))

PROGRAMS = [
    # how it ends
    "main :- writeln(42).",
    "main :- fail.",
    "main :- throw(oops).",
    "main :- halt(3).",
    ":- halt(0).",
    # goals that run while it is loaded
    ":- initialization(main).\nmain :- writeln(1).",
    ":- initialization(main, main).\nmain :- writeln(1).",
    ":- initialization((writeln(a), halt)).\nmain :- writeln(b).",
    # what is wrong with it, and what it says
    "main :- foo(X), writeln(X).",
    "main :- writeln(a)\nfoo(.\nmain :- writeln(b).",
    "no_main.",
    "",
    "main :- X = 1, writeln(Y).",
    ":- foo(bar).\nmain :- true.",
    # input, output, the built-in library
    "main :- read(X), Y is X * 2, print(Y), nl.",
    "main :- read_term(user_input, X, []), print(X), read(Y), print(Y).",
    "main :- numlist(1, 20, L), sumlist(L, S), foldl([X,A,B]>>(B is A + X), L, 0, T), "
    "maplist([X,Y]>>(Y is X * 2), L, M), print(S-T-M).",
    "main :- atom_length(X, _).",
    "main :- format('~a ~d ~2f ~q~n', [x, 3, 2.5, 'A b']), format('~d~n', [x]).",
    "main :- catch(call_with_time_limit(0.05, (repeat, fail)), E, (print(E), nl)).",
    "main :- length(L, 3), aggregate_all(count, member(_, L), C), nb_setval(k, C), "
    "nb_getval(k, V), print(V).",
    'main :- string_concat(X, Y, "ab"), print(X-Y), nl, fail.\nmain.',
    "main :- tab(3), print(a), nl, write_canonical([a-'B c', \"s\", 0'a]), nl, "
    "print_message(error, format(hello, [])).",
    'main :- split_string("a,b,c", ",", "", P), print(P), nl, succ_or_fail.\n'
    "succ_or_fail :- succ(X, 0), print(X).",
    # what it sees of its surroundings
    "main :- forall(member(F, [argv, os_argv, associated_file, signals, gc_thread, verbose, "
    "toplevel_goal, stack_limit, encoding, bounded]), ((current_prolog_flag(F, V) -> true ; "
    "V = none), print(F = V), nl)).",
    "main :- forall(member(S, [user_input, user_output, user_error]), (findall(P, "
    "(stream_property(S, P), P \\= position(_)), L), print(S - L), nl)).",
    "main :- getenv('HOME', H), working_directory(W, W), print(H - W), nl, (getenv('USER', "
    "U) -> print(U) ; print(none)).",
    "main :- open('out.txt', write, S), write(S, hello), close(S), "
    "read_file_to_string('out.txt', T, []), print(T).",
    # threads and garbage
    "main :- thread_create(print(child), T), thread_join(T), thread_self(M), print(M), "
    "findall(X, thread_property(X, status(_)), L), length(L, N), print(N).",
    "main :- garbage_collect, garbage_collect_atoms, statistics(atoms, A), "
    "(A > 0 -> print(yes) ; true), print(done).",
    # libraries, loaded and not
    ":- use_module(library(clpfd)).\nmain :- X #> 3, X #< 6, findall(X, label([X]), L), print(L).",
    ":- use_module(library(clpfd)).\n"
    "main :- length(Q, 6), Q ins 1..6, all_different(Q), once(label(Q)), print(Q), X #= foo.",
    ":- use_module(library(clpq)).\nmain :- {2 * X + 1 = 4}, print(X).",
    ":- use_module(library(clpr)).\nmain :- {2 * X + 1 = 4}, print(X).",
    "main :- X #= 3, print(X).",
    ":- use_module(library(dcg/basics)).\nmain :- phrase((whites, integer(X)), `  42`), print(X).",
    ":- use_module(library(nowhere)).\nmain :- print(1).",
    # definitions, and input again
    "dup(1).\nother(1).\ndup(2).\nmain :- forall(dup(X), print(X)).",
    "p(X) :- q(X).\nmain :- p(1).\n:- dynamic q/1.",
    "f(N, [N|T]) :- M is N + 1, f(M, T).\nmain :- f(0, X), print(X).",
    "main :- tnot_defined, print(1).\nmain :- print(2).",
    "writeln(_) :- print(mine).\nmain :- writeln(1).",
    ":- module(m, [main/0]).\nmain :- print(in_module).",
    "main :- consult('extra.pl'), extra(X), print(X).",
    "main :- random_between(1, 6, X), (between(1, 6, X) -> print(yes) ; print(no)).",
    "main :- print_message_lines(user_error, 'x ', []), prompt(_, ''), "
    "read_line_to_string(user_input, L), print(L).",
    "main :- A = f(A), print(A), nl, copy_term(A, B), (A = B -> print(same) ; print(other)).",
    "main :- tabled(30, X), print(X).\n"
    ":- table tabled/2.\n"
    "tabled(0, 0).\n"
    "tabled(1, 1).\n"
    "tabled(N, X) :- N > 1, A is N-1, B is N-2, tabled(A, P), tabled(B, Q), X is P+Q.",
]


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=2, cache=False) as pool:
        yield pool


def different(pool, programs, stdin=b""):
    """Run all programs warm and cold. Returns those that differ, with both outcomes."""
    limits = Limits(cpu=3.0)
    warm = pool.run_all([Job("prolog", files, stdin, limits) for files in programs])
    # a command of its own is never run warm, even when it is the usual one
    cold = pool.run_all([Job("prolog", files, stdin, limits, run=PROLOG.run) for files in programs])
    found = []
    for program, one, other in zip(programs, warm, cold, strict=True):
        if outcome(one) != outcome(other):
            found.append((program, outcome(one), outcome(other)))
    return found


def outcome(result):
    """All of a result but what no two launchers share.

    That is the work folder, names of fresh variables, numbers such as stack depths in messages.
    """
    stdout, stderr = anonymous(result.stdout), anonymous(result.stderr)
    stderr = re.sub(rb"\d[\d,]*|\s+", b" ", stderr)
    return result.status, result.exit_code, result.signal, stdout, stderr


def anonymous(text):
    text = re.sub(rb"\b_\d+", b"_", text)
    return re.sub(rb"/[^\s']*rarecode-\w+/\w+", b"WORK", text)


def test_same_results_on_programs_of_every_kind(pool):
    programs = [{"main.pl": text, "extra.pl": "extra(7)."} for text in PROGRAMS]
    found = different(pool, programs, b'21.\nfoo(Bar, "x").\n')
    assert not found, found[:3]


def test_same_results_on_the_hostile_programs(pool):
    table = tomllib.loads((HERE / "hostile" / "prolog.toml").read_text())
    names = ("processes", "files", "network", "leave_while_loading", "halt_at_load", "environment")
    found = different(pool, [{"main.pl": table[name]["source"]} for name in names])
    assert not found, found


def test_same_results_on_rendered_solutions(pool):
    problems = load_problems("sums", "train", count=60)
    if DATA.is_dir():
        problems += load_problems("gsm8k_steps", "train", count=1_000_000 if FULL else 60)
    programs = []
    for problem in problems:
        _, code, query = re.split(r"</?code>", solution(problem, "prolog"))
        query = re.search(r"<query>\s*(.*?)\s*</query>", query, re.DOTALL)[1]
        programs.append(answer_files(PROLOG, code, query, "nonce"))
    found = different(pool, programs)
    assert len(programs) >= 60
    assert not found, found[:3]


def test_a_program_leaves_nothing_for_the_next(pool):
    """State, flags, operators and files of one warm program are unknown to the next."""
    first = (
        ":- dynamic user:left/1.\n"
        "main :- assertz(user:left(1)), nb_setval(k, 1), op(700, xfx, ===>), "
        "set_prolog_flag(double_quotes, atom), tell(left), told."
    )
    second = (
        "main :- (catch(left(_), _, fail) -> print(bad) ; true), "
        "(nb_current(k, _) -> print(bad) ; true), "
        "(current_op(_, _, ===>) -> print(bad) ; true), "
        "(exists_file(left) -> print(bad) ; true), "
        "current_prolog_flag(double_quotes, F), print(F)."
    )
    for _ in range(2):
        sources = (first, first, second, second)
        results = pool.run_all([Job("prolog", {"main.pl": source}) for source in sources])
        assert [result.status for result in results] == ["ok"] * 4
        assert [result.stdout for result in results[2:]] == [b"string"] * 2


def test_warm_is_really_warm(pool):
    """CPU time tells: library(clpfd) alone takes 100 ms to load."""
    program = {"main.pl": ":- use_module(library(clpfd)).\nmain :- X #= 6 * 7, print(X)."}
    pool.run_all([Job("prolog", program)] * 4)  # both launchers are warm now
    warm = pool.run_all([Job("prolog", program)])[0]
    cold = pool.run_all([Job("prolog", program, run=PROLOG.run)])[0]
    assert warm.stdout == cold.stdout == b"42"
    assert warm.cpu < cold.cpu / 4


def test_falls_back_to_cold(monkeypatch):
    """A swipl whose libswipl cannot be found starts cold."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # programs of root run as another user
    program = folder / "swipl"
    swipl = find_program("swipl", ("swipl",))
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --dump-runtime-variables ] && exit 1\n'  # this says where libswipl is
        f'exec {swipl} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("RARECODE_SWIPL", str(program))
    find_program.cache_clear()
    with Pool(workers=1, level="portable", require="portable") as pool:
        result = pool.run_all([Job("prolog", {"main.pl": "main :- print(42)."})])[0]
    find_program.cache_clear()
    shutil.rmtree(folder)
    assert (result.status, result.stdout) == ("ok", b"42"), result
