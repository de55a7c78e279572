"""Completion text -> parts -> a program that runs in the sandbox -> named components -> one reward.

The right answer never enters a sandbox: the program prints its value after a nonce, and it is
compared here. What the sandbox could not judge has the reward nan, which the trainer masks; it is
never a 0. Add a component of the reward as a function of Facts at the end of this file.
"""

import concurrent.futures
import hmac
import math
import os
import re
from dataclasses import dataclass

from sandbox import Job
from sandbox.languages import language_of
from sandbox.languages.headers import with_header
from sandbox.languages.templates import filled
from tasks.answers import printed_number, same_number, written_number
from tasks.fences import fenced_blocks, unix_lines
from tasks.problems import Problem
from tasks.verdicts import Parsed, Submission, Verdict, tossed

# ---- a completion's parts ----


def parse(text, language):
    """Take a completion apart.

    Code and query are found also where the form is wrong, so that they can be run and counted.
    """
    tags = tags_of(language)
    reasoning, code, query = (last_part(text, tag) for tag in tags)
    marks = [f"<{tag}>" for tag in tags] + [f"</{tag}>" for tag in tags]
    once = all(text.count(mark) == 1 for mark in marks)
    pattern = r"\s*".join(rf"<{tag}>.*?</{tag}>" for tag in tags)
    # `once` first: where each mark occurs once, the pattern takes linear time
    in_order = once and re.fullmatch(rf"\s*{pattern}\s*", text, re.DOTALL) is not None
    none_empty = bool(reasoning and code and query)
    return Parsed(reasoning, code, query, format_ok=in_order and none_empty)


def tags_of(language):
    return "reasoning", "code", language_of(language).answer["tag"]


def last_part(text, tag):
    """What stands in the last <tag>...</tag>; "" when there is none.

    Of a part that begins with a Markdown fence, the block alone.
    """
    opened = text.rfind(f"<{tag}>")
    closed = text.find(f"</{tag}>", opened)
    if opened < 0 or closed < 0:
        return ""
    inner = unix_lines(text[opened + len(tag) + 2 : closed]).strip("\n")
    blocks = fenced_blocks(inner)
    if blocks and inner.lstrip().startswith(("```", "~~~")):
        inner = blocks[0].code.strip("\n")
    return inner.rstrip()


# ---- the judge ----


class Judge:
    """Scores completions of problems with a numeric answer (tasks/verdicts.py: what a judge is).

    components: {name: weight} over COMPONENTS.
    gate: the reward is 0 unless the form is right (published sets add a format reward: False).
    random_reward: the control, a fair coin per (seed, problem id, sample); programs still run, so
    that pass rates are logged.
    """

    def __init__(self, pool, language, components=None, gate=True, random_reward=False, seed=0):
        self.pool = pool
        self.language = language_of(language)
        self.components = {"correct": 1.0} if components is None else dict(components)
        self.gate = gate
        self.random_reward = random_reward
        self.seed = seed
        self._secret = os.urandom(16)
        if "main" not in self.language.answer:
            raise ValueError(
                f"{self.language.name} cannot be judged by value: its TOML has no [answer] table"
            )
        if "syntax" in self.components and not self.language.check:
            raise ValueError(
                f"{self.language.name} has no syntax check: its TOML has no check line"
            )
        unknown = sorted(set(self.components) - set(COMPONENTS))
        if unknown:
            known = ", ".join(COMPONENTS)
            raise ValueError(f"unknown reward component {unknown[0]!r}: use {known}")

    def stop_strings(self, problem):
        """None: the form is checked to the end of a completion."""
        return ()

    def submit(self, problem, text, sample=0):
        """Parse a completion and start its program at once; collect() takes the Submission."""
        parsed = parse(text, self.language)
        has_code = bool(parsed.code.strip())
        name, file = self.language.name, self.language.file

        future = None
        nonce = self._nonce(parsed)
        if has_code and parsed.query.strip():
            files = answer_files(self.language, parsed.code, parsed.query, nonce)
            future = self.pool.submit(Job(name, files, id=f"{problem.id}/{sample}"))
        check = None
        if has_code and "syntax" in self.components:
            command = [word.replace("{nonce}", nonce) for word in self.language.check]
            code = with_header(parsed.code, self.language)
            check = self.pool.submit(Job(name, {file: code}, run=command))
        return Submission(problem, sample, text, parsed, nonce, future, check)

    def _nonce(self, parsed):
        """One per program, not per sample: equal programs stay equal jobs, run once by the pool."""
        program = f"{parsed.code}\0{parsed.query}"
        return hmac.new(self._secret, program.encode(errors="replace"), "sha256").hexdigest()[:24]

    def collect(self, submissions, deadline=None):
        """Verdicts in order.

        Programs that are not done `deadline` seconds from now count as sandbox errors (nan).
        """
        running = [x.future for x in submissions if x.future]
        running += [x.syntax for x in submissions if x.syntax]
        concurrent.futures.wait(running, timeout=deadline)
        return [self._verdict(submission) for submission in submissions]

    def _verdict(self, submission):
        problem, parsed = submission.problem, submission.parsed
        status, value = printed(submission)
        number = None if value is None else printed_number(value, self.language)
        right = number is not None and same_number(number, problem.answer)
        syntax_ok = passed(submission, self.language)
        facts = Facts(submission.text, parsed, self.language, right, problem, syntax_ok)

        components = {name: COMPONENTS[name](facts) for name in self.components}
        reward = sum(weight * components[name] for name, weight in self.components.items())
        if self.gate and not parsed.format_ok:
            reward = 0.0
        elif status == "sandbox_error" or math.isnan(syntax_ok):
            status, reward = "sandbox_error", math.nan
            components = dict.fromkeys(components, math.nan)

        verdict = Verdict(
            problem=problem.id,
            reward=reward,
            components=components,
            correct=right,
            status=status,
            value=value,
            program=f"{parsed.code}\n{parsed.query}" if submission.future else "",
            parsed=parsed,
            constant=is_constant(facts),
            leaked=is_leaked(facts),
        )
        if self.random_reward:
            return tossed(verdict, self.seed, submission.sample)
        return verdict


def printed(submission):
    """(status, printed value or None). A value counts only when the program ended well.

    no_value: it did, but before its query gave a value (a Prolog directive that halts).
    """
    if submission.future is None:
        return "no_program", None
    if not submission.future.done():
        return "sandbox_error", None
    result = submission.future.result()
    if result.status != "ok":
        return result.status, None
    value = printed_value(result.stdout, submission.nonce)
    return ("no_value" if value is None else "ok"), value


def printed_value(stdout, nonce):
    """What the program printed after the last nonce, to the end of that line; None without one."""
    found = re.findall(rf"^{nonce} (.*)$", stdout.decode(errors="replace"), re.MULTILINE)
    return found[-1].strip() if found else None


def passed(submission, language):
    """1 when the syntax check passed, 0 when not or nothing was checked, nan when nobody could tell.

    A check that runs code of the program says the nonce when it is done: exit code 0 alone may be
    the program's.
    """
    check = submission.syntax
    if check is None:
        return 0.0
    if not check.done() or check.result().status == "sandbox_error":
        return math.nan
    result = check.result()
    if any("{nonce}" in word for word in language.check):
        said = result.stdout.decode(errors="replace").splitlines()
        return float(result.status == "ok" and submission.nonce in said)
    return float(result.status == "ok")


def answer_files(language, code, query, nonce):
    """{file name: text} of a job that runs code, then the query, and prints its value.

    The [answer] table: main is the harness. hoist: what must stand above it (imports) wherever the
    program has it. entry: the name of a main of the program's own, which is called program_main
    here. docs/sandbox.md has all keys.
    """
    table = language.answer
    code = with_header(code, language)
    hoisted = ""
    if hoist := table.get("hoist"):
        hoisted = "\n".join(re.findall(hoist, code))
        code = re.sub(hoist, "", code)
    if entry := table.get("entry"):
        code, query = (re.sub(entry, "program_main", text) for text in (code, query))

    words = {
        "code": code,
        "query": query.strip().rstrip(";"),
        "nonce": nonce,
        "hoisted": hoisted,
    }
    templates = {language.file: table["main"], **table.get("files", {})}
    return {name: filled(template, words) for name, template in templates.items()}


# ---- what shows that a program computes nothing ----

INFIX = re.compile(r"[\w)\]]\s*(?:[-+*/^%]|\*\*|//|[-+*/]\.|\b(?:mod|rdiv|div|rem)\b)\s*[\w(\[$]")
PREFIX = re.compile(
    r"\(\s*(?:[-+*/]|1\+|1-|incf|decf|expt|floor|ceiling|round|mod|rem)\s|['(\s][-+*/][\s)]"
)


@dataclass(frozen=True)
class Facts:
    """What a component of the reward may look at."""

    text: str
    parsed: Parsed
    language: object
    correct: bool
    problem: Problem
    syntax: float = 0.0  # passed() of the language's own check


def is_constant(facts):
    """A program without arithmetic and with at most one number: the model did the sum itself.

    A heuristic, for the log.
    """
    if not facts.parsed.code.strip():
        return False
    program = f"{facts.parsed.code}\n{facts.parsed.query}"
    program = re.sub(rf"{re.escape(facts.language.comment)}.*", "", program)
    operator = PREFIX if facts.language.render["notation"] == "prefix" else INFIX
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", program)
    return not operator.search(program) and len(numbers) <= 1


def is_leaked(facts):
    """The query names the right answer and the question does not: it was computed elsewhere."""
    asked = numbers_in(facts.problem.question)
    return facts.problem.answer in numbers_in(facts.parsed.query) - asked


def numbers_in(text):
    return {written_number(number) for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)}


# ---- components: each in [0, 1]; published weights stand in the recipes ----


def correct(facts):
    return float(facts.correct)


def wrong(facts):
    return float(not facts.correct)


def syntax(facts):
    return facts.syntax


def tags(facts):
    """Share of the six tags that occur once, on a line of their own."""
    lines = [line.strip() for line in facts.text.splitlines()]
    names = tags_of(facts.language)
    marks = [f"<{name}>" for name in names] + [f"</{name}>" for name in names]
    return sum(lines.count(mark) == 1 for mark in marks) / 6


def soft_format(facts):
    return layout(facts, edge="", end="")


def strict_format(facts):
    return layout(facts, edge=r"\r?\n", end=r"\s*$")


def layout(facts, edge, end):
    """1 when the three parts stand in order, none empty; edge: what must stand inside every tag.

    In linear time: between two seams anything may stand, so each is best taken where it is first.
    """
    first, second, third = tags_of(facts.language)
    seams = [
        rf"{edge}</{first}>\s*<{second}>{edge}",
        rf"{edge}</{second}>\s*<{third}>{edge}",
        rf"{edge}</{third}>{end}",
    ]
    found = re.match(f"<{first}>{edge}", facts.text)
    for seam in seams:
        if found:
            found = re.compile(seam).search(facts.text, found.end() + 1)
    return float(found is not None)


def query_leak(facts):
    """The code runs the query itself: ?- stands in it, or a line that is the query.

    The published test, query text anywhere in the code, also takes a Prolog program whose clause
    head reads like its query for a leak.
    """
    query, code = bare(facts.parsed.query), facts.parsed.code
    lines = [bare(line) for line in code.splitlines()]
    return float("?-" in code or (bool(query) and query in lines))


def bare(line):
    """A goal without what marks it as a query or ends it."""
    return re.sub(r"^\s*[?:]-", "", line).rstrip().removesuffix(".").strip()


def reasoning_words(facts):
    return share_of_words(facts.parsed.reasoning)


def code_words(facts):
    return share_of_words(facts.parsed.code)


def share_of_words(text, limit=1000):
    """Words over a limit: the published reward per word has none, which pays for padding."""
    return min(len(text.split()), limit) / limit


def correct_90_130_words(facts):
    return float(facts.correct and 90 <= len(facts.parsed.reasoning.split()) <= 130)


def constant(facts):
    return float(is_constant(facts))


def leaked(facts):
    return float(is_leaked(facts))


COMPONENTS = {
    component.__name__: component
    for component in (
        correct,
        wrong,
        syntax,
        tags,
        soft_format,
        strict_format,
        query_leak,
        reasoning_words,
        code_words,
        correct_90_130_words,
        constant,
        leaked,
    )
}
