"""What running a program costs: per language and isolation level, cold and warm, beside a bare subprocess.run, and a whole training step.

    python -m bench sandbox                          all languages that are here, a few minutes; wants an idle machine
    python -m bench sandbox --language lua --language prolog --seconds 5
    python -m bench sandbox --step 1024              only the step: that many programs, 5 % of them endless loops

CPU ms per program is the figure to trust: it counts program, launcher and the trainer's own thread, and hardly depends on what else the
machine does. Programs/s is wall-clock with one program per core at a time.
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

from sandbox import Job, Pool
from sandbox.languages import language_names, load_language
from sandbox.pool import cores
from sandbox.probe import LEVELS, available_level, probe

# Programs that print 42 and little else, so that what is measured is the start; other languages run the `pass` of their fixtures.
SMALL = {
    "prolog": "main :- X is 6 * 7, writeln(X).",
    "prolog + lists, yall": "main :- numlist(1, 6, L), foldl([X, A, B]>>(B is A + 2 * X), L, 0, S), writeln(S).",
    "prolog + clpfd": ":- use_module(library(clpfd)).\nmain :- X #= 6 * 7, writeln(X).",
    "lisp": "(princ (* 6 7))",
    "lua": "print(6 * 7)",
    "racket": "#lang racket/base\n(display (* 6 7))",
    "racket, full": "#lang racket\n(display (* 6 7))",
}
WORKERS = cores()
TARGETS = {  # programs per core-second at the kernel level, reference machine's 2 cores
    ("lua", "cold"): 200,
    ("lisp", "cold"): 100,
    ("prolog", "cold"): 60,
    ("prolog", "warm"): 200,
    ("prolog + clpfd", "warm"): 150,
}
OVERHEAD = {"kernel": 4.0, "namespaces": 8.0}  # CPU ms over the bare subprocess
LOOP = "main :- catch(spin, _, true), main.\nspin :- spin."


# ---- what is measured ----


def cpu_seconds(pids=()):
    """CPU seconds so far of this process, of its children that ended, and of running processes with the children they waited for."""
    total = sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf(
            "SC_CLK_TCK"
        )  # utime, stime, cutime, cstime
    return total


def measure(run_many, seconds, pids=lambda: ()):
    """{cpu_ms, per_second} of one program. run_many(n) runs n programs; as many as fit into `seconds`, at least 2 per core."""
    run_many(WORKERS)  # file caches, and what launchers prepare once
    started = time.perf_counter()
    run_many(2 * WORKERS)
    count = max(2 * WORKERS, int(seconds * 2 * WORKERS / (time.perf_counter() - started)))
    before, started = cpu_seconds(pids()), time.perf_counter()
    run_many(count)
    wall, cpu = time.perf_counter() - started, cpu_seconds(pids()) - before
    return {"cpu_ms": 1000 * cpu / count, "per_second": count / wall, "programs": count}


def bare(name, source, seconds):
    """subprocess.run with captured output and nothing else: no limits, no isolation, no clean-up but the folder's."""
    language = load_language(name)
    stages, stdin = language.stages(), language.fixtures.get("stdin", "").encode()

    def once(_):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, language.file).write_text(source)
            for stage in stages:
                environment = stage["environment"] | {"HOME": folder, "TMPDIR": folder}
                command = [*stage["argv"]]
                if not os.path.isabs(command[0]):
                    command[0] = os.path.join(folder, command[0])
                ran = subprocess.run(
                    command,
                    cwd=folder,
                    env=environment,
                    input=stdin,
                    capture_output=True,
                    timeout=60,
                    check=True,
                )
        assert ran.stdout.split() == [b"42"], ran

    with ThreadPoolExecutor(WORKERS) as threads:
        return measure(lambda count: list(threads.map(once, range(count))), seconds)


def sandboxed(name, source, level, warm, seconds):
    """The same program through a pool. Cold for Prolog means its plain command line."""
    language = load_language(name)
    run = None if warm or not language.warm else language.run
    job = Job(name, {language.file: source}, language.fixtures.get("stdin", "").encode(), run=run)

    def run_many(count):
        for result in pool.run([job] * count):
            assert (result.status, result.stdout.split()) == ("ok", [b"42"]), result

    with Pool(WORKERS, level, require="portable", cache=False) as pool:
        return measure(run_many, seconds, lambda: pool.launcher_pids)


def step(count, warm):
    """One training step's programs at the kernel level: `count` of Prolog, each another, 5 % endless loops with the language's limit of 1 s."""
    language, jobs = load_language("prolog"), []
    for number in range(count):
        loops = number % 20 == 7
        source = f"% {number}\n{LOOP}" if loops else f"main :- X is {number} * 7, writeln(X)."
        jobs.append(
            Job(
                "prolog",
                {"main.pl": source},
                id=None if loops else number,
                run=None if warm else language.run,
            )
        )
    with Pool(WORKERS, cache=False) as pool:
        pool.run_all(jobs[:WORKERS])
        before, started = cpu_seconds(pool.launcher_pids), time.perf_counter()
        results = list(pool.run(jobs))
        wall, cpu = time.perf_counter() - started, cpu_seconds(pool.launcher_pids) - before
    honest = [result for result in results if result.id is not None]
    wrong = sum(
        (result.status, result.stdout.strip()) != ("ok", str(7 * result.id).encode())
        for result in honest
    )
    loops = [result for result in results if result.id is None]
    in_loops = sum(result.cpu for result in loops)
    return {
        "programs": count,
        "loops": len(loops),
        "wall_s": wall,
        "cpu_s": cpu,
        "loops_cpu_s": in_loops,
        "honest_cpu_ms": 1000 * (cpu - in_loops) / len(honest),
        "honest_wrong": wrong,
        "loops_not_ended_by_limit": sum(result.status != "cpu_limit" for result in loops),
    }


# ---- the table ----


def cases(languages):
    """(row name, language, source) of what is here."""
    for name in languages:
        language = load_language(name)
        if sentence := language.missing():
            print(f"{name:<22} {sentence}")
            continue
        named = {
            row: text for row, text in SMALL.items() if row.split(" +")[0].split(",")[0] == name
        }
        for row, source in (named or {name: language.fixtures["pass"]}).items():
            yield row, name, source


def measure_language(row, name, source, levels, seconds):
    """{column: figures} of one row, printed as it comes."""
    figures = {"bare": bare(name, source, seconds)}
    for level in levels:
        figures[level] = sandboxed(name, source, level, False, seconds)
    if load_language(name).warm:
        for level in levels[1:]:
            figures[f"{level}, warm"] = sandboxed(name, source, level, True, seconds)
    columns = ["bare", *levels, *(f"{level}, warm" for level in levels[1:])]
    cells = [
        f"{figures[c]['cpu_ms']:8.1f} {figures[c]['per_second']:7.0f}/s"
        if c in figures
        else " " * 18
        for c in columns
    ]
    print(f"{row:<22} " + " ".join(cells), flush=True)
    return figures


def verdicts(rows):
    """[(target, measured, met)] of the sandbox's targets."""
    found = []
    for (row, start), target in TARGETS.items():
        column = "kernel" if start == "cold" else "kernel, warm"
        if column in rows.get(row, {}):
            rate = 1000 / rows[row][column]["cpu_ms"]
            found.append(
                (f"{row}, {start}: programs per core-second >= {target}", rate, rate >= target)
            )
    for row in ("lua", "prolog", "lisp"):
        for level, target in OVERHEAD.items():
            if level in rows.get(row, {}):
                over = rows[row][level]["cpu_ms"] - rows[row]["bare"]["cpu_ms"]
                found.append(
                    (
                        f"{row}, {level}: CPU ms over a bare subprocess <= {target:.0f}",
                        over,
                        over <= target,
                    )
                )
    for column, target in (("kernel", 5.0), ("kernel, warm", 1.5)):
        if column in rows.get("prolog", {}):
            seconds = 4096 * rows["prolog"][column]["cpu_ms"] / 1000 / 16
            found.append(
                (
                    f"4,096 prolog programs on 16 cores, {column}: s <= {target} (CPU time / 16)",
                    seconds,
                    seconds <= target,
                )
            )
    return found


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
    best = available_level(probe())[0]
    levels = [
        level
        for level in LEVELS[: LEVELS.index(best) + 1]
        if not options.level or level in ("portable", *options.level)
    ]
    print(
        f"{platform.system()} {platform.release()}, {platform.machine()}, {WORKERS} cores, Python {platform.python_version()}, user {os.getuid()}"
    )
    rows = {}
    if not options.step:
        print(
            "CPU ms per program and programs/s: "
            + " | ".join(["bare", *levels, *(f"{level}, warm" for level in levels[1:])])
        )
        for row, name, source in cases(options.language or language_names()):
            rows[row] = measure_language(row, name, source, levels, options.seconds)
    checks = verdicts(rows)
    for target, measured, met in checks:
        print(f"{'met   ' if met else 'MISSED'} {target}: {measured:.1f}")
    steps = {}
    if options.step != 0 and load_language("prolog").missing() is None and "kernel" in levels:
        for start in ("cold", "warm"):
            steps[start] = step(options.step or 1024, start == "warm")
            print(
                f"step, {start}: "
                + ", ".join(f"{key} {round(value, 1)}" for key, value in steps[start].items()),
                flush=True,
            )
    print(json.dumps({"cores": WORKERS, "rows": rows, "targets": checks, "step": steps}))


if __name__ == "__main__":
    main()
