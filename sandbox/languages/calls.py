"""How f of a program is called on values, and what it gave, in any language whose TOML has a [call] table."""

import concurrent.futures
import hmac
import math
import os
import re

from sandbox.jobs import Job
from sandbox.languages.values import table_of, write

_STOPS = ("syntax", "banned", "no_f")


def input_text(arguments, language):
    joint = " " if table_of(language)["family"] == "lists" else ", "
    return joint.join(write(v, language) for v in arguments)


def call_files(language, program, calls, nonce):
    """{file name: text} of a job that checks a program for banned constructs, then prints f of every element of calls (argument lists).

    The [call] table: main is the harness, with {nonce}, {inputs} (every call's literals in the form `arguments`), {banned}, {modules},
    {mentions} and {macros} (lists of strings); files hold {code}. It prints lines NONCE KIND NUMBER TEXT NONCE: syntax, banned or no_f (and ends), and for
    each call value, error or no_value. identity and hello are the first seed, rules a sentence for the prompts, defines finds a definition of NAME.
    """
    call = language.call
    header = call.get("header", "")
    if header and not program.lstrip().startswith(header.split()[0]):
        program = f"{header}\n{program}"
    words = {"{code}": program, "{nonce}": nonce}
    words["{inputs}"] = ("\n" if table_of(language)["family"] == "lists" else ", ").join(
        call["arguments"].format(input_text(arguments, language)) for arguments in calls
    )
    for name in ("banned", "modules", "mentions", "macros"):
        words[f"{{{name}}}"] = _strings(call.get(name, []), language)
    templates = {language.file: call["main"], **call.get("files", {})}
    return {
        name: re.sub("|".join(map(re.escape, words)), lambda match: words[match[0]], text)
        for name, text in templates.items()
    }


def _strings(names, language):
    """A list of strings in the language, for the harness."""
    if language.name == "prolog":
        return "[" + ", ".join(write(name, language) for name in names) + "]"
    text = write(list(names), language, limit=math.inf)
    return text[1:] if language.name == "lisp" else text


def outcomes(result, nonce, count):
    """[(kind, text)] of the count calls of a job: kind "value", or why there is none (a key of REASONS)."""
    printed = result.stdout.decode(errors="surrogateescape")
    found = re.findall(rf"^{nonce} (\w+) (\d+) (.*?) {nonce}$", printed, re.DOTALL | re.MULTILINE)
    for kind, _, text in found:
        if kind in _STOPS:
            return [(kind, text)] * count
    if result.status != "ok":
        return [(result.status, "")] * count
    by_number = {int(number): (kind, text) for kind, number, text in found}
    return [by_number.get(number, ("error", "")) for number in range(count)]


class Runner:
    """Runs f of programs on inputs in the sandbox. Equal runs have equal nonces, so that the pool's cache runs them once."""

    def __init__(self, pool, language):
        if "main" not in language.call:
            raise ValueError(
                f"{language.name} cannot be used for self-play: its TOML has no [call] table"
            )
        self.pool, self.language, self._secret = pool, language, os.urandom(16)

    def start(self, program, calls, run=1):
        """(future, nonce, number of calls)."""
        text = "\0".join([program, str(run), *(input_text(c, self.language) for c in calls)])
        nonce = hmac.new(self._secret, text.encode(errors="replace"), "sha256").hexdigest()[:24]
        files = call_files(self.language, program, calls, nonce)
        return self.pool.submit(Job(self.language.name, files)), nonce, len(calls)

    def finish(self, started):
        """[(kind, text)] per call; sandbox_error for a job that is not done."""
        future, nonce, count = started
        if not future.done():
            return [("sandbox_error", "")] * count
        return outcomes(future.result(), nonce, count)


def wait(started, deadline=None):
    concurrent.futures.wait([s[0] for s in started if s], timeout=deadline)
