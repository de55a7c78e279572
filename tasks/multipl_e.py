"""HumanEval and MBPP in many languages (MultiPL-E), translation into them, and CrossPLEval's form: rows, prompts, verdicts.

A row's program is prompt + completion + tests, as upstream runs it; how a language's tests end and what counts as a pass
stands in the [answer.tests] table of its TOML. TestJudge says what a pass needs beyond that, and what it cannot know.
"""

import concurrent.futures
import hmac
import itertools
import os
import random
import re
from dataclasses import dataclass, replace

from sandbox import Job
from sandbox.languages import language_of
from tasks.data import find_data, read_jsonl
from tasks.verdicts import Parsed, Submission, Verdict

BENCHMARKS = ("humaneval", "mbpp", "translate", "crosspleval")
# HumanEval-X's own file names; Python sources are HumanEval's canonical solutions.
SOURCES = {
    "python": "humaneval",
    "cpp": "cpp",
    "java": "java",
    "javascript": "js",
    "go": "go",
    "rust": "rust",
}


@dataclass(frozen=True)
class BenchmarkProblem:
    """One benchmark problem in one language. `question` is what samples.jsonl shows."""

    id: str  # "humaneval/rkt/HumanEval_2_truncate_number"
    task: str
    question: str
    prompt: str  # ends inside the function
    tests: str
    stop_tokens: tuple
    source: str = ""  # the program to translate
    source_language: str = ""
    answer: None = None


# ---- rows ----


def load_benchmark(bench, language, data=None, version="v3", source="python", count=None, seed=0):
    """list[BenchmarkProblem] of a benchmark in a language (name or Language). count: a sample drawn by `seed`, in file order.

    translate takes its source programs from HumanEval (python) or HumanEval-X, and prompt and tests from MultiPL-E.
    crosspleval reads crosspleval/SOURCE-TARGET.jsonl of the user's: rows of id, source, prompt, tests, stop_tokens.
    Raises ValueError with one sentence where the benchmark does not have the language or the data is missing.
    """
    language = language_of(language)
    if bench not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {bench!r}: use gsm8k, {', '.join(BENCHMARKS)}")
    code = tests_table(language)["name"]
    if bench == "crosspleval":
        path = _need(f"crosspleval/{source}-{code}.jsonl", data)
        rows = read_jsonl(path, lambda _, row: _cross_row(row, code, source))
    else:
        family = "humaneval" if bench == "translate" else bench
        path = _need(f"multipl_e/{version}/{family}-{code}-reworded.jsonl", data)
        rows = read_jsonl(path, lambda _, row: _multipl_row(bench, code, row))
        if bench == "translate":
            rows = _with_sources(rows, source, data)
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def tests_table(language):
    if "tests" not in language.answer:
        raise ValueError(
            f"{language.name} has no [answer.tests] table: MultiPL-E does not have the language (use --bench gsm8k)"
        )
    return language.answer["tests"]


def _need(name, data):
    path = find_data(name, data)
    if path is None:
        raise ValueError(
            f"{name} is not in ../shared/data: give its folder by --data or RARECODE_DATA"
        )
    return path


def _multipl_row(bench, code, row):
    return BenchmarkProblem(
        f"{bench}/{code}/{row['name']}",
        bench,
        row["prompt"],
        row["prompt"],
        row["tests"],
        tuple(row["stop_tokens"]),
    )


def _cross_row(row, code, source):
    id = f"crosspleval/{source}-{code}/{row['id']}"
    return BenchmarkProblem(
        id,
        "crosspleval",
        row["source"],
        row["prompt"],
        row["tests"],
        tuple(row["stop_tokens"]),
        row["source"],
        source,
    )


def _with_sources(rows, source, data):
    """Rows of translate: the canonical solution of the same number in the source language."""
    if source not in SOURCES:
        raise ValueError(f"no translation sources in {source!r}: use {', '.join(SOURCES)}")
    name = (
        "humaneval/HumanEval" if source == "python" else f"humaneval_x/humaneval_{SOURCES[source]}"
    )
    programs = dict(
        read_jsonl(
            _need(f"{name}.jsonl", data),
            lambda _, row: (
                row["task_id"].split("/")[1],
                row["prompt"] + row["canonical_solution"],
            ),
        )
    )
    found = []
    for row in rows:
        number = re.search(r"HumanEval_(\d+)_", row.id)[1]
        id = row.id.replace("translate/", f"translate/{source}-", 1)
        found.append(
            replace(
                row,
                id=id,
                question=programs[number],
                source=programs[number],
                source_language=source,
            )
        )
    return found


# ---- prompts ----

# Listing 1 of Inoue & Tsuruoka, the prompt that their tuned models are evaluated with.
THINK = """# Task: You will be given a question (problem specification) and will generate a correct {title} program that matches the \
specification and passes all tests. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> \
tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. Your final answer should be \
wrapped in ```{fence}``` tags.
Question: {question}

You will use the following starter code to write the solution to the problem and enclose your code within delimiters.
```{fence}
{starter}
{comment} YOUR CODE HERE
```
"""


def benchmark_prompt(row, language, mode):
    """What the model is given: text to go on from ("completion", "think") or chat messages ("chat").

    completion, for base models: the row's prompt, after the source program as a comment when there is one. think: Listing 1 as
    it stands, ending in "Assistant: <think>". chat: the same request as a user turn, for instruct models.
    """
    language = language_of(language)
    if mode == "completion":
        commented = "".join(f"{language.comment} {line}\n" for line in row.source.splitlines())
        return (
            f"{language.comment} {row.source_language}:\n{commented}\n" if row.source else ""
        ) + row.prompt.rstrip()
    question = (
        f"Translate this {row.source_language} program to {language.title}:\n{row.source}"
        if row.source
        else row.prompt.strip()
    )
    text = THINK.format(
        title=language.title,
        fence=language.fence[0],
        question=question,
        starter=row.prompt.rstrip(),
        comment=language.comment,
    )
    if mode == "think":
        return f"{text}\nAssistant: <think>"
    return [{"role": "user", "content": text.strip()}]


def program(row, text, language, mode):
    """The whole program of a completion: prompt + completion, cut at the first stop token, + tests; "" when there is no code."""
    if mode == "completion":
        cut = min(
            (found for stop in row.stop_tokens if (found := text.find(stop)) >= 0), default=None
        )
        return f"{row.prompt.rstrip()}{text[:cut]}\n{row.tests}"
    unfinished = mode == "think" and "</think>" not in text
    code = "" if unfinished else answer_block(text, language_of(language))
    if not code:
        return ""
    return f"{_complete(row, code)}\n{row.tests}"


def answer_block(text, language):
    """The last fenced block after the reasoning; "" when there is none."""
    answer = text.rpartition("</think>")[2]
    fences = "|".join(re.escape(name) for name in language.fence)
    blocks = re.findall(rf"```(?:{fences})?[ \t]*\n(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    return blocks[-1].strip("\n") if blocks else ""


def _complete(row, code):
    """A whole function in place of prompt + completion: the prompt's first lines (imports) when they are missing, and without
    the closing braces that MultiPL-E's tests bring themselves."""
    if row.prompt.strip() in code or _signature(row) in code:
        opening = [line for line in _preamble(row) if line.strip() and line.strip() not in code]
        code = "\n".join([*opening, code])
        for _ in range(_closed_by_tests(row)):
            code = code.rstrip().removesuffix("}")
        return code
    return row.prompt.rstrip() + "\n" + code  # only the body


def _signature(row):
    """The name that the prompt's last lines define."""
    name = re.sub(r"(HumanEval|mbpp)_\d+_", "", row.id.rpartition("/")[2])
    camel = name.split("_")[0] + "".join(word.capitalize() for word in name.split("_")[1:])
    return camel if camel in row.prompt and name not in row.prompt else name


def _preamble(row):
    """Lines of the prompt before its first comment or definition: #lang, imports, an enclosing class."""
    lines = []
    for line in row.prompt.splitlines():
        if _signature(row) in line or re.match(
            r"\s*(//|#(?!lang|include)|--|;|\(\*|/\*|\"\"\"|def |function )", line
        ):
            break
        lines.append(line)
    return lines


def _closed_by_tests(row):
    """How many braces the tests close: 1 for "}" (C++, Rust, Bash), 2 when they also close the class (Java)."""
    if not row.tests.lstrip().startswith("}"):
        return 0
    return 2 if row.prompt.count("{") - row.prompt.count("}") > 1 else 1


# ---- verdicts ----


class TestJudge:
    """Scores completions of benchmark rows, with the same submit() and collect() as rewards.Judge.

    The tests run in the program's own process, so whatever they print to prove that they ran, the program could print too. Hence:
    1. The program ends with 0, keeps upstream's rule, and prints after the last test a random number, of which only two summands
       stand in its file: leaving early, printing look-alikes or one's own file is not enough.
    2. A program that passed runs once more, under tests in which the right answers of two tests are exchanged. A right program fails
       there. One that passes there too is a forger, by whatever means (status "forged"): its verdict does not depend on the tests.
    What gets through is a program that knows the answers of exactly those tests (two, chosen at random, not among the examples of
    the prompt where there are others), and one that forges by chance: one time in four at best.
    """

    __test__ = False  # not a pytest class

    def __init__(self, pool, language, mode="completion"):
        self.pool, self.language, self.mode = pool, language_of(language), mode
        self.table = tests_table(self.language)
        self._secret = os.urandom(16)
        if pool:
            self._need_library()

    def _need_library(self):
        """Without its test library every right program would fail, so it is asked for before the first one runs."""
        if "probe" not in self.table:
            return
        result = self.pool.submit(self._job({self.language.file: self.table["probe"]})).result()
        if result.status not in ("ok", "sandbox_error"):
            raise ValueError(
                f"MultiPL-E's {self.language.title} tests need {self.table['library']}, which is not here: {self.table['install']}"
            )

    def submit(self, row, text, sample=0):
        """Start a completion's program under the row's tests. Returns the Submission that collect() takes."""
        source = program(row, text, self.language, self.mode)
        outcome = concurrent.futures.Future() if source else None  # of (status, passed)
        if source:
            self._start(
                source,
                f"{row.id}/{sample}",
                outcome,
                lambda *first: self._confirm(row, text, outcome, *first),
            )
        return Submission(row, sample, text, Parsed("", source, "", bool(source)), "", outcome)

    def _start(self, source, id, outcome, then):
        """Run a program with its tests. A thread of the pool sets `outcome` to then(status, passed), unless that is None."""
        # Numbers per program, not per sample: equal programs stay equal jobs, which the pool's cache runs once.
        digest = hmac.new(self._secret, source.encode("utf-8", "replace"), "sha256").digest()
        numbers = [
            int.from_bytes(part, "big") % 10**14 for part in (digest[:8], digest[8:16])
        ]  # their sum is exact in a double

        def ended(future):
            try:
                result = future.result()
                verdict = then(
                    result.status, result.status == "ok" and self.passes(result, str(sum(numbers)))
                )
            except (
                Exception
            ) as error:  # nobody would see it in this thread, and the outcome would never come
                outcome.set_exception(error)
            else:
                if verdict:
                    outcome.set_result(verdict)

        self.pool.submit(self.job(source, numbers, id)).add_done_callback(ended)

    def _confirm(self, row, text, outcome, status, passed):
        """The outcome of a program that failed; for one that passed None, and a run under exchanged answers."""
        tests = (
            exchange_answers(
                row,
                self.table["test"],
                random.Random(self._secret + text.encode("utf-8", "replace")),
            )
            if passed
            else None
        )
        if tests is None:
            return status, passed

        def verdict(status, passed):
            return (
                (status, False)
                if status == "sandbox_error"
                else ("forged", False)
                if passed
                else ("ok", True)
            )

        self._start(
            program(replace(row, tests=tests), text, self.language, self.mode),
            row.id,
            outcome,
            verdict,
        )

    def job(self, source, numbers, id=None):
        """The sandbox job of a whole program with its tests: the sum of the numbers is printed where the last test has passed."""
        printing = (
            self.table["print"].replace("{a}", str(numbers[0])).replace("{b}", str(numbers[1]))
        )
        ended = re.sub(
            self.table.get("last", r"\Z"), lambda _: printing, source.rstrip() + "\n", count=1
        )
        return self._job({self.table.get("file", self.language.file): ended}, id)

    def _job(self, files, id=None):
        run = self.table.get("run")
        compiles = run and self.language.compile  # such as go test
        limits = replace(
            self.language.compile_limits if compiles else self.language.limits,
            cpu=self.table.get("cpu", 15.0),
            wall=None,
        )
        return Job(self.language.name, files, limits=limits, id=id, run=run)

    def collect(self, submissions, deadline=None):
        """Verdicts in order. Programs that are not done `deadline` seconds from now count as sandbox errors (nan)."""
        concurrent.futures.wait([s.future for s in submissions if s.future], timeout=deadline)
        return [self._verdict(submission) for submission in submissions]

    def _verdict(self, submission):
        status, passed = "no_program", False
        if submission.future:
            status, passed = (
                submission.future.result() if submission.future.done() else ("sandbox_error", False)
            )
        reward = float("nan") if status == "sandbox_error" else float(passed)
        return Verdict(
            submission.problem.id,
            reward,
            {"correct": reward},
            passed,
            status,
            None,
            submission.parsed.code,
            submission.parsed,
            False,
            False,
        )

    def passes(self, result, printed):
        """Upstream's rule, and what was to be printed, on a line of its own."""
        stdout, stderr = (
            result.stdout.decode(errors="replace"),
            result.stderr.decode(errors="replace"),
        )
        both = stdout + stderr
        return (
            printed in (line.strip() for line in stdout.splitlines())
            and self.table.get("must", "") in both
            and not (self.table.get("must_not") and self.table["must_not"] in both)
            and not (self.table.get("quiet") and stderr.strip())
        )


def _nested(depth=8):
    """Regular expression for text whose round brackets are balanced; strings may hold any."""
    plain = r'"(?:\\.|[^"\\])*"|' + r"'(?:\\.|[^'\\])*'" + r'|[^()"]'
    pattern = plain
    for _ in range(depth):
        pattern = rf"{plain}|\((?:{pattern})*\)"
    return f"(?:{pattern})*"


NESTED = _nested()


def exchange_answers(row, test, rng):
    """The row's tests with the right answers of two tests exchanged; None where no test is found (none in MultiPL-E's rows).

    test: regular expression of one test, with groups `arguments` and `expected`. Tests that the prompt does not show come first.
    Where all tests expect the same, one answer's last number is raised by 1.
    """
    found = list(re.finditer(test.replace("{nested}", NESTED), row.tests))
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if a["expected"] != b["expected"]]
    hidden = [
        pair
        for pair in pairs
        if not any(match["arguments"].strip() in row.prompt for match in pair)
    ]
    if pairs:
        first, second = rng.choice(hidden or pairs)
        changes = [
            (first.span("expected"), second["expected"]),
            (second.span("expected"), first["expected"]),
        ]
    else:
        numbered = [match for match in found if re.search(r"\d", match["expected"])]
        changes = [(match.span("expected"), _raised(match["expected"])) for match in numbered[:1]]
    tests = row.tests
    for (start, end), text in reversed(changes):
        tests = tests[:start] + text + tests[end:]
    return tests if changes else None


def _raised(text):
    """Text with its last number raised by 1."""
    return re.sub(r"\d+(?=\D*\Z)", lambda match: str(int(match[0]) + 1), text)
