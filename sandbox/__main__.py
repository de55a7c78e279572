"""Run programs from the shell.

python -m sandbox doctor                        what works here, and how to get what does not
python -m sandbox run --lang prolog main.pl     run one program ("-" or nothing: from stdin)
python -m sandbox run --jobs jobs.jsonl         one result line per job line ("-": from stdin)

A job line: {"id", "lang", "source" or "files": {name: text}, "stdin",
"limits": {"cpu", "wall", "memory", "output"}}; only lang and a program are needed.
A result line, in the order of the jobs: {"id", "status", "stdout", "stderr", "exit_code", "signal",
"cpu", "wall", "peak_memory", "level", "truncated"}.
A line that is not a job gives {"id", "line", "error"} and the rest goes on.
"""

import argparse
import collections
import json
import os
import platform
import statistics
import sys
from dataclasses import fields, replace
from pathlib import Path

from sandbox import Job, Limits, Pool, SandboxError
from sandbox.languages import language_names, load_language
from sandbox.probe import LEVELS, available_level, probe

ADVICE = {
    "no_new_privs": "Linux 3.5 or newer",
    "landlock": "Linux 5.13 or newer with Landlock switched on (boot option lsm=landlock,...); "
    "gVisor has none",
    "seccomp": "a Linux kernel with seccomp filters, on x86_64 or aarch64",
    "pid namespace": "user namespaces: sysctl kernel.unprivileged_userns_clone=1 or "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined. "
    "The kernel level does without",
    "process guard": "seccomp notification, not taken by a container manager; without it fork "
    "bombs of a normal user's programs are only watched",
    "private files": "as namespaces; without it a look every 0.1 s bounds what a program writes, "
    "and it cannot change modes and times of its files",
}
JOB_KEYS = ("id", "lang", "source", "files", "stdin", "limits")


# ---- doctor ----


def doctor():
    """Print what works on this machine, and how to get what does not."""
    found = probe()
    best, lacking = available_level(found)
    print(
        f"{platform.system()} {platform.release()} on {platform.machine()}, "
        f"Landlock interface {found.get('abi', 0)}, user {_user(found)}"
    )
    if platform.machine() == "aarch64":
        print("note: the system-call table for aarch64 has not been tested on a machine")

    isolation = [best]
    if lacking:
        isolation.append(lacking)
    if best == "portable":
        isolation.append("portable is no security boundary")
    print("isolation:", "; ".join(isolation))
    for means, advice in ADVICE.items():
        reason = found.get(means, "not tried")
        works = "ok" if reason is None else f"no: {reason} (needs {advice})"
        print(f"  {means:<14} {works}")

    level = "kernel" if best == "namespaces" else best  # what Pool() takes by default
    print(f"\nlanguages at level {level} (CPU and wall time of a small program, median of 3):")
    packages = set()
    with Pool(workers=1, level=level, require="portable", cache=False) as pool:
        for name in language_names():
            language = load_language(name)
            if sentence := language.missing():
                print(f"  {name:<11} missing: {sentence}")
                packages.update(language.install.get("debian", "").split())
            else:
                print(f"  {name:<11} {_examine(pool, language)}")
    if packages:
        needed = " ".join(sorted(packages))
        print(f"\nfor all that is missing: apt-get install --no-install-recommends {needed}")


def _user(found):
    if not hasattr(os, "geteuid"):
        return "unknown"
    if os.geteuid() != 0:
        return str(os.geteuid())
    if found.get("separate user"):
        return "root (each launcher's programs run as a user of their own)"
    return "root (programs keep this user, without capabilities)"


def _examine(pool, language):
    """How long its test program took and which version it is, or what went wrong."""
    program = {language.file: language.fixtures["pass"]}
    stdin = language.fixtures.get("stdin", "").encode()
    results = pool.run_all([Job(language.name, program, stdin)] * 3)
    right = [result.status == "ok" and result.stdout.split() == [b"42"] for result in results]
    if not all(right):
        last = results[-1]
        said = last.stderr.decode(errors="replace").strip() or "no output"
        first = said.splitlines()[0][:150]
        return f"is here but its test program ended with {last.status}: {first}"

    cpu = 1000 * statistics.median(result.cpu for result in results)
    wall = 1000 * statistics.median(result.wall for result in results)
    return f"{cpu:5.0f} ms {wall:5.0f} ms  {_version(pool, language)}"


def _version(pool, language):
    """The first line with a digit of what its version command prints."""
    if not language.version:
        return "no version command"
    limits = replace(language.limits, cpu=10.0)
    job = Job(language.name, {}, limits=limits, run=language.version)
    result = pool.submit(job).result()
    said = (result.stdout + result.stderr).decode(errors="replace")
    for line in said.splitlines():
        if any(character.isdigit() for character in line):
            return line.strip()[:70]
    return "unknown version"


# ---- run ----


def run(options):
    """Run one program, or the jobs of a file, as the command line says."""
    require = options.level or "kernel"
    with Pool(options.workers, options.level, require, options.allow_weaker) as pool:
        if not options.jobs:
            run_file(pool, options)
        elif options.jobs == "-":
            run_lines(pool, sys.stdin)
        else:
            with open(options.jobs, encoding="utf-8", errors="replace") as lines:
                run_lines(pool, lines)


def run_file(pool, options):
    """Run one program and print its result line."""
    if options.file == "-":
        source = sys.stdin.read()
    else:
        source = Path(options.file).read_text(encoding="utf-8", errors="replace")

    given = {}
    for name in ("cpu", "wall", "memory", "output"):
        value = getattr(options, name)
        if value is not None:
            given[name] = value
    limits = _limits(options.lang, given)
    stdin = Path(options.stdin).read_bytes() if options.stdin else b""
    files = {load_language(options.lang).file: source}
    job = Job(options.lang, files, stdin, limits)
    print(result_line(pool.submit(job).result()))


def run_lines(pool, lines):
    """Print one line per line of `lines`, in order, each when it and all before it are done."""
    waiting = collections.deque()  # of futures and of finished error lines
    for number, line in enumerate(lines, 1):
        if line.strip():
            waiting.append(_submit(pool, number, line))
        # No more than 16 jobs per worker are read ahead.
        while waiting and (len(waiting) > 16 * pool.workers or _is_done(waiting[0])):
            print(_text(waiting.popleft()), flush=True)
    for item in waiting:
        print(_text(item), flush=True)


def _submit(pool, number, line):
    """Future of a job line, or the error line."""
    name = None
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            name = row.get("id")
        return pool.submit(_job(row))
    except (ValueError, TypeError, RecursionError) as error:
        said = str(error)
        if isinstance(error, json.JSONDecodeError):
            said = f"not valid JSON: {error}"
        return json.dumps({"id": name, "line": number, "error": said})


def _is_done(item):
    return isinstance(item, str) or item.done()


def _text(item):
    return item if isinstance(item, str) else result_line(item.result())


def _job(row):
    """Job of a job line; ValueError with one sentence when it is not one."""
    if not isinstance(row, dict) or not isinstance(row.get("lang"), str):
        raise ValueError('a job is a JSON object with at least "lang" and "source" or "files"')
    unknown = sorted(set(row) - set(JOB_KEYS))
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r}: a job has id, lang, source or files, stdin, limits"
        )

    if "files" in row:
        files = row["files"]
    else:
        files = {load_language(row["lang"]).file: row.get("source")}
    are_files = isinstance(files, dict) and bool(files)
    if not are_files or not all(isinstance(text, str) for text in files.values()):
        raise ValueError('"source" must be text, and "files" an object of texts by file name')

    stdin = row.get("stdin") or ""
    limits = row.get("limits") or {}
    if not isinstance(stdin, str) or not isinstance(limits, dict):
        raise ValueError('"stdin" must be text and "limits" an object')
    return Job(
        lang=row["lang"],
        files=files,
        stdin=stdin.encode("utf-8", "replace"),
        limits=_limits(row["lang"], limits),
        id=row.get("id"),
    )


def _limits(name, given):
    """The language's own limits with the given ones in their place."""
    known = [entry.name for entry in fields(Limits)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown limit {unknown[0]!r}: choose from {', '.join(known)}")
    return replace(load_language(name).limits, **given)


def result_line(result):
    """A Result as a line of JSON, its id and status first."""
    row = {"id": result.id, **vars(result)}
    row["stdout"] = result.stdout.decode(errors="replace")
    row["stderr"] = result.stderr.decode(errors="replace")
    return json.dumps(row)


def main(arguments=None):
    options = parse(arguments)
    try:
        if options.command == "doctor":
            doctor()
        else:
            run(options)
    except BrokenPipeError:  # who reads our output has gone; Python must not complain at its end
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (SandboxError, ValueError, OSError) as problem:
        sys.exit(f"python -m sandbox: {problem}")


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m sandbox",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what works here")

    command = commands.add_parser("run", help="run programs")
    command.add_argument("file", nargs="?", default="-", help="a program; - or nothing: from stdin")
    command.add_argument("--lang", help="its language")
    command.add_argument("--jobs", help="a file of job lines, or - for stdin")
    command.add_argument("--stdin", metavar="FILE", help="what the program reads")
    command.add_argument("--workers", type=int, help="programs at a time (default: the cores)")
    command.add_argument(
        "--level",
        choices=LEVELS,
        help="isolation (default kernel; portable is no security boundary)",
    )
    command.add_argument(
        "--allow-weaker",
        action="store_true",
        help="go on with less isolation when the machine cannot give it",
    )
    command.add_argument("--cpu", type=float, help="limit: seconds")
    command.add_argument("--wall", type=float, help="limit: seconds")
    command.add_argument("--memory", type=int, help="limit: bytes")
    command.add_argument("--output", type=int, help="limit: bytes")

    options = parser.parse_args(arguments)
    if options.command == "run" and not (options.lang or options.jobs):
        parser.error("run needs --lang, or --jobs")
    return options


if __name__ == "__main__":
    main()
