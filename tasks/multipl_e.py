"""HumanEval and MBPP in many languages (MultiPL-E), and translation into them.

A row's program is prompt + completion + tests, as upstream runs it; how a language's tests end and
what counts as a pass stands in the [answer.tests] table of its TOML. TestJudge says what a pass
needs beyond that, and what it cannot know. CrossPLEval's form is read too, from the user's files.
"""

import concurrent.futures
import hmac
import itertools
import math
import os
import random
import re
from dataclasses import dataclass, replace

from sandbox import Job
from sandbox.languages import language_of
from sandbox.languages.definitions import last_defined
from tasks.data import find_data, read_jsonl, take
from tasks.fences import fenced_blocks
from tasks.requests import answer_stops, begun_answer
from tasks.verdicts import Parsed, Submission, Verdict
from tasks.whole_programs import answer_code, whole_program

BENCHMARKS = ("humaneval", "mbpp", "translate", "crosspleval")
# HumanEval-X's own names in files; Python sources are HumanEval's canonical solutions.
SOURCES = {
    "python": "humaneval",
    "cpp": "cpp",
    "java": "java",
    "javascript": "js",
    "go": "go",
    "rust": "rust",
}
# Stop tokens of MultiPL-E's rows that are left out: its code of a language -> token. A blank line
# cut right Lua programs; upstream has called it a bug and dropped it in its data 3.3.
LEFT_OUT_STOPS = {"lua": "\n\n"}


@dataclass(frozen=True)
class BenchmarkProblem:
    """One benchmark problem in one language."""

    id: str  # "humaneval/rkt/HumanEval_2_truncate_number"
    task: str
    question: str  # what samples.jsonl shows
    prompt: str  # ends inside the function
    entry: str  # the function that is asked for
    tests: str
    stop_tokens: tuple
    source: str = ""  # the program to translate
    source_language: str = ""
    answer: None = None


# ---- rows ----


def load_benchmark(bench, language, data=None, version="v3", source="python", count=None, seed=0):
    """list[BenchmarkProblem] of a benchmark in a language (name or Language).

    version: of MultiPL-E's data, v3 or v0.4.
    source: language to translate from. The programs of translate are HumanEval's (python) or
        HumanEval-X's, prompts and tests MultiPL-E's; crosspleval reads the user's
        crosspleval/SOURCE-TARGET.jsonl: rows of id, source, prompt, tests, stop_tokens.
    count: a sample drawn by `seed`, in file order.
    Raises ValueError with one sentence where the benchmark does not have the language or the data
    is missing.
    """
    language = language_of(language)
    if bench not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {bench!r}: use gsm8k, {', '.join(BENCHMARKS)}")
    code = tests_table(language)["name"]

    if bench == "crosspleval":
        path = _need(f"crosspleval/{source}-{code}.jsonl", data)
        rows = read_jsonl(path, lambda _, row: _cross_row(row, language, source))
        return take(rows, count, seed)

    family = "humaneval" if bench == "translate" else bench
    path = _need(f"multipl_e/{version}/{family}-{code}-reworded.jsonl", data)
    rows = read_jsonl(path, lambda _, row: _multipl_row(bench, language, row))
    if bench == "translate":
        rows = _with_sources(rows, source, data)
    return take(rows, count, seed)


def stops_note(bench, language, mode):
    """What a reader of a number has to know of its stop tokens; "" when they are the data's."""
    code = tests_table(language_of(language))["name"]
    if mode != "completion" or bench == "crosspleval" or code not in LEFT_OUT_STOPS:
        return ""
    return (
        f"stop token {LEFT_OUT_STOPS[code]!r} left out, as in MultiPL-E 3.3: it cut right programs"
    )


def tests_table(language):
    """The language's [answer.tests] table; ValueError when it has none."""
    if "tests" not in language.answer:
        raise ValueError(
            f"{language.name} has no [answer.tests] table: MultiPL-E does not have the language "
            "(use --bench gsm8k)"
        )
    return language.answer["tests"]


def _need(name, data):
    path = find_data(name, data)
    if path is None:
        raise ValueError(
            f"{name} is not in ../shared/data: give its folder by --data or RARECODE_DATA"
        )
    return path


def _multipl_row(bench, language, row):
    code = language.answer["tests"]["name"]
    left_out = LEFT_OUT_STOPS.get(code)
    return BenchmarkProblem(
        id=f"{bench}/{code}/{row['name']}",
        task=bench,
        question=row["prompt"],
        prompt=row["prompt"],
        entry=last_defined(row["prompt"], language),
        tests=row["tests"],
        stop_tokens=tuple(stop for stop in row["stop_tokens"] if stop != left_out),
    )


def _cross_row(row, language, source):
    code = language.answer["tests"]["name"]
    return BenchmarkProblem(
        id=f"crosspleval/{source}-{code}/{row['id']}",
        task="crosspleval",
        question=row["source"],
        prompt=row["prompt"],
        entry=last_defined(row["prompt"], language),
        tests=row["tests"],
        stop_tokens=tuple(row["stop_tokens"]),
        source=row["source"],
        source_language=source,
    )


def _with_sources(rows, source, data):
    """Rows of translate: the canonical solution of the same number in the source language."""
    if source not in SOURCES:
        raise ValueError(f"no translation sources in {source!r}: use {', '.join(SOURCES)}")
    name = "humaneval/HumanEval"
    if source != "python":
        name = f"humaneval_x/humaneval_{SOURCES[source]}"

    def read(_, row):
        return row["task_id"].split("/")[1], row["prompt"] + row["canonical_solution"]

    programs = dict(read_jsonl(_need(f"{name}.jsonl", data), read))
    found = []
    for row in rows:
        solved = programs[re.search(r"HumanEval_(\d+)_", row.id)[1]]
        id = row.id.replace("translate/", f"translate/{source}-", 1)
        found.append(replace(row, id=id, question=solved, source=solved, source_language=source))
    return found


# ---- from a completion to a whole program ----


def program(row, text, language, mode):
    """The whole program of a completion, with the row's tests; "" when there is no code.

    completion: prompt + completion.
    think, chat: the code of the answer, made whole (whole_programs.py).
    """
    language = language_of(language)
    stops = [text.find(stop) for stop in answer_stops(row, mode)]
    text = text[: min((place for place in stops if place >= 0), default=None)]
    if mode == "completion":
        return f"{row.prompt.rstrip()}{text}\n{row.tests}"
    if mode == "think" and not fenced_blocks(text.partition("</think>")[2]):
        return ""
    if not text.startswith(("```", "~~~")):
        text = begun_answer(row, mode) + text
    code = answer_code(text, row.entry, language)
    return whole_program(row, code, language) if code else ""


# ---- verdicts ----


class TestJudge:
    """Scores completions of benchmark rows; a judge as tasks/verdicts.py describes it.

    The tests run in the program's own process, so whatever they print to prove that they ran, the
    program could print too. Hence two runs, in an order that a secret coin decides:

    right       Under the row's own tests it ends with 0, keeps upstream's rule, and prints after the
                last test a random number, of which only two summands stand in its file: leaving
                early, printing look-alikes or one's own file is not enough.
    exchanged   Under tests in which the right answers of two tests are exchanged a right program
                fails. One that passes is a forger, by whatever means (status "forged"): its verdict
                does not depend on the tests.

    The first run that does not end so decides. A right program takes two runs, a wrong one 1.5 on
    average, and how often a program passes that is right only now and then does not change.

    What gets through: a program that can tell right answers of those tests from exchanged ones (of
    two, chosen at random, not among the examples of the prompt where there are others). And one
    that guesses which run it is in, with a chance of at most

    1/2   if it can tell its first run from its second: the clock is enough, since it can end the
          first at a time that it chooses
    1/4   if it cannot: it passes a run with some chance p, and p (1 - p) is 1/4 at most
    """

    __test__ = False  # not a pytest class

    def __init__(self, pool, language, mode="completion"):
        self.pool = pool
        self.language = language_of(language)
        self.mode = mode
        self.table = tests_table(self.language)
        self._secret = os.urandom(16)
        if pool:
            self._need_library()

    def _need_library(self):
        """Without its test library every right program would fail, so it is asked for first."""
        if "probe" not in self.table:
            return
        result = self.pool.submit(self._job({self.language.file: self.table["probe"]})).result()
        if result.status not in ("ok", "sandbox_error"):
            raise ValueError(
                f"MultiPL-E's {self.language.title} tests need {self.table['library']}, "
                f"which is not here: {self.table['install']}"
            )

    def stop_strings(self, row):
        """What program() cuts a completion at."""
        return answer_stops(row, self.mode)

    def submit(self, row, text, sample=0):
        """Start a completion's program under the row's tests -> Submission.

        Its future is of (status, passed), and is done when the runs are.
        """
        source = program(row, text, self.language, self.mode)
        outcome = None
        if source:
            outcome = concurrent.futures.Future()
            self._run(self._runs(row, text, source), outcome, f"{row.id}/{sample}")
        parsed = Parsed(reasoning="", code=source, query="", format_ok=bool(source))
        return Submission(row, sample, text, parsed, nonce="", future=outcome)

    def _runs(self, row, text, source):
        """[(kind, whole program with its tests)] in their secret order.

        Equal programs have equal runs, which the pool's cache runs once.
        """
        rng = random.Random(self._secret + source.encode("utf-8", "replace"))
        runs = [("right", source)]
        tests = exchange_answers(row, self.table["test"], rng)
        if tests is not None:
            exchanged = program(replace(row, tests=tests), text, self.language, self.mode)
            runs.append(("exchanged", exchanged))
        rng.shuffle(runs)
        return runs

    def _run(self, runs, outcome, id):
        """Start the first of the runs, and the others when it ends as a right program's does."""
        (kind, source), *others = runs
        job, printed = self._numbered_job(source, id)

        def ended(result):
            passed = self._passed(result, printed)
            if result.status == "sandbox_error":
                outcome.set_result(("sandbox_error", False))
            elif passed and kind == "exchanged":
                outcome.set_result(("forged", False))
            elif not passed and kind == "right":
                outcome.set_result((result.status, False))
            elif others:
                self._run(others, outcome, id)
            else:
                outcome.set_result(("ok", True))

        _when_done(self.pool.submit(job), outcome, ended)

    def _numbered_job(self, source, id):
        """(job, what it prints where the last test has passed) of a program with its tests."""
        # Numbers per program, not per sample: equal programs stay equal jobs. Below 10**14, their
        # sum is exact in a double.
        digest = hmac.new(self._secret, source.encode("utf-8", "replace"), "sha256").digest()
        first = int.from_bytes(digest[:8], "big") % 10**14
        second = int.from_bytes(digest[8:16], "big") % 10**14
        return self.job(source, (first, second), id), str(first + second)

    def job(self, source, numbers, id=None):
        """The sandbox job of a whole program with its tests.

        numbers: two, whose sum the program prints where the last test has passed.
        """
        first, second = map(str, numbers)
        printing = self.table["print"].replace("{a}", first).replace("{b}", second)
        end = self.table.get("last", r"\Z")
        text = re.sub(end, lambda _: printing, source.rstrip() + "\n", count=1)
        return self._job({self.table.get("file", self.language.file): text}, id)

    def _job(self, files, id=None):
        run = self.table.get("run")
        limits = self.language.limits
        if run and self.language.compile:  # the tests' own command compiles, such as go test
            limits = self.language.compile_limits
        limits = replace(limits, cpu=self.table.get("cpu", 15.0), wall=None)
        return Job(self.language.name, files, limits=limits, id=id, run=run)

    def _passed(self, result, printed):
        return result.status == "ok" and self.passes(result, printed)

    def passes(self, result, printed):
        """Upstream's rule, and what was to be printed, on a line of its own."""
        stdout = result.stdout.decode(errors="replace")
        stderr = result.stderr.decode(errors="replace")
        if printed not in map(str.strip, stdout.splitlines()):
            return False

        if self.table.get("must", "") not in stdout + stderr:
            return False
        must_not = self.table.get("must_not")
        if must_not and must_not in stdout + stderr:
            return False
        return not (self.table.get("quiet") and stderr.strip())

    def collect(self, submissions, deadline=None):
        """Verdicts in order; what is not done `deadline` seconds from now is a sandbox error."""
        started = [submission.future for submission in submissions if submission.future]
        concurrent.futures.wait(started, timeout=deadline)
        return [self._verdict(submission) for submission in submissions]

    def _verdict(self, submission):
        outcome = submission.future
        if outcome is None:
            status, passed = "no_program", False
        elif outcome.done():
            status, passed = outcome.result()
        else:
            status, passed = "sandbox_error", False
        reward = math.nan if status == "sandbox_error" else float(passed)
        return Verdict(
            problem=submission.problem.id,
            reward=reward,
            components={"correct": reward},
            correct=passed,
            status=status,
            value=None,
            program=submission.parsed.code,
            parsed=submission.parsed,
        )


def _when_done(run, outcome, ended):
    """Call ended(result) when a run is done, in a thread of the pool.

    Nobody would see an error in that thread, and the outcome would never come: it is the outcome.
    """

    def done(run):
        try:
            ended(run.result())
        except Exception as error:
            outcome.set_exception(error)

    run.add_done_callback(done)


# ---- exchanged answers ----


def _nested(depth=8):
    """Regular expression for text whose round brackets are balanced; strings may hold any."""
    plain = r'"(?:\\.|[^"\\])*"|' + r"'(?:\\.|[^'\\])*'" + r'|[^()"]'
    pattern = plain
    for _ in range(depth):
        pattern = rf"{plain}|\((?:{pattern})*\)"
    return f"(?:{pattern})*"


NESTED = _nested()


def exchange_answers(row, test, rng):
    """The row's tests with the right answers of two tests exchanged.

    None where no test is found (three of MultiPL-E's rows, which compile in no case).
    test: regular expression of one test, with groups `arguments` and `expected`.
    Tests that the prompt does not show come first. Where all tests expect the same, one answer's
    last number is raised by 1.
    """
    found = list(re.finditer(test.replace("{nested}", NESTED), row.tests))
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if a["expected"] != b["expected"]]
    if pairs:
        hidden = [pair for pair in pairs if not _shows_one(row.prompt, pair)]
        first, second = rng.choice(hidden or pairs)
        changes = [(first, second["expected"]), (second, first["expected"])]
    else:
        numbered = [match for match in found if re.search(r"\d", match["expected"])]
        changes = [(match, _raised(match["expected"])) for match in numbered[:1]]
    if not changes:
        return None

    tests = row.tests
    for match, text in reversed(changes):  # from the end, so that places stay
        start, end = match.span("expected")
        tests = tests[:start] + text + tests[end:]
    return tests


def _shows_one(prompt, pair):
    return any(match["arguments"].strip() in prompt for match in pair)


def _raised(text):
    """Text with its last number raised by 1."""
    return re.sub(r"\d+(?=\D*\Z)", lambda match: str(int(match[0]) + 1), text)
