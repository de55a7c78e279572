"""python -m sandbox doctor                          what works on this machine, and how to get what does not
python -m sandbox run --lang prolog main.pl        run one program ("-" or nothing: from stdin), print a JSON result
python -m sandbox run --jobs jobs.jsonl            one result line per job line, in order ("-": from stdin)

A job line: {"id", "lang", "source" or "files": {name: text}, "stdin", "limits": {"cpu", "wall", "memory", "output"}}; only lang and a program
are needed. A result line: {"id", "status", "stdout", "stderr", "exit_code", "signal", "cpu", "wall", "peak_memory", "level", "truncated"}.
A line that is no job gives {"id", "line", "error"} and the rest goes on.
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
    "landlock": "Linux 5.13 or newer with Landlock switched on (boot option lsm=landlock,...); gVisor has none",
    "seccomp": "a Linux kernel with seccomp filters, on x86_64 or aarch64",
    "pid namespace": "user namespaces: sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; in Docker "
    "--security-opt seccomp=unconfined. The kernel level does without",
    "process guard": "seccomp notification, not taken by a container manager; without it fork bombs of a normal user's programs are only watched",
    "private tmpfs": "as namespaces; without it the work folder is bounded by a look every 0.1 s",
}


# ---- doctor ----


def doctor():
    found = probe()
    best, lacking = available_level(found)
    print(
        f"{platform.system()} {platform.release()} on {platform.machine()}, Landlock interface {found.get('abi', 0)}, user {_user()}"
    )
    if platform.machine() == "aarch64":
        print("note: the system-call table for aarch64 has not been tested on a machine")
    print(
        f"isolation: {best}"
        + (f"; {lacking}" if lacking else "")
        + ("" if best != "portable" else "; portable is no security boundary")
    )
    for means, advice in ADVICE.items():
        reason = found.get(means, "not tried")
        print(f"  {means:<14} {'ok' if reason is None else f'no: {reason} (needs {advice})'}")
    level = best if best != "namespaces" else "kernel"  # what Pool() takes by default
    print(f"\nlanguages at level {level} (CPU and wall time of a small program, median of 3):")
    with Pool(workers=1, level=level, require="portable", cache=False) as pool:
        missing = [name for name in language_names() if not _examine(pool, load_language(name))]
    packages = [
        load_language(name).install["debian"]
        for name in missing
        if load_language(name).install.get("debian")
    ]
    if packages:
        print(
            f"\nfor all that is missing: apt-get install --no-install-recommends {' '.join(sorted(set(' '.join(packages).split())))}"
        )


def _user():
    if not hasattr(os, "geteuid"):
        return "unknown"
    if os.geteuid() != 0:
        return str(os.geteuid())
    own = (
        "each launcher's programs run as a user of their own"
        if probe().get("separate user")
        else "programs keep this user, without capabilities"
    )
    return f"root ({own})"


def _examine(pool, language):
    """Print one line about a language; False when its interpreter is missing."""
    if sentence := language.missing():
        print(f"  {language.name:<11} missing: {sentence}")
        return False
    program = {language.file: language.fixtures["pass"]}
    results = pool.run_all(
        [Job(language.name, program, language.fixtures.get("stdin", "").encode())] * 3
    )
    good = all(result.status == "ok" and result.stdout.split() == [b"42"] for result in results)
    cpu, wall = (
        1000 * statistics.median(getattr(result, name) for result in results)
        for name in ("cpu", "wall")
    )
    print(
        f"  {language.name:<11} {cpu:5.0f} ms {wall:5.0f} ms  {_version(pool, language)}"
        if good
        else _broken(language, results[-1])
    )
    return True


def _version(pool, language):
    if not language.version:
        return "no version command"
    result = pool.run_all(
        [Job(language.name, {}, limits=replace(language.limits, cpu=10.0), run=language.version)]
    )[0]
    lines = (result.stdout + result.stderr).decode(errors="replace").strip().splitlines()
    return next(
        (line.strip() for line in lines if any(c.isdigit() for c in line)), "unknown version"
    )[:70]


def _broken(language, result):
    says = result.stderr.decode(errors="replace").strip().splitlines()
    return f"  {language.name:<11} is here but its test program ended with {result.status}: {says[0][:150] if says else 'no output'}"


# ---- run ----


def run(options):
    require = options.level or "kernel"
    with Pool(options.workers, options.level, require, options.allow_weaker) as pool:
        if options.jobs:
            with (
                sys.stdin
                if options.jobs == "-"
                else open(options.jobs, encoding="utf-8", errors="replace") as lines
            ):
                run_lines(pool, lines)
        else:
            run_file(pool, options)


def run_file(pool, options):
    source = (
        sys.stdin.read()
        if options.file == "-"
        else Path(options.file).read_text(encoding="utf-8", errors="replace")
    )
    limits = {
        name: getattr(options, name)
        for name in ("cpu", "wall", "memory", "output")
        if getattr(options, name) is not None
    }
    stdin = Path(options.stdin).read_bytes() if options.stdin else b""
    job = Job(
        options.lang,
        {load_language(options.lang).file: source},
        stdin,
        _limits(options.lang, limits),
    )
    print(result_line(pool.run_all([job])[0]))


def run_lines(pool, lines):
    """Print one line per line of `lines`, in order, each as soon as it and all before it are done."""
    waiting = collections.deque()
    for number, line in enumerate(lines, 1):
        if line.strip():
            waiting.append(_submit(pool, number, line))
        while waiting and (len(waiting) > 16 * pool.workers or _done(waiting[0])):
            print(_text(waiting.popleft()), flush=True)
    for item in waiting:
        print(_text(item), flush=True)


def _submit(pool, number, line):
    """Future of a job line, or the error line."""
    name = None
    try:
        row = json.loads(line)
        name = row.get("id") if isinstance(row, dict) else None
        return pool.submit(_job(row))
    except (ValueError, TypeError, RecursionError) as error:
        said = f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
        return json.dumps({"id": name, "line": number, "error": said})


def _done(item):
    return isinstance(item, str) or item.done()


def _text(item):
    return item if isinstance(item, str) else result_line(item.result())


def _job(row):
    """Job of a job line; ValueError with one sentence when it is none."""
    if not isinstance(row, dict) or not isinstance(row.get("lang"), str):
        raise ValueError('a job is a JSON object with at least "lang" and "source" or "files"')
    unknown = sorted(set(row) - {"id", "lang", "source", "files", "stdin", "limits"})
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r}: a job has id, lang, source or files, stdin, limits"
        )
    files = row["files"] if "files" in row else {load_language(row["lang"]).file: row.get("source")}
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(text, str) for text in files.values())
    ):
        raise ValueError('"source" must be text, and "files" an object of texts by file name')
    stdin, limits = row.get("stdin") or "", row.get("limits") or {}
    if not isinstance(stdin, str) or not isinstance(limits, dict):
        raise ValueError('"stdin" must be text and "limits" an object')
    return Job(
        row["lang"],
        files,
        stdin.encode("utf-8", "replace"),
        _limits(row["lang"], limits),
        row.get("id"),
    )


def _limits(name, given):
    """The language's own limits with the given ones in their place."""
    known = [field.name for field in fields(Limits)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown limit {unknown[0]!r}: choose from {', '.join(known)}")
    return replace(load_language(name).limits, **given)


def result_line(result):
    row = {"id": result.id, "status": result.status}
    row |= {name: getattr(result, name).decode(errors="replace") for name in ("stdout", "stderr")}
    row |= {
        name: getattr(result, name)
        for name in ("exit_code", "signal", "cpu", "wall", "peak_memory", "level", "truncated")
    }
    return json.dumps(row)


def main(arguments=None):
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
    for name, kind in (("cpu", float), ("wall", float), ("memory", int), ("output", int)):
        command.add_argument(f"--{name}", type=kind, help="limit: seconds, or bytes")
    options = parser.parse_args(arguments)
    if options.command == "run" and not (options.lang or options.jobs):
        parser.error("run needs --lang, or --jobs")
    try:
        doctor() if options.command == "doctor" else run(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (SandboxError, ValueError, OSError) as problem:
        sys.exit(f"python -m sandbox: {problem}")


if __name__ == "__main__":
    main()
