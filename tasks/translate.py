"""Code translation with a hidden unit test as the reward (OORL, arXiv 2505.12723).

A problem has a source function (Python or C++), a target language drawn for it, and input/output
cases that belong to no language. How the cases are put to the target is its interface:

    call    the target's TOML has a [call] table: the model writes a function `f`, which is called
            with each case's arguments as literals of the language
    stdin   any other: it writes a program that reads them from standard input

What comes out is compared here: neither prompt nor sandbox ever sees an expected output. Problems
of the user's own (SYNTHETIC-1, APPS ...) are JSON lines, given by --translate_data; docs/oorl.md
has the form.
"""

import concurrent.futures
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

from sandbox import Job
from sandbox.languages import load_language
from sandbox.languages.calls import call_files, outcomes
from sandbox.languages.headers import with_header
from sandbox.languages.literals import read_one
from sandbox.languages.values import Map, write
from tasks.answers import same_output, same_value
from tasks.contamination import read_benchmark, shows_cases
from tasks.data import hold_out, without_variant
from tasks.fences import defining_block, fenced_blocks, unix_lines
from tasks.translate_data import SETS, TRANSLATABLE, Translation, built_in, read_problems
from tasks.verdicts import Parsed, Verdict, tossed

HELD_OUT = 0.1  # share of problems kept for evaluation, by their id
CASES = 10  # at most, of a problem: calls are one process together
# Arguments on standard input take a process for each case, and in many languages a compilation.
ARGUMENT_LINES = 4
LEAST_CASES = 3  # different ones, of a problem

CALL_PROMPT = """Translate this {source} code to {title}.

```{source_fence}
{question}
```

Write the {title} counterpart of `{entry}` and call it `f`: same arguments in the same order, \
same result. {rules}
Hidden tests call it. {shape}"""
STDIN_PROMPT = """Translate this {source} code to {title}.

```{source_fence}
{question}
```

Write a {title} program that {task}. Hidden tests run it. {shape}"""
TEXT_PROMPT = """Write a {title} program that solves this problem. It reads standard input and \
prints its answer.

{question}

Hidden tests run it. {shape}"""
READS_ARGUMENTS = """reads the arguments of `{entry}` from standard input, one per line and in \
their order, and prints its result. Numbers and text stand as they are, truth values are true or \
false, and a list is its elements with one space between"""
READS_THE_SAME = "does the same: it reads the same standard input and prints the same"
SHAPE = """Answer with exactly one ```{fence} code block that holds the whole {title} code, and \
nothing after it."""


# ---- which problem goes to which language ----


def load_splits(settings, report=print):
    """(problems to train on, validation problems, held-out problems) for train.py's settings.

    --lang names the target languages, with commas.
    """
    if settings.model == "tiny":
        raise ValueError(
            "the built-in tiny model knows no source code: "
            "give --task translate a pretrained --model"
        )
    targets = [load_language(name) for name in settings.lang.split(",")]
    where = {"data": settings.data or None, "path": settings.translate_data, "report": report}
    whole = load_translations("train", targets, **where, seed=settings.seed)
    train, validation = hold_out(whole, settings.validation_problems, family)
    held_out = load_translations("test", targets, **where)
    return train, validation, held_out


def load_translations(split, targets, data=None, path="", seed=0, report=print):
    """list[Translation] for target languages, one drawn for each problem by `seed`.

    targets: Language objects; a problem goes to one that can say its cases.
    path: JSON lines of the user's instead of the built-in sets.
    split: every tenth problem by id is held out for "test".
    What overlaps MultiPL-E (its name, MBPP id, or 13 words in a row of a prompt or canonical
    solution) is dropped, and what a program that computes nothing passes (is_telling), with its
    count. ValueError with a sentence when nothing is left.
    """
    problems = read_problems(path) if path else built_in(data)
    benchmark = read_benchmark(data)
    drawn = []
    dropped = 0
    for problem in problems:
        if benchmark.contains(problem) or shows_cases(problem):
            continue
        if is_held_out(problem) != (split == "test"):
            continue
        problem = replace(problem, cases=by_novelty(problem.cases))
        fitting = [target for target in targets if _fits(problem, target)]
        telling = [target for target in fitting if is_telling(tried_cases(problem, target))]
        dropped += bool(fitting) and not telling
        if telling:
            target = random.Random(f"{seed}/{problem.id}").choice(telling)
            drawn.append(replace(problem, target=target.name))

    if dropped:
        report(
            f"translation, {split}: {dropped} problems left out whose tests a constant or an "
            f"argument given back passes, or that have fewer than {LEAST_CASES}; "
            f"{len(drawn)} are left"
        )
    if not drawn:
        origin = path or ", ".join(SETS)
        names = ", ".join(target.name for target in targets)
        raise ValueError(
            f"no problem of {origin} can be translated to {names}: "
            "check --lang and --translate_data"
        )
    return drawn


def is_held_out(problem):
    return random.Random(family(problem)).random() < HELD_OUT


def family(problem):
    """A problem's name: a function held out in one source language or variant is in all."""
    return without_variant(problem.id.rpartition("/")[0] or problem.id)


def _fits(problem, target):
    return target.name != problem.source_language and interface(problem, target) is not None


# ---- which cases tell a right program from an empty one ----


def by_novelty(cases):
    """Cases in another order: first one of each output, then a second one of each, and so on.

    Outputs 1 1 1 0 2 1 become 1 0 2 1 1 1: a program is tried on the first few alone.
    """
    seen = Counter()
    ranks = []
    for case in cases:
        output = repr(case.stdout if case.stdin is not None else case.expected)
        ranks.append(seen[output])
        seen[output] += 1
    order = sorted(range(len(cases)), key=ranks.__getitem__)  # stable
    return tuple(cases[i] for i in order)


def is_telling(cases):
    """Whether cases tell a right program from one that computes nothing, as the judge compares.

    cases: tried_cases(). A constant passes where all outputs are one, the identity where each is
    the input or always the same argument. "8" passes for "08": they are the same number.
    """
    if len({repr(given) for given, _ in cases}) < LEAST_CASES:
        return False

    outputs = [output for _, output in cases]
    is_text = isinstance(cases[0][0], str)
    rows = [[given, *given.splitlines()] if is_text else given for given, _ in cases]
    constants = [[output] * len(outputs) for output in outputs]
    passes = same_output if is_text else _is_same_json
    return not any(all(map(passes, column, outputs)) for column in [*constants, *zip(*rows)])


def _is_same_json(answer, output):
    """same_value of a JSON value, as if a program had printed it."""
    return same_value(_as_printed(answer), output)


def _as_printed(value):
    if isinstance(value, dict):
        return Map(tuple((key, _as_printed(item)) for key, item in value.items()))
    return [_as_printed(item) for item in value] if isinstance(value, list) else value


# ---- cases in a target language ----


def interface(problem, language):
    """How a problem's cases are put to a target: "call", "stdin", or None when they cannot be."""
    if problem.cases[0].stdin is not None:
        return "stdin"

    can_call = "values" in language.call and "main" in language.call
    values = _values(problem.cases[:CASES])
    if can_call and all(_is_writable(value, language) for value in values):
        # f is called with at least one argument.
        return "call" if all(case.args for case in problem.cases) else None

    values = _values(problem.cases[:ARGUMENT_LINES])
    return "stdin" if all(_line(value) is not None for value in values) else None


def _values(cases):
    """All arguments and expected values of some cases."""
    values = []
    for case in cases:
        values += [*case.args, case.expected]
    return values


def _is_writable(value, language):
    """Whether the language has a literal for a value."""
    try:
        write(value, language)
    except ValueError:
        return False
    return True


def tried_cases(problem, language):
    """[(arguments or standard input, expected value or output)] that a program is tried on."""
    if interface(problem, language) == "stdin":
        return stdin_cases(problem)
    return [(case.args, case.expected) for case in problem.cases[:CASES]]


def stdin_cases(problem):
    """[(standard input, expected output)] of a problem whose interface is stdin."""
    if problem.cases[0].stdin is not None:
        return [(case.stdin, case.stdout) for case in problem.cases[:CASES]]
    cases = []
    for case in problem.cases[:ARGUMENT_LINES]:
        lines = [f"{_line(value)}\n" for value in case.args]
        cases.append(("".join(lines), _line(case.expected)))
    return cases


def _line(value):
    """A value as one line of standard input or output, None when it cannot be one.

    3, 2.5, true, text as it is, a flat list with one space between.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 2**53 else None  # many languages read it as a double
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        is_plain = value and value.strip() == value and value.isprintable()
        return value if is_plain else None
    if not isinstance(value, list):
        return None

    parts = []
    for item in value:
        part = _line(item)
        if part is None or isinstance(item, list):
            return None
        if isinstance(item, str) and re.search(r"\s", item):
            return None
        parts.append(part)
    return " ".join(parts)


def translation_messages(problem):
    """The chat that asks for a translation. No input or expected output of the tests is in it."""
    target = load_language(problem.target)
    words = {
        "source": TRANSLATABLE.get(problem.source_language),
        "source_fence": problem.source_language,
        "question": problem.question,
        "title": target.title,
        "entry": problem.entry,
        "rules": target.call.get("rules", ""),
        "shape": SHAPE.format(fence=target.fence[0], title=target.title),
    }
    if problem.source_language == "text":
        content = TEXT_PROMPT.format(**words)
    elif interface(problem, target) == "call":
        content = CALL_PROMPT.format(**words)
    else:
        task = READS_ARGUMENTS.format(**words) if problem.entry else READS_THE_SAME
        content = STDIN_PROMPT.format(**words, task=task)
    return [{"role": "user", "content": content}]


# ---- the judge ----


@dataclass(frozen=True)
class TranslateSubmission:
    """A translation whose tests are running."""

    problem: Translation
    sample: int
    text: str
    parsed: Parsed
    nonce: str
    runs: list  # a future for each job
    future: concurrent.futures.Future | None  # done when all of them are


def make_translate_judge(settings, pool):
    """--reward as a TranslateJudge: correct=1 or random."""
    if settings.reward not in ("correct=1", "random"):
        raise SystemExit(
            f"--reward {settings.reward}: translate has one reward, correct=1 "
            "(form, compilation and all tests), or random"
        )
    return TranslateJudge(pool, settings.reward == "random", settings.seed)


class TranslateJudge:
    """Binary reward: 1 when the form is right, the program compiles and every hidden case passes.

    A judge as tasks/verdicts.py describes it.
    random_reward: the control, a fair coin for each (seed, problem, sample).
    """

    def __init__(self, pool, random_reward=False, seed=0):
        self.pool = pool
        self.random_reward = random_reward
        self.seed = seed

    def stop_strings(self, problem):
        """None: the form is checked to the end of a completion."""
        return ()

    def submit(self, problem, text, sample=0):
        """Start the tests of a completion's program at once -> TranslateSubmission."""
        language = load_language(problem.target)
        entry = "f" if interface(problem, language) == "call" else ""
        parsed = parse_translation(text, language, entry)
        nonce = os.urandom(12).hex()
        runs, future = [], None
        if parsed.code.strip():
            jobs = case_jobs(problem, language, parsed.code, nonce)
            runs = [self.pool.submit(job) for job in jobs]
            future = _when_all_are_done(runs)
        return TranslateSubmission(problem, sample, text, parsed, nonce, runs, future)

    def collect(self, submissions, deadline=None):
        """Verdicts in order.

        What is not done `deadline` seconds from now is a sandbox error (nan), never a 0.
        """
        started = [submission.future for submission in submissions if submission.future]
        concurrent.futures.wait(started, timeout=deadline)
        return [self._verdict(submission) for submission in submissions]

    def _verdict(self, submission):
        problem, parsed = submission.problem, submission.parsed
        status = _status(submission.runs)
        printed = _printed_cases(submission) if status == "ok" else []
        passed = [is_right for is_right, _ in printed]
        # The same for every case, though what is asked for never is (is_telling).
        is_constant = len(printed) > 1 and len({text for _, text in printed}) == 1

        correct = bool(passed) and all(passed)
        share = sum(passed) / len(passed) if passed else 0.0
        reward = float(correct and parsed.format_ok)
        if status == "sandbox_error" and parsed.format_ok:
            reward = share = math.nan
        components = {"correct": reward, "format": float(parsed.format_ok), "tests_passed": share}
        verdict = Verdict(
            problem=problem.id,
            reward=reward,
            components=components,
            correct=correct,
            status=status,
            value=f"{sum(passed)}/{len(problem.cases)}",
            program=parsed.code,
            parsed=parsed,
            constant=is_constant and not correct,
            target=problem.target,
        )
        if self.random_reward:
            return tossed(verdict, self.seed, submission.sample)
        return verdict


def parse_translation(text, language, entry=""):
    """The code of a completion, and whether its form is right.

    Right is exactly one block between lines of three backticks, marked with the language, and
    nothing after it. Where there are more, the last one's code is run and counted, for the log: of
    those that define `entry`, the function that the tests call.
    """
    blocks = fenced_blocks(text)
    block = defining_block(blocks, entry, language)
    if block is None:
        return Parsed(reasoning="", code="", query="", format_ok=False)

    code = block.code.strip("\n")
    text = unix_lines(text).rstrip()
    only_one = len(blocks) == 1 and text.count("```") == 2
    opens_a_line = block.before == ""
    is_last = text.endswith("\n```")
    is_marked = block.info.lower() in language.fence
    format_ok = only_one and opens_a_line and is_last and is_marked and bool(code.strip())
    return Parsed(reasoning="", code=code, query="", format_ok=format_ok)


def case_jobs(problem, language, code, nonce):
    """The sandbox jobs that try a program on its cases. No expected value is in them."""
    if interface(problem, language) == "call":
        return [_call_job(problem, language, code, nonce)]
    jobs = []
    for stdin, _ in stdin_cases(problem):
        files = {language.file: with_header(code, language) + "\n"}
        jobs.append(Job(language.name, files, stdin=stdin.encode()))
    return jobs


def _call_job(problem, language, code, nonce):
    """One job for all calls."""
    # Self-play bans what makes programs random; here re.compile is welcome.
    unbanned = replace(language, call={**language.call, "banned": []})
    calls = [list(case.args) for case in problem.cases[:CASES]]
    return Job(language.name, call_files(unbanned, code, calls, nonce))


def _when_all_are_done(runs):
    """A Future that is done when all of them are."""
    whole, left = concurrent.futures.Future(), [len(runs)]

    def one_less(_):
        left[0] -= 1
        if left[0] == 0:
            whole.set_result(None)

    for run in runs:
        run.add_done_callback(one_less)
    return whole


def _status(runs):
    """One status for all runs: a sandbox error if there is one, else the first that is not ok."""
    if not runs:
        return "no_program"
    statuses = [run.result().status if run.done() else "sandbox_error" for run in runs]
    if "sandbox_error" in statuses:
        return "sandbox_error"
    return next((status for status in statuses if status != "ok"), "ok")


def _printed_cases(submission):
    """[(passed, what was printed)] for each case that was run, when all runs ended well."""
    problem = submission.problem
    language = load_language(problem.target)
    results = [run.result() for run in submission.runs]

    if interface(problem, language) == "call":
        cases = problem.cases[:CASES]
        printed = []
        for (kind, text), case in zip(outcomes(results[0], submission.nonce, len(cases)), cases):
            passed = kind == "value" and _value_passes(text, case.expected, language)
            printed.append((passed, text))
        return printed

    printed = []
    for result, (_, wanted) in zip(results, stdin_cases(problem)):
        text = result.stdout.decode(errors="replace")
        printed.append((same_output(text, wanted), text))
    return printed


def _value_passes(text, expected, language):
    try:
        return same_value(read_one(text, language), expected)
    except ValueError:
        return False
