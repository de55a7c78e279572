"""How f of a program is called on values in the sandbox, and what it gave, in any language.

    runner = Runner(pool, load_language("lua"))
    running = runner.start("function f(a) return a + 1 end", [[1], [2]])
    wait([running])
    runner.finish(running)  ->  [Outcome("value", "2"), Outcome("value", "3")]

A language's TOML says how, in its [call] table:

    main       the harness, with {nonce}, {inputs} (the literals of every call, each in the form
               `arguments`), and the lists of strings {banned}, {modules}, {mentions} and {macros}
    files      the program's own files, with {code}
    identity   and hello: the program and the input that self-play starts from
    rules      a sentence for the prompts

The harness prints lines NONCE KIND NUMBER TEXT NONCE: one of STOPS before any call, or value, error
or no_value for each call.
"""

import concurrent.futures
import hmac
import math
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from sandbox.jobs import Job
from sandbox.languages.headers import with_header
from sandbox.languages.templates import filled
from sandbox.languages.values import table_of, write

STOPS = ("syntax", "banned", "no_f")  # what the harness finds before it calls f; then it ends


class Outcome(NamedTuple):
    """What one call gave."""

    kind: str  # "value", or why there is none (a key of selfplay's REASONS)
    text: str  # the value as the language printed it


@dataclass(frozen=True)
class Running:
    """A job in flight: f of a program, called on `count` inputs."""

    future: concurrent.futures.Future
    nonce: str
    count: int


class Runner:
    """Runs f of programs on inputs in the sandbox.

    Equal runs have equal nonces, so that the pool's cache runs them once.
    """

    def __init__(self, pool, language):
        if "main" not in language.call:
            raise ValueError(
                f"{language.name} cannot be used for self-play: its TOML has no [call] table"
            )
        self.pool = pool
        self.language = language
        self._secret = os.urandom(16)  # a model cannot work out the nonce of its program

    def start(self, program, calls, run=1):
        """Start one process that calls f on every element of `calls`.

        calls: argument lists, as data. run: equal programs and calls with another number run anew.
        """
        inputs = [input_text(arguments, self.language) for arguments in calls]
        text = "\0".join([program, str(run), *inputs])
        message = text.encode(errors="replace")
        nonce = hmac.new(self._secret, message, "sha256").hexdigest()[:24]

        files = call_files(self.language, program, calls, nonce)
        future = self.pool.submit(Job(self.language.name, files))
        return Running(future, nonce, len(calls))

    def finish(self, running):
        """One Outcome per call; sandbox_error for a job that is not done."""
        if not running.future.done():
            return [Outcome("sandbox_error", "")] * running.count
        return outcomes(running.future.result(), running.nonce, running.count)


def wait(jobs, deadline=None):
    """Until all of the Running jobs are done, at most `deadline` seconds; skips None among them."""
    futures = [job.future for job in jobs if job]
    concurrent.futures.wait(futures, timeout=deadline)


def call_files(language, program, calls, nonce):
    """{file name: text} of the job that checks a program and prints f of every argument list."""
    call = language.call
    inputs = [input_text(arguments, language) for arguments in calls]
    inputs = [call["arguments"].format(text) for text in inputs]
    between = "\n" if table_of(language)["family"] == "lists" else ", "
    words = {
        "code": with_header(program, language),
        "nonce": nonce,
        "inputs": between.join(inputs),
    }
    for name in ("banned", "modules", "mentions", "macros"):
        words[name] = write(call.get(name, []), language, limit=math.inf)
    templates = {language.file: call["main"], **call.get("files", {})}
    return {name: filled(template, words) for name, template in templates.items()}


def input_text(arguments, language):
    """The arguments of one call as canonical literals: 1, "a" or, in the Lisp family, 1 "a"."""
    between = " " if table_of(language)["family"] == "lists" else ", "
    return between.join(write(value, language) for value in arguments)


def outcomes(result, nonce, count):
    """One Outcome for each of the `count` calls of a job that has ended."""
    lines = _printed_lines(result.stdout.decode(errors="surrogateescape"), nonce)
    for kind, _, text in lines:
        if kind in STOPS:
            return [Outcome(kind, text)] * count
    if result.status != "ok":
        return [Outcome(result.status, "")] * count

    found = [Outcome("error", "")] * count
    for kind, number, text in lines:
        if int(number) < count:
            found[int(number)] = Outcome(kind, text)
    return found


def _printed_lines(printed, nonce):
    """[(kind, number, text)] of the harness's lines NONCE KIND NUMBER TEXT NONCE.

    In linear time: where no end follows one beginning, none follows the next either.
    """
    begins = re.compile(rf"^{nonce} (\w{{1,20}}) ([0-9]{{1,9}}) ", re.MULTILINE)
    ends = re.compile(rf" {nonce}$", re.MULTILINE)
    lines = []
    begun = begins.search(printed)
    while begun:
        ended = ends.search(printed, begun.end())
        if ended is None:
            break
        lines.append((begun[1], begun[2], printed[begun.end() : ended.start()]))
        begun = begins.search(printed, ended.end())
    return lines
