"""Code translation with a hidden unit test as the reward (OORL, arXiv 2505.12723): problems, prompts, and the judge.

A problem has a source function (Python or C++), a target language drawn for it, and input/output cases that belong to no language. In a language whose
TOML has a [call] table the model writes a function `f`, which is called with each case's arguments as literals of that language; in any other it writes
a program that reads them from standard input. What comes out is compared here: neither prompt nor sandbox ever sees an expected output.

Problems of the user's own (SYNTHETIC-1, APPS ...) are JSON lines, given by --translate_data; README has the form.
"""

import concurrent.futures
import math
import os
import random
import re
from dataclasses import dataclass, replace

from sandbox import Job
from sandbox.languages import load_language
from sandbox.languages.calls import call_files, outcomes
from sandbox.languages.literals import read_one
from sandbox.languages.values import write
from tasks.answers import same_output, same_value
from tasks.translate_data import (
    SETS,
    TRANSLATABLE,
    Translation,
    built_in,
    read_benchmark,
    read_problems,
    shows_cases,
)
from tasks.verdicts import Parsed, Verdict

HELD_OUT = 0.1  # share of problems kept for evaluation, by their id
CALLS, RUNS = (
    10,
    4,
)  # cases per problem: calls are one process together, standard input takes a process (and a compilation) each


# ---- which problem goes to which language ----


def load_translations(split, targets, data=None, path="", count=None, seed=0):
    """list[Translation] for the target languages (Language objects), one drawn for each problem by `seed` among those that can say its cases.

    path: JSON lines of the user's instead of the built-in sets. Every tenth problem by id is held out for split "test". What overlaps MultiPL-E
    (its name, MBPP id, or 13 words in a row of a prompt or canonical solution) is dropped. ValueError with a sentence when nothing is left.
    """
    problems = read_problems(path) if path else built_in(data)
    benchmark = read_benchmark(data)
    kept = [
        p
        for p in problems
        if not benchmark.contains(p)
        and not shows_cases(p)
        and is_held_out(p.id) == (split == "test")
    ]
    drawn = []
    for p in kept:
        fits = [t for t in targets if t.name != p.source_language and form(p, t)]
        if fits:
            drawn.append(
                Translation(
                    **{**vars(p), "target": random.Random(f"{seed}/{p.id}").choice(fits).name}
                )
            )
    if not drawn:
        raise ValueError(
            f"no problem of {path or ', '.join(SETS)} can be translated to {', '.join(t.name for t in targets)}: check --lang and --translate_data"
        )
    if count is None or count >= len(drawn):
        return drawn
    return [drawn[i] for i in sorted(random.Random(seed).sample(range(len(drawn)), count))]


def load_both(s):
    """(problems to train on, held-out problems) for train.py's settings: --lang names the targets, with commas."""
    if s.model == "tiny":
        raise ValueError(
            "the built-in tiny model knows no source code: give --task translate a pretrained --model"
        )
    targets = [load_language(name) for name in s.lang.split(",")]
    where = dict(data=s.data or None, path=s.translate_data)
    return load_translations("train", targets, **where, seed=s.seed), load_translations(
        "test", targets, **where, count=s.eval_problems, seed=0
    )


def is_held_out(id):
    """The same for every source language of a problem, so that a held-out function is in no training prompt."""
    return random.Random(id.rpartition("/")[0] or id).random() < HELD_OUT


# ---- cases in a target language ----


def form(problem, language):
    """How a problem's cases are put to a target: "call" (literals, [call] table), "stdin", or None when the language cannot say them."""
    if problem.cases[0].stdin is not None:
        return "stdin"
    if (
        "values" in language.call
        and "main" in language.call
        and all(
            _writable(v, language) for c in problem.cases[:CALLS] for v in (*c.args, c.expected)
        )
    ):
        return "call" if all(c.args for c in problem.cases) else None
    return (
        "stdin"
        if all(_line(v) is not None for c in problem.cases[:RUNS] for v in (*c.args, c.expected))
        else None
    )


def _writable(value, language):
    try:
        write(value, language)
        return True
    except ValueError:
        return False


def _line(value):
    """A value as one line of standard input or output: 3, 2.5, true, text as it is, a flat list with one space between; None when it cannot be one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 2**53 else None
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return value if value.strip() == value and value.isprintable() and value else None
    if not isinstance(value, list) or any(
        isinstance(v, (list, str)) and (not isinstance(v, str) or not v or re.search(r"\s", v))
        for v in value
    ):
        return None
    parts = [_line(v) for v in value]
    return None if None in parts else " ".join(parts)


CALL_PROMPT = """Translate this {source} code to {title}.

```{source_fence}
{question}
```

Write the {title} counterpart of `{entry}` and call it `f`: same arguments in the same order, same result. {rules}
Hidden tests call it. {shape}"""
STDIN_PROMPT = """Translate this {source} code to {title}.

```{source_fence}
{question}
```

Write a {title} program that {task}. Hidden tests run it. {shape}"""
READS_ARGUMENTS = """reads the arguments of `{entry}` from standard input, one per line and in their order, and prints its result. \
Numbers and text stand as they are, truth values are true or false, and a list is its elements with one space between"""
SHAPE = "Answer with exactly one ```{fence} code block that holds the whole {title} code, and nothing after it."


def translation_messages(problem):
    """The chat that asks for a translation. Expected outputs and inputs of the tests are not in it."""
    target = load_language(problem.target)
    words = {
        "source": TRANSLATABLE[problem.source_language],
        "source_fence": problem.source_language,
        "question": problem.question,
        "title": target.title,
        "entry": problem.entry,
        "rules": target.call.get("rules", ""),
        "shape": SHAPE.format(fence=target.fence[0], title=target.title),
    }
    if form(problem, target) == "call":
        return [{"role": "user", "content": CALL_PROMPT.format(**words)}]
    task = (
        READS_ARGUMENTS.format(**words)
        if problem.entry
        else "does the same: it reads the same standard input and prints the same"
    )
    return [{"role": "user", "content": STDIN_PROMPT.format(**words, task=task)}]


# ---- the judge ----


def make_translate_judge(s, pool):
    """--reward as a TranslateJudge: correct=1 or random."""
    if s.reward not in ("correct=1", "random"):
        raise SystemExit(
            f"--reward {s.reward}: translate has one reward, correct=1 (form, compilation and all tests), or random"
        )
    return TranslateJudge(pool, s.reward == "random", s.seed)


@dataclass(frozen=True)
class TranslateSubmission:
    """A translation whose tests are running. future: done when all of them are."""

    problem: Translation
    sample: int
    text: str
    parsed: Parsed
    nonce: str
    jobs: list
    future: concurrent.futures.Future | None


def parse_translation(text, language):
    """The code of a completion and whether its form is right: exactly one fenced block, marked with the language, nothing after it."""
    blocks = re.findall(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", text, re.DOTALL | re.MULTILINE)
    right = (
        len(blocks) == 1
        and text.count("```") == 2
        and text.rstrip().endswith("```")
        and blocks[0][0].strip().lower() in language.fence
    )
    code = blocks[-1][1].strip("\n") if blocks else ""
    return Parsed("", code, "", right and bool(code.strip()))


class TranslateJudge:
    """Binary reward: 1 when the form is right, the program compiles and every hidden case passes; submit() and collect() as rewards.Judge.

    random_reward: the control, a fair coin per (seed, problem, sample).
    """

    def __init__(self, pool, random_reward=False, seed=0):
        self.pool, self.random_reward, self.seed = pool, random_reward, seed

    def submit(self, problem, text, sample=0):
        """Start the tests of a completion's program at once. Returns the TranslateSubmission that collect() takes."""
        language = load_language(problem.target)
        parsed, nonce = parse_translation(text, language), os.urandom(12).hex()
        jobs = (
            [self.pool.submit(job) for job in case_jobs(problem, language, parsed.code, nonce)]
            if parsed.code.strip()
            else []
        )
        return TranslateSubmission(
            problem, sample, text, parsed, nonce, jobs, _when_all_are_done(jobs) if jobs else None
        )

    def collect(self, submissions, deadline=None):
        """Verdicts in order; what is not done `deadline` seconds from now is a sandbox error (nan), never a 0."""
        concurrent.futures.wait([s.future for s in submissions if s.future], timeout=deadline)
        return [self._verdict(s) for s in submissions]

    def _verdict(self, s):
        status, passed = self._outcome(s)
        correct = bool(passed) and all(passed)
        share = sum(passed) / len(passed) if passed else 0.0
        reward = float(correct and s.parsed.format_ok)
        if status == "sandbox_error" and s.parsed.format_ok:
            reward = share = math.nan
        components = {"correct": reward, "format": float(s.parsed.format_ok), "tests_passed": share}
        if self.random_reward:
            reward = float(random.Random(f"{self.seed}/{s.problem.id}/{s.sample}").random() < 0.5)
        return Verdict(
            problem=s.problem.id,
            reward=reward,
            components=components,
            correct=correct,
            status=status,
            value=f"{sum(passed)}/{len(s.problem.cases)}",
            program=s.parsed.code,
            parsed=s.parsed,
            constant=False,
            leaked=False,
        )

    def _outcome(self, s):
        """(status, [passed] per case that was run): the first status that is not ok speaks for all."""
        if not s.jobs:
            return "no_program", []
        results = [job.result() if job.done() else None for job in s.jobs]
        statuses = [r.status if r else "sandbox_error" for r in results]
        status = (
            "sandbox_error"
            if "sandbox_error" in statuses
            else next((x for x in statuses if x != "ok"), "ok")
        )
        if status != "ok":
            return status, []
        language = load_language(s.problem.target)
        if form(s.problem, language) == "call":
            cases = s.problem.cases[:CALLS]
            printed = outcomes(results[0], s.nonce, len(cases))
            return status, [
                kind == "value" and _value_passes(text, c.expected, language)
                for (kind, text), c in zip(printed, cases)
            ]
        wanted = [
            c.stdout if c.stdout is not None else _line(c.expected)
            for c in s.problem.cases[: len(results)]
        ]
        return status, [
            same_output(r.stdout.decode(errors="replace"), text) for r, text in zip(results, wanted)
        ]


def case_jobs(problem, language, code, nonce):
    """The sandbox jobs that try a program on its cases: one for all calls, or one for each standard input. No expected value is in them."""
    if form(problem, language) == "call":
        free = replace(
            language, call={**language.call, "banned": []}
        )  # self-play bans what makes programs random; here re.compile is welcome
        return [
            Job(
                language.name,
                call_files(free, code, [list(c.args) for c in problem.cases[:CALLS]], nonce),
            )
        ]
    lines = lambda c: c.stdin if c.stdin is not None else "".join(f"{_line(v)}\n" for v in c.args)
    cases = problem.cases if problem.cases[0].stdin is not None else problem.cases[:RUNS]
    return [
        Job(language.name, {language.file: code + "\n"}, stdin=lines(c).encode())
        for c in cases[:CALLS]
    ]


def _when_all_are_done(jobs):
    """A Future that is done when all of them are."""
    whole, left = concurrent.futures.Future(), [len(jobs)]

    def one_less(_):
        left[0] -= 1
        if left[0] == 0:
            whole.set_result(None)

    for job in jobs:
        job.add_done_callback(one_less)
    return whole


def _value_passes(text, expected, language):
    try:
        return same_value(read_one(text, language), expected)
    except ValueError:
        return False
