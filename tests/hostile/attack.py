"""Runs hostile programs through the sandbox and looks for damage.

python tests/hostile/attack.py                      every attack at kernel level
python tests/hostile/attack.py --level namespaces --language python --only fork
python tests/hostile/attack.py --soak 500           honest and hostile programs mixed

Needs only the standard library, so that any user can run it. Prints one JSON line per attack or
finding and a summary; exit code 1 when something was wrong.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import sys
import threading
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from world import World, processes, stop, strays, users

from sandbox import Job, Limits, Pool
from sandbox.languages import load_language
from sandbox.pool import cores, request

HONEST = {  # the last three also look whether the program before them left something
    "lua": "print(6 * 7)",
    "lisp": "(princ (* 6 7))",
    "prolog": "main :- directory_files('.', L), subtract(L, ['.', '..', 'main.pl'], []), "
    "X is 6 * 7, writeln(X).",
    "python": "import os; print(6 * 7 if os.listdir() == ['main.py'] else os.listdir())",
    "perl": "print join(',', glob('* .[!.]*')) eq 'main.pl' ? 6 * 7 : 'left something'",
}
CLOCK = os.sysconf("SC_CLK_TCK")
GRACE = 0.5  # seconds beyond a limit


@dataclass
class Attack:
    """A hostile program."""

    name: str
    language: str
    source: str
    files: dict[str, str]  # others than the main one
    limits: Limits
    expected: list[str]  # statuses


@dataclass
class Row:
    """What is printed about an attack, or about a run as a whole."""

    name: str
    seconds: float
    status: str
    faults: list[str]


def main():
    options = parse()
    if os.getuid() != 0:  # an outer limit, should the sandbox fail
        resource.setrlimit(resource.RLIMIT_NPROC, (1500, 1500))
    if options.soak:
        rows = soak(options.level, options.soak, options.seed, options.workers, options.scale)
    else:
        rows = run_attacks(options.level, options.language, options.only, options.scale)

    started = time.monotonic()
    count = 0
    wrong = 0
    for row in rows:
        count += 1
        wrong += bool(row.faults)
        if row.faults or not options.soak:
            print(json.dumps(vars(row) | {"seconds": round(row.seconds, 2)}), flush=True)
    summary = {
        "level": options.level,
        "user": os.getuid(),
        "programs": count,
        "wrong": wrong,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))
    sys.exit(bool(wrong))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", default="kernel")
    parser.add_argument("--language", action="append")
    parser.add_argument("--only", help="part of the names to run")
    parser.add_argument("--soak", type=int, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on time limits; below 1 without the slow attacks",
    )
    return parser.parse_args()


# ---- the programs ----


def attacks(languages=None, only=None, scale=1.0):
    """Every Attack whose interpreter is here.

    languages, only: names of languages, part of the names to choose; None: all.
    scale: factor on the time limits; below 1 the attacks marked as slow are left out.
    """
    for path in sorted(HERE.glob("*.toml")):
        language = load_language(path.stem)
        if (languages and path.stem not in languages) or language.missing():
            continue
        table = tomllib.loads(path.read_text())
        prelude = table.pop("prelude", "")
        for name, entry in table.items():
            if (only and only not in name) or (scale < 1 and entry.get("slow")):
                continue
            yield Attack(
                name=f"{path.stem}/{name}",
                language=path.stem,
                source=prelude + entry["source"].lstrip("\n"),
                files=entry.get("files", {}),
                limits=limits_of(entry, language, scale),
                expected=entry["status"],
            )


def limits_of(entry, language, scale):
    """The language's limits, with those of the attack in their place and the times scaled."""
    given = {}
    for key in ("cpu", "wall", "memory", "processes"):
        if key in entry:
            given[key] = entry[key]
    limits = replace(language.limits, **given)
    wall = limits.wall * scale if limits.wall else limits.wall
    return replace(limits, cpu=limits.cpu * scale, wall=wall)


def hostile_job(attack, words):
    """words: what the @WORDS@ in it stand for."""
    files = {load_language(attack.language).file: attack.source, **attack.files}
    for word, value in words.items():
        files = {name: text.replace(word, value) for name, text in files.items()}
    return Job(attack.language, files, limits=attack.limits)


def honest_job(language):
    return Job(language, {load_language(language).file: HONEST[language]})


def honest_languages():
    return [language for language in HONEST if not load_language(language).missing()]


# ---- how busy the machine is ----


def busy():
    """CPU seconds that this machine has spent so far, on whatever.

    Those that a host took from it included.
    """
    first = Path("/proc/stat").read_text().split("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / CLOCK


def own(pool):
    """CPU seconds of this process, of the launchers and of the programs that they ran."""
    total = sum(os.times()[:4])
    for pid in pool.launcher_pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / CLOCK  # user and system, with its children
    return total


class Stalls(threading.Thread):
    """Seconds during which this machine stood still.

    A thread that only sleeps woke up late: virtual machines whose host gives memory slowly.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.seconds = 0.0
        self.stopped = False
        self.start()

    def run(self):
        while not self.stopped:
            started = time.monotonic()
            time.sleep(0.01)
            late = time.monotonic() - started - 0.01
            if late > 0.05:
                self.seconds += late


# ---- one after another ----


def run_attacks(level, languages, only, scale):
    """One hostile program after another, each followed by an honest one. Yields Rows."""
    with World() as world, Pool(workers=1, level=level, require=level, cache=False) as pool:
        known = processes({os.getuid()})
        honest = honest_languages()
        stalls = Stalls()
        retries = 0
        for number, attack in enumerate(attacks(languages, only, scale)):
            started = time.monotonic()
            result, found = run_attack(attack, pool, world, stalls)
            if left := strays(users(pool), [*known, *pool.launcher_pids]):
                found.append(f"processes left: {left}")
                stop(left)
            if pool.retries > retries:
                found.append(f"the launcher was lost: {result.stderr[:300]}")
                retries = pool.retries

            language = honest[number % len(honest)]
            after = pool.submit(honest_job(language)).result()
            if not is_right(after):
                found.append(f"the next honest program failed: {after}")
            if found:
                found.append(f"output: {result.stdout[-300:]} {result.stderr[-300:]}")
            yield Row(attack.name, time.monotonic() - started, result.status, found)
        stalls.stopped = True
    yield from folders_left(pool)


def run_attack(attack, pool, world, stalls):
    """Run it: (Result, what was wrong). A busy machine gives a program more time."""
    job = hostile_job(attack, world.words())
    others = busy() - own(pool)
    stood = stalls.seconds
    result = pool.submit(job).result()
    stood = stalls.seconds - stood
    others = max(0.0, busy() - own(pool) - others) + stood

    stages = json.loads(request(job).message)["stages"]
    cpu = sum(stage["cpu"] for stage in stages) + cores() * stood
    wall = sum(stage["wall"] for stage in stages) + others
    expected = list(attack.expected)
    if others > 1:  # too busy to use up its CPU time
        expected.append("wall_limit")

    found = []
    if result.status not in expected:
        found.append(f"status {result.status}, not one of {expected}")
    found += faults(result, attack.limits, cpu, wall, world.secret)
    return result, found + world.damage()


def faults(result, limits, cpu, wall, secret):
    """What is wrong with the result of a hostile program.

    cpu, wall: seconds after which it should have ended at the latest.
    """
    found = []
    stdout = result.stdout.decode(errors="replace")
    output = (result.stdout + result.stderr).decode(errors="replace")
    if "ESCAPED" in stdout or secret in output:
        lines = [line for line in output.splitlines() if "ESCAPED" in line or secret in line]
        found.append(f"it got out: {lines[:5]}")
    if result.wall > wall + GRACE:
        found.append(f"took {result.wall:.2f} s, more than its limit of {wall:.2f} s + {GRACE} s")
    if result.cpu > cpu + GRACE:
        used = f"{result.cpu:.2f} s of CPU"
        found.append(f"used {used}, more than its limit of {cpu:.2f} s + {GRACE} s")
    if len(result.stdout) > limits.output or len(result.stderr) > limits.output:
        found.append("more output than allowed")
    return found


def is_right(result):
    return (result.status, result.stdout.strip()) == ("ok", b"42")


def folders_left(pool):
    if os.path.exists(pool.folder):
        yield Row("work folders", 0, "", [f"{pool.folder} is still there"])


# ---- all at once ----


def soak(level, count, seed, workers, scale):
    """`count` programs, a third hostile, on several launchers at once. Yields Rows."""
    chance = random.Random(seed)
    with World() as world, Pool(workers=workers, level=level, require=level, cache=False) as pool:
        known = processes({os.getuid()})
        hostile = list(attacks(scale=scale))
        honest = honest_languages()
        jobs = []
        chosen = []  # an Attack, or the language of an honest program
        for _ in range(count):
            if chance.random() < 1 / 3:
                attack = chance.choice(hostile)
                jobs.append(hostile_job(attack, world.words()))
                chosen.append(attack)
            else:
                language = chance.choice(honest)
                jobs.append(honest_job(language))
                chosen.append(language)

        started = time.monotonic()
        results = pool.run_all(jobs)
        seconds = time.monotonic() - started
        for choice, result in zip(chosen, results, strict=True):
            yield soak_row(choice, result, world.secret)

        found = world.damage()
        if left := strays(users(pool), [*known, *pool.launcher_pids]):
            found.append(f"processes left: {left}")
            stop(left)
        if pool.retries:
            found.append(f"{pool.retries} retries, {pool.replaced} launchers replaced")
        yield Row("soak", seconds, "", found)
    yield from folders_left(pool)


def soak_row(choice, result, secret):
    """How a program of the soak did; times and statuses depend on its neighbours."""
    if isinstance(choice, Attack):
        name = choice.name
        found = faults(result, choice.limits, 300, 300, secret)
        if result.status == "sandbox_error":
            found.append(f"sandbox error: {result.stderr[:300]}")
    else:
        name = f"honest {choice}"
        found = [] if is_right(result) else [f"wrong: {result}"]
    return Row(name, result.wall, result.status, found)


if __name__ == "__main__":
    main()
