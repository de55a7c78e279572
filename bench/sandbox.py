"""What running a program costs, beside a bare subprocess.run, and a whole training step.

    python -m bench sandbox                  all languages that are here; wants an idle machine
    python -m bench sandbox --language lua --language prolog --seconds 5
    python -m bench sandbox --step 1024      only the step: so many programs, 5 % endless loops

Per language and isolation level, cold (an interpreter of its own) and warm (one that has loaded its
libraries). CPU ms per program is the figure to trust: it counts program, launcher and the trainer's
own thread, and hardly depends on what else the machine does. Programs/s is wall-clock with one
program per core at a time.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sandbox import Job, Pool
from sandbox.languages import language_names, load_language
from sandbox.pool import cores
from sandbox.probe import LEVELS, available_level, probe

# Programs that print 42 and little else, so that what is measured is the start. The first word is
# the language; languages that are not here run the `pass` of their fixtures.
SMALL = {
    "prolog": "main :- X is 6 * 7, writeln(X).",
    "prolog + lists, yall": (
        "main :- numlist(1, 6, L), foldl([X, A, B]>>(B is A + 2 * X), L, 0, S), writeln(S)."
    ),
    "prolog + clpfd": ":- use_module(library(clpfd)).\nmain :- X #= 6 * 7, writeln(X).",
    "lisp": "(princ (* 6 7))",
    "lua": "print(6 * 7)",
    "racket": "#lang racket/base\n(display (* 6 7))",
    "racket, full": "#lang racket\n(display (* 6 7))",
}
LOOP = "main :- catch(spin, _, true), main.\nspin :- spin."
WORKERS = cores()

# Programs per core-second at the kernel level, on the reference machine's 2 cores.
RATE_TARGETS = {
    ("lua", "cold"): 200,
    ("lisp", "cold"): 100,
    ("prolog", "cold"): 60,
    ("prolog", "warm"): 200,
    ("prolog + clpfd", "warm"): 150,
}
OVERHEAD_TARGETS = {"kernel": 4.0, "namespaces": 8.0}  # CPU ms over the bare subprocess
STEP_TARGETS = {"kernel": 5.0, "kernel, warm": 1.5}  # seconds for 4,096 programs on 16 cores


class Spent(NamedTuple):
    """What some work took."""

    wall: float
    cpu: float  # seconds of this process, its children and the launchers
    result: object


class Check(NamedTuple):
    """A target of the sandbox, and whether it was met."""

    target: str
    measured: float
    met: bool


# ---- the clock ----


def measure(run_many, seconds, pids=lambda: ()):
    """{cpu_ms, per_second, programs} of one program.

    run_many(n) runs n programs: as many as fit into `seconds`, at least 2 per core.
    """
    run_many(WORKERS)  # file caches, and what launchers prepare once
    first = spent(lambda: run_many(2 * WORKERS), pids)
    count = max(2 * WORKERS, int(seconds * 2 * WORKERS / first.wall))

    found = spent(lambda: run_many(count), pids)
    return {
        "cpu_ms": 1000 * found.cpu / count,
        "per_second": count / found.wall,
        "programs": count,
    }


def spent(work, pids):
    """What work() takes. pids(): the running processes whose CPU time counts as well."""
    before, started = cpu_seconds(pids()), time.perf_counter()
    result = work()
    wall, cpu = time.perf_counter() - started, cpu_seconds(pids()) - before
    return Spent(wall, cpu, result)


def cpu_seconds(pids):
    """CPU seconds so far of this process, of its children that ended, and of running processes.

    A running process counts with the children that it waited for.
    """
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for pid in pids:
        # Behind the name in parentheses; then utime, stime, cutime, cstime in ticks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


# ---- what is measured ----


def bare(name, source, seconds):
    """subprocess.run with captured output and nothing else: no limits, no isolation."""
    language = load_language(name)
    stages = language.stages()
    stdin = language.fixtures.get("stdin", "").encode()

    def run_once(_):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, language.file).write_text(source)
            for stage in stages:
                program, *words = stage["argv"]
                if not os.path.isabs(program):
                    program = os.path.join(folder, program)
                ran = subprocess.run(
                    [program, *words],
                    cwd=folder,
                    env=stage["environment"] | {"HOME": folder, "TMPDIR": folder},
                    input=stdin,
                    capture_output=True,
                    timeout=60,
                    check=True,
                )
        assert ran.stdout.split() == [b"42"], ran

    with ThreadPoolExecutor(WORKERS) as threads:
        return measure(lambda count: list(threads.map(run_once, range(count))), seconds)


def sandboxed(name, source, level, warm, seconds):
    """The same program through a pool. Cold for Prolog means its plain command line."""
    language = load_language(name)
    command = None if warm or not language.warm else language.run
    stdin = language.fixtures.get("stdin", "").encode()
    job = Job(name, {language.file: source}, stdin, run=command)

    def run_many(count):
        for result in pool.run([job] * count):
            assert (result.status, result.stdout.split()) == ("ok", [b"42"]), result

    with Pool(WORKERS, level, require="portable", cache=False) as pool:
        return measure(run_many, seconds, lambda: pool.launcher_pids)


def measure_step(count, warm):
    """One training step's programs at the kernel level: `count` of Prolog, each another.

    5 % are endless loops, which end at the language's limit of 1 s.
    """
    language = load_language("prolog")
    command = None if warm else language.run
    jobs = []
    for number in range(count):
        if number % 20 == 7:
            files = {"main.pl": f"% {number}\n{LOOP}"}
            jobs.append(Job("prolog", files, id=None, run=command))
        else:
            files = {"main.pl": f"main :- X is {number} * 7, writeln(X)."}
            jobs.append(Job("prolog", files, id=number, run=command))

    with Pool(WORKERS, cache=False) as pool:
        pool.run_all(jobs[:WORKERS])
        found = spent(lambda: list(pool.run(jobs)), lambda: pool.launcher_pids)

    honest = [result for result in found.result if result.id is not None]
    loops = [result for result in found.result if result.id is None]
    cpu_in_loops = sum(result.cpu for result in loops)
    wrong = 0
    for result in honest:
        printed = str(7 * result.id).encode()
        wrong += (result.status, result.stdout.strip()) != ("ok", printed)
    return {
        "programs": count,
        "loops": len(loops),
        "wall_s": found.wall,
        "cpu_s": found.cpu,
        "loops_cpu_s": cpu_in_loops,
        "honest_cpu_ms": 1000 * (found.cpu - cpu_in_loops) / len(honest),
        "honest_wrong": wrong,
        "loops_not_ended_by_limit": sum(result.status != "cpu_limit" for result in loops),
    }


# ---- the table ----


def measure_languages(names, levels, seconds):
    """{row: {column: figures}} of every program, printed as it comes; what is missing is said."""
    warm = [f"{level}, warm" for level in levels[1:]]
    columns = ["bare", *levels, *warm]
    print(f"CPU ms per program and programs/s: {' | '.join(columns)}")

    rows = {}
    for name in names:
        language = load_language(name)
        if sentence := language.missing():
            print(f"{name:<22} {sentence}")
            continue
        for row, source in programs_of(language).items():
            rows[row] = measure_program(language, source, levels, seconds)
            cells = [cell(rows[row].get(column)) for column in columns]
            print(f"{row:<22} " + " ".join(cells), flush=True)
    return rows


def programs_of(language):
    """{row name: source} of a language's small programs."""
    found = {}
    for row, source in SMALL.items():
        if row.replace(",", " ").split()[0] == language.name:
            found[row] = source
    return found or {language.name: language.fixtures["pass"]}


def measure_program(language, source, levels, seconds):
    """{column: figures} of one program."""
    figures = {"bare": bare(language.name, source, seconds)}
    for level in levels:
        figures[level] = sandboxed(language.name, source, level, False, seconds)
    if language.warm:
        for level in levels[1:]:
            figures[f"{level}, warm"] = sandboxed(language.name, source, level, True, seconds)
    return figures


def cell(figures):
    if figures is None:
        return " " * 18
    return f"{figures['cpu_ms']:8.1f} {figures['per_second']:7.0f}/s"


def check_targets(rows):
    """Checks of the sandbox's targets for which there is a figure."""
    checks = []
    for (row, start), target in RATE_TARGETS.items():
        column = "kernel" if start == "cold" else "kernel, warm"
        if column in rows.get(row, {}):
            rate = 1000 / rows[row][column]["cpu_ms"]
            text = f"{row}, {start}: programs per core-second >= {target}"
            checks.append(Check(text, rate, rate >= target))

    for row in ("lua", "prolog", "lisp"):
        for level, target in OVERHEAD_TARGETS.items():
            if level in rows.get(row, {}):
                over = rows[row][level]["cpu_ms"] - rows[row]["bare"]["cpu_ms"]
                text = f"{row}, {level}: CPU ms over a bare subprocess <= {target:.0f}"
                checks.append(Check(text, over, over <= target))

    for column, target in STEP_TARGETS.items():
        if column in rows.get("prolog", {}):
            seconds = 4096 * rows["prolog"][column]["cpu_ms"] / 1000 / 16
            text = f"4,096 prolog programs on 16 cores, {column}: s <= {target} (CPU time / 16)"
            checks.append(Check(text, seconds, seconds <= target))
    return checks


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench sandbox",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--language", action="append", help="only this one (again for more)")
    parser.add_argument(
        "--level", action="append", choices=LEVELS, help="only this one beside portable"
    )
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    parser.add_argument(
        "--step", type=int, metavar="PROGRAMS", help="only the training step; 0: none"
    )
    options = parser.parse_args(arguments)

    best, _ = available_level(probe())
    levels = list(LEVELS[: LEVELS.index(best) + 1])
    if options.level:
        levels = [level for level in levels if level in ("portable", *options.level)]
    print(
        f"{platform.system()} {platform.release()}, {platform.machine()}, {WORKERS} cores, "
        f"Python {platform.python_version()}, user {os.getuid()}"
    )

    rows = {}
    if not options.step:
        names = options.language or language_names()
        rows = measure_languages(names, levels, options.seconds)
    checks = check_targets(rows)
    for check in checks:
        print(f"{'met   ' if check.met else 'MISSED'} {check.target}: {check.measured:.1f}")

    steps = {}
    if options.step != 0 and load_language("prolog").missing() is None and "kernel" in levels:
        for start in ("cold", "warm"):
            steps[start] = measure_step(options.step or 1024, start == "warm")
            figures = [f"{key} {round(value, 1)}" for key, value in steps[start].items()]
            print(f"step, {start}: {', '.join(figures)}", flush=True)
    print(json.dumps({"cores": WORKERS, "rows": rows, "targets": checks, "step": steps}))


if __name__ == "__main__":
    main()
