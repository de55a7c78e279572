"""Runs hostile programs through the sandbox and looks for damage. Needs only the standard library, so that any user can run it.

python tests/hostile/attack.py                      every attack at kernel level
python tests/hostile/attack.py --level namespaces --language python --only fork
python tests/hostile/attack.py --soak 500           honest and hostile programs mixed
Prints one JSON line per attack or finding and a summary; exit code 1 when something was wrong.
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
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from world import World, processes, stop, strays, users  # noqa: E402

from sandbox import Job, Limits, Pool  # noqa: E402
from sandbox.languages import load_language  # noqa: E402
from sandbox.pool import cores, request  # noqa: E402

HONEST = {  # the last three also look whether the program before them left something in the work folder
    "lua": "print(6 * 7)",
    "lisp": "(princ (* 6 7))",
    "prolog": "main :- directory_files('.', L), subtract(L, ['.', '..', 'main.pl'], []), X is 6 * 7, writeln(X).",
    "python": "import os; print(6 * 7 if os.listdir() == ['main.py'] else os.listdir())",
    "perl": "print join(',', glob('* .[!.]*')) eq 'main.pl' ? 6 * 7 : 'left something'",
}


def attacks(languages=None, only=None, scale=1.0):
    """(name, language, source, limits, expected statuses) of every hostile program whose interpreter is here.

    scale: factor on the time limits; below 1 the attacks marked as slow are left out.
    """
    for path in sorted(HERE.glob("*.toml")):
        language = load_language(path.stem)
        if (languages and path.stem not in languages) or language.missing():
            continue
        table = tomllib.loads(path.read_text())
        prelude = table.pop("prelude", "")
        for name, attack in table.items():
            if (only and only not in name) or (scale < 1 and attack.get("slow")):
                continue
            own = vars(language.limits) | {
                key: attack[key] for key in ("cpu", "wall", "memory", "processes") if key in attack
            }
            own |= {key: own[key] * scale for key in ("cpu", "wall") if own[key]}
            yield (
                f"{path.stem}/{name}",
                path.stem,
                prelude + attack["source"].lstrip("\n"),
                Limits(**own),
                attack["status"],
            )


def hostile_job(language, source, limits, words):
    for word, value in words.items():
        source = source.replace(word, value)
    return Job(language, {load_language(language).file: source}, limits=limits)


def honest_job(language):
    return Job(language, {load_language(language).file: HONEST[language]})


def honest_languages():
    return [language for language in HONEST if not load_language(language).missing()]


def busy():
    """CPU seconds that this machine has spent so far, on whatever, those that a host took from it included."""
    words = (
        Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    )  # user, nice, system, idle, iowait, irq, softirq, steal
    return sum(int(word) for place, word in enumerate(words) if place not in (3, 4)) / os.sysconf(
        "SC_CLK_TCK"
    )


class Stalls(threading.Thread):
    """Seconds during which this machine stood still: a thread that only sleeps woke up late (virtual machines whose host gives memory slowly)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seconds, self.stopped = 0.0, False
        self.start()

    def run(self):
        while not self.stopped:
            started = time.monotonic()
            time.sleep(0.01)
            late = time.monotonic() - started - 0.01
            self.seconds += late if late > 0.05 else 0.0


def own(pool):
    """CPU seconds of this process, of the launchers and of the programs that they ran."""
    total = sum(os.times()[:4])
    for pid in pool.launcher_pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def faults(result, limits, cpu, wall, expected, secret):
    """What is wrong with the result of a hostile program that should have ended after `cpu` and `wall` seconds at the latest."""
    found = []
    output = (result.stdout + result.stderr).decode(errors="replace")
    if result.status not in expected:
        found.append(f"status {result.status}, not one of {expected}")
    if "ESCAPED" in result.stdout.decode(errors="replace") or secret in output:
        found.append(
            f"it got out: {[line for line in output.splitlines() if 'ESCAPED' in line or secret in line][:5]}"
        )
    if result.wall > wall + 0.5:
        found.append(f"took {result.wall:.2f} s, more than its limit of {wall:.2f} s + 0.5 s")
    if result.cpu > cpu + 0.5:
        found.append(f"used {result.cpu:.2f} s of CPU, more than its limit of {cpu:.2f} s + 0.5 s")
    if len(result.stdout) > limits.output or len(result.stderr) > limits.output:
        found.append("more output than allowed")
    return found


def run_attacks(level, languages, only, scale):
    """One hostile program after another, each followed by an honest one. Yields (name, seconds, status, faults)."""
    with World() as world, Pool(workers=1, level=level, require=level, cache=False) as pool:
        known, honest, stalls = processes({os.getuid()}), honest_languages(), Stalls()
        retries = 0
        for number, (name, language, source, limits, expected) in enumerate(
            attacks(languages, only, scale)
        ):
            job = hostile_job(language, source, limits, world.words())
            started, others, stood = time.monotonic(), busy() - own(pool), stalls.seconds
            result = pool.run_all([job])[0]
            stood = stalls.seconds - stood
            others = (
                max(0.0, busy() - own(pool) - others) + stood
            )  # a busy machine gives a program more time
            stages = json.loads(request(job)[0])["stages"]
            cpu, wall = (
                sum(stage["cpu"] for stage in stages) + cores() * stood,
                sum(stage["wall"] for stage in stages) + others,
            )
            late = ["wall_limit"] * (others > 1)  # too busy to use up its CPU time
            found = (
                faults(result, limits, cpu, wall, expected + late, world.secret) + world.damage()
            )
            if left := strays(users(pool), [*known, *pool.launcher_pids]):
                found.append(f"processes left: {left}")
                stop(left)
            if pool.retries > retries:
                found.append(f"the launcher was lost: {result.stderr[:300]}")
                retries = pool.retries
            after = pool.run_all([honest_job(honest[number % len(honest)])])[0]
            if (after.status, after.stdout.strip()) != ("ok", b"42"):
                found.append(f"the next honest program failed: {after}")
            if found:
                found.append(f"output: {result.stdout[-300:]} {result.stderr[-300:]}")
            yield name, time.monotonic() - started, result.status, found
        folder, stalls.stopped = pool._folder, True
    if os.path.exists(folder):
        yield "work folders", 0, "", [f"{folder} is still there"]


def soak(level, count, seed, workers, scale):
    """`count` programs, a third hostile, on several launchers at once. Yields like run_attacks."""
    chance = random.Random(seed)
    with World() as world, Pool(workers=workers, level=level, require=level, cache=False) as pool:
        known = processes({os.getuid()})
        hostile, honest = list(attacks(scale=scale)), honest_languages()
        jobs, checks = [], []
        for _ in range(count):
            if chance.random() < 1 / 3:
                name, language, source, limits, expected = chance.choice(hostile)
                jobs.append(hostile_job(language, source, limits, world.words()))
                checks.append((name, limits, expected))
            else:
                language = chance.choice(honest)
                jobs.append(honest_job(language))
                checks.append((f"honest {language}", None, None))
        started = time.monotonic()
        results = pool.run_all(jobs)
        seconds = time.monotonic() - started
        for (name, limits, expected), result in zip(checks, results, strict=True):
            if limits is None:
                found = (
                    []
                    if (result.status, result.stdout.strip()) == ("ok", b"42")
                    else [f"wrong: {result}"]
                )
            else:
                found = [
                    fault
                    for fault in faults(result, limits, 300, 300, expected, world.secret)
                    if not fault.startswith("status")
                ]
                if result.status == "sandbox_error":
                    found.append(f"sandbox error: {result.stderr[:300]}")
            yield name, result.wall, result.status, found
        left = strays(users(pool), [*known, *pool.launcher_pids])
        stop(left)
        lost = (
            [f"{pool.retries} retries, {pool.replaced} launchers replaced"] if pool.retries else []
        )
        yield "soak", seconds, "", world.damage() + [f"processes left: {left}"] * bool(left) + lost
        folder = pool._folder
    if os.path.exists(folder):
        yield "work folders", 0, "", [f"{folder} is still there"]


def main():
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
    options = parser.parse_args()
    if os.getuid() != 0:  # an outer limit, should the sandbox fail
        resource.setrlimit(resource.RLIMIT_NPROC, (1500, 1500))
    started, count, wrong = time.monotonic(), 0, 0
    if options.soak:
        rows = soak(options.level, options.soak, options.seed, options.workers, options.scale)
    else:
        rows = run_attacks(options.level, options.language, options.only, options.scale)
    for name, seconds, status, found in rows:
        count, wrong = count + 1, wrong + bool(found)
        if found or not options.soak:
            print(
                json.dumps(
                    {"name": name, "seconds": round(seconds, 2), "status": status, "faults": found}
                ),
                flush=True,
            )
    print(
        json.dumps(
            {
                "level": options.level,
                "user": os.getuid(),
                "programs": count,
                "wrong": wrong,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
