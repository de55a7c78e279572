"""Completion text -> parts -> a program that runs in the sandbox -> named components -> one reward.

The right answer never enters a sandbox: the program prints its value after a nonce and the comparison is made here. A
sandbox that could not judge gives a nan reward, which the trainer masks; it is never a 0.
"""

import concurrent.futures
import hmac
import math
import os
import random
import re
from dataclasses import dataclass

from sandbox import Job, Result
from sandbox.languages import language_of
from tasks.answers import parse_number, same_number
from tasks.problems import Problem
from tasks.verdicts import Parsed, Submission, Verdict

# ---- parsing ----


def parse(text, language):
    """Take a completion apart. Code and query are found also where the form is wrong, so that they can be run and counted."""
    tag = language_of(language).answer["tag"]
    parts = [_part(text, name) for name in ("reasoning", "code", tag)]
    layout = r"\s*<reasoning>(.*?)</reasoning>\s*<code>(.*?)</code>\s*<{0}>(.*?)</{0}>\s*".format(
        tag
    )
    once = all(
        text.count(f"<{slash}{name}>") == 1
        for name in ("reasoning", "code", tag)
        for slash in ("", "/")
    )
    return Parsed(
        *parts, format_ok=once and all(parts) and re.fullmatch(layout, text, re.DOTALL) is not None
    )


def _part(text, tag):
    """What stands in the last <tag>...</tag>, without a Markdown fence; "" when there is none."""
    opened = text.rfind(f"<{tag}>")
    closed = text.find(f"</{tag}>", opened)
    if opened < 0 or closed < 0:
        return ""
    inner = text[opened + len(tag) + 2 : closed].strip("\n")
    fenced = re.fullmatch(r"\s*```[\w+-]*\n(.*?)\n?```\s*", inner, re.DOTALL)
    return (fenced[1] if fenced else inner).rstrip()


# ---- numbers ----


# ---- running ----


class Judge:
    """Scores completions of problems with a numeric answer.

    components: {name: weight} over COMPONENTS. gate: the reward is 0 unless the form is right (published sets add instead: False).
    random_reward: the control run of a fair coin per (seed, problem id, sample); programs still run, so that pass rates are logged.
    """

    def __init__(self, pool, language, components=None, gate=True, random_reward=False, seed=0):
        self.pool, self.language = pool, language_of(language)
        self.components = {"correct": 1.0} if components is None else dict(components)
        self.gate, self.random_reward, self.seed = gate, random_reward, seed
        self._secret = os.urandom(16)
        if "main" not in self.language.answer:
            raise ValueError(
                f"{self.language.name} cannot be judged by value: its TOML has no [answer] table"
            )
        unknown = sorted(set(self.components) - set(COMPONENTS))
        if unknown:
            raise ValueError(
                f"unknown reward component {unknown[0]!r}: use {', '.join(COMPONENTS)}"
            )

    def submit(self, problem, text, sample=0):
        """Parse a completion and start its program at once. Returns the Submission that collect() takes."""
        parsed = parse(text, self.language)
        # One nonce per program, not per sample: equal programs stay equal jobs, which the pool's cache runs once.
        nonce = hmac.new(
            self._secret, f"{parsed.code}\0{parsed.query}".encode(), "sha256"
        ).hexdigest()[:24]
        future = None
        if parsed.code.strip() and parsed.query.strip():
            files = answer_files(self.language, parsed.code, parsed.query, nonce)
            future = self.pool.submit(Job(self.language.name, files, id=f"{problem.id}/{sample}"))
        syntax = None
        if "syntax" in self.components and parsed.code.strip():
            syntax = self.pool.submit(
                Job(self.language.name, {self.language.file: parsed.code}, run=self.language.check)
            )
        return Submission(problem, sample, text, parsed, nonce, future, syntax)

    def collect(self, submissions, deadline=None):
        """Verdicts in order. Programs that are not done `deadline` seconds from now count as sandbox errors (nan)."""
        futures = [
            future
            for submission in submissions
            for future in (submission.future, submission.syntax)
            if future
        ]
        concurrent.futures.wait(futures, timeout=deadline)
        return [self._verdict(submission) for submission in submissions]

    def _verdict(self, submission):
        status, value = self._outcome(submission)
        number = parse_number(value) if value is not None else None
        answer, parsed = submission.problem.answer, submission.parsed
        correct = number is not None and same_number(number, answer)
        facts = Facts(
            submission.text,
            parsed,
            self.language,
            correct,
            submission.problem,
            _passed(submission.syntax),
        )
        components = {name: COMPONENTS[name](facts) for name in self.components}
        reward = sum(weight * components[name] for name, weight in self.components.items())
        if self.gate and not parsed.format_ok:
            reward = 0.0
        elif status == "sandbox_error" or facts.syntax != facts.syntax:
            reward, components = math.nan, dict.fromkeys(components, math.nan)
        if self.random_reward:
            reward = float(
                random.Random(f"{self.seed}/{submission.problem.id}/{submission.sample}").random()
                < 0.5
            )
        program = f"{parsed.code}\n{parsed.query}" if submission.future else ""
        return Verdict(
            submission.problem.id,
            reward,
            components,
            correct,
            status,
            value,
            program,
            parsed,
            is_constant(facts),
            is_leaked(facts),
        )

    def _outcome(self, submission):
        """(status, printed value or None). A value counts only when the program ended well."""
        if submission.future is None:
            return "no_program", None
        if not submission.future.done():
            return "sandbox_error", None
        result: Result = submission.future.result()
        return result.status, printed_value(
            result.stdout, submission.nonce
        ) if result.status == "ok" else None


def _passed(future):
    """1 when a check passed, 0 when it did not or there was nothing to check, nan when the sandbox could not tell."""
    if future is None:
        return 0.0
    status = future.result().status if future.done() else "sandbox_error"
    return math.nan if status == "sandbox_error" else float(status == "ok")


def answer_files(language, code, query, nonce):
    """{file name: text} of a job that runs code, then the query, and prints its value after the nonce ([answer] table).

    header: a first line for programs that do not bring their own, such as "#lang racket". hoist: what must stand above the
    harness (imports) wherever the program has it.
    """
    table = language.answer
    header, hoist = table.get("header", ""), table.get("hoist")
    if header and not code.lstrip().startswith(header.split()[0]):
        code = f"{header}\n{code}"
    hoisted = "\n".join(re.findall(hoist, code)) if hoist else ""
    code = re.sub(hoist, "", code) if hoist else code
    words = {
        "{code}": code,
        "{query}": query.strip().rstrip(";"),
        "{nonce}": nonce,
        "{hoisted}": hoisted,
    }
    templates = {language.file: table["main"], **table.get("files", {})}
    return {
        name: re.sub("|".join(map(re.escape, words)), lambda match: words[match[0]], text)
        for name, text in templates.items()
    }


def printed_value(stdout, nonce):
    """What the program printed after the last nonce, to the end of that line; None when there is none."""
    found = re.findall(rf"^{nonce} (.*)$", stdout.decode(errors="replace"), re.MULTILINE)
    return found[-1].strip() if found else None


# ---- components: each in [0, 1]; published weights stand in the recipes ----


@dataclass(frozen=True)
class Facts:
    text: str
    parsed: Parsed
    language: object
    correct: bool
    problem: Problem
    syntax: float = 0.0


def _tags(facts):
    """Share of the six tags that occur once, on a line of their own."""
    names = ("reasoning", "code", facts.language.answer["tag"])
    marks = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    return (
        sum([line.strip() for line in facts.text.splitlines()].count(mark) == 1 for mark in marks)
        / 6
    )


def _layout(facts, line, end):
    tag = facts.language.answer["tag"]
    parts = [rf"<{name}>{line}(.+?){line}</{name}>" for name in ("reasoning", "code", tag)]
    return float(re.match(r"\s*".join(parts) + end, facts.text, re.DOTALL) is not None)


def _query_leak(facts):
    """The code runs the query itself: ?- stands in it, or a line that is the query. (The published test, query text anywhere in the
    code, also takes a Prolog program whose clause head reads like its query for a leak.)"""

    def bare(line):
        return re.sub(r"^\s*[?:]-|\.?\s*$", "", line).strip()

    query, code = bare(facts.parsed.query), facts.parsed.code
    return float("?-" in code or (bool(query) and query in map(bare, code.splitlines())))


def _words(text, limit=1000):
    """Words over a limit of 1,000: the published reward per word has none, which pays for padding."""
    return min(len(text.split()), limit) / limit


COMPONENTS = {
    "correct": lambda facts: float(facts.correct),
    "wrong": lambda facts: float(not facts.correct),
    "syntax": lambda facts: facts.syntax,
    "tags": _tags,
    "soft_format": lambda facts: _layout(facts, r"\s*", ""),
    "strict_format": lambda facts: _layout(facts, r"\n", r"\s*$"),
    "query_leak": _query_leak,
    "reasoning_words": lambda facts: _words(facts.parsed.reasoning),
    "code_words": lambda facts: _words(facts.parsed.code),
    "correct_90_130_words": lambda facts: float(
        facts.correct and 90 <= len(facts.parsed.reasoning.split()) <= 130
    ),
    "constant": lambda facts: float(is_constant(facts)),
    "leaked": lambda facts: float(is_leaked(facts)),
}

_INFIX = re.compile(r"[\w)\]]\s*(?:[-+*/^%]|\*\*|//|[-+*/]\.|\b(?:mod|rdiv|div|rem)\b)\s*[\w(\[$]")
_PREFIX = re.compile(
    r"\(\s*(?:[-+*/]|1\+|1-|incf|decf|expt|floor|ceiling|round|mod|rem)\s|['(\s][-+*/][\s)]"
)


def is_constant(facts):
    """A program without any arithmetic and with at most one number: the model did the sum itself. A heuristic, for the log."""
    program = f"{facts.parsed.code}\n{facts.parsed.query}"
    if not facts.parsed.code.strip():
        return False
    program = re.sub(rf"{re.escape(facts.language.comment)}.*", "", program)
    operator = _PREFIX if facts.language.render["notation"] == "prefix" else _INFIX
    return (
        not operator.search(program) and len(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", program)) <= 1
    )


def is_leaked(facts):
    """The query names the right answer, and the question does not: it was computed outside the program."""

    def numbers(text):
        return {
            parse_number(number) for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)
        }

    return facts.problem.answer in numbers(facts.parsed.query) - numbers(facts.problem.question)
