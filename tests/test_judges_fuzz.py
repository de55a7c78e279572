"""No completion and no output makes a judge fail or wait: every judge under random input.

A failure names the judge and a seed; with RARECODE_FUZZ=SEED the tests for longer begin there.
"""

import concurrent.futures
import gc
import json
import math
import os
import random
import re
import time
from dataclasses import replace
from fractions import Fraction

import pytest

import fuzz
from eval import judged_row
from rewards import COMPONENTS, Facts, Judge, answer_files, parse, printed_value
from sampler import Completion
from sandbox import Pool, Result
from sandbox.jobs import STATUSES
from sandbox.languages import language_names, load_language
from sandbox.languages.calls import outcomes
from sandbox.languages.headers import with_header
from sandbox.languages.literals import read, read_one
from sandbox.languages.values import same, write
from selfplay.judge import SolveJudge
from selfplay.parse import answer_of, compose, normalised, parse_proposal
from selfplay.puzzles import PAIRS, Entry, Puzzle, Refused
from selfplay.puzzles import TASKS as PUZZLES
from tasks import evalplus_run
from tasks.answers import same_output, same_value
from tasks.evalplus import PlusJudge, PlusProblem, Reference, result_lines
from tasks.fences import fenced_blocks
from tasks.multipl_e import BenchmarkProblem, TestJudge, program
from tasks.problems import Problem
from tasks.render import completion
from tasks.translate import TranslateJudge, interface, parse_translation
from tasks.translate_data import Case, Translation

LANGUAGES = [load_language(name) for name in language_names()]
BY_VALUE = [language for language in LANGUAGES if "main" in language.answer]
CALLED = [language for language in LANGUAGES if "main" in language.call]
TESTED = [language for language in LANGUAGES if "tests" in language.answer]
MOST_SECONDS = 1.0  # of CPU for one sample; the longest honest one takes some milliseconds


class Scripted:
    """A pool whose programs print what the test says."""

    def __init__(self):
        self.running = []

    def submit(self, job):
        future = concurrent.futures.Future()
        self.running.append((job, future))
        return future

    def end(self, stdout, status="ok"):
        """End all that runs, with this output."""
        ended, self.running = self.running, []
        for _, future in ended:
            future.set_result(Result(status, stdout, b"", 0, None, 0.1, 0.1, 1, "kernel", False))


def some_status(rng):
    return rng.choice(("ok", "ok", "ok", "ok", *STATUSES))


# ---- one sample for each judge: take(rng) -> verdict ----


def number(rng):
    language = rng.choice(BY_VALUE)
    problem = Problem("p", "sums", rng.choice(("How many?", fuzz.text(rng))), Fraction(7, 2))
    names = [name for name in COMPONENTS if language.check or name != "syntax"]
    pool = Scripted()
    judge = Judge(pool, language, dict.fromkeys(names, 1.0), gate=rng.random() < 0.5)
    whole = completion("r", *(fuzz.broken(rng, part) for part in ("f(1).", "f(X)")), language)
    text = rng.choice((fuzz.text(rng), fuzz.broken(rng, whole), whole))
    submission = judge.submit(problem, text)
    pool.end(fuzz.printed(rng, submission.nonce), some_status(rng))
    return text, judge.collect([submission], 0)[0]


EXPECTED = (3, 0.5, True, None, "a", "", [], {}, [1, [2.0]], {"a": 1}, 10**400, 1e308, [[[]]] * 9)


def translation(rng):
    language = rng.choice(CALLED if rng.random() < 0.8 else BY_VALUE)
    if rng.random() < 0.3:
        stdout = fuzz.text(rng)
        cases = [Case(args=(), expected=None, stdin="1\n", stdout=stdout)]
    else:
        cases = [Case(args=(2,), expected=rng.choice(EXPECTED)) for _ in range(3)]
    problem = Translation("x/1", "c", "q", "f", tuple(cases), target=language.name)
    if interface(problem, language) is None:  # the language has no literal for it
        cases = [Case(args=(2,), expected=3)]
        problem = replace(problem, cases=tuple(cases))
    pool = Scripted()
    judge = TranslateJudge(pool)
    block = f"```{language.fence[0]}\n{fuzz.broken(rng, 'f(1)')}\n```"
    text = rng.choice((block, fuzz.broken(rng, block), fuzz.text(rng)))
    submission = judge.submit(problem, text)
    pool.end(fuzz.printed(rng, submission.nonce, len(cases)), some_status(rng))
    return text, judge.collect([submission], 0)[0]


ADD = BenchmarkProblem(
    id="humaneval/py/HumanEval_53_add",
    task="humaneval",
    question="",
    prompt='def add(x: int, y: int) -> int:\n    """Add two numbers."""\n',
    tests="def check(candidate):\n    assert candidate(0, 1) == 1\n    assert candidate(2, 3) == 5\n",
    stop_tokens=("\ndef", "\n#", "\nif", "\nclass"),
    entry="add",
)


def benchmark(rng):
    language = rng.choice(TESTED)
    judge = TestJudge(None, language, rng.choice(("completion", "think", "chat")))
    judge.pool = pool = Scripted()
    block = (
        f"</think><answer>```{language.fence[0]}\ndef add(x, y):\n    return x + y\n```</answer>"
    )
    text = rng.choice((block, fuzz.broken(rng, block), fuzz.text(rng)))
    submission = judge.submit(ADD, text)
    while pool.running:  # one run may lead to another
        (file,) = pool.running[0][0].files.values()
        sums = [str(int(a) + int(b)) for a, b in re.findall(r"(\d{3,15})\D{1,6}(\d{3,15})", file)]
        said = fuzz.printed(rng) + "\n".join(["", *sums[-9:], ""]).encode() * rng.randint(0, 1)
        pool.end(said, some_status(rng))
    return text, judge.collect([submission], 0)[0]


PLUS = PlusProblem(
    id="humaneval+/py/HumanEval_53_add",
    task="humaneval+",
    question="",
    prompt=ADD.prompt,
    stop_tokens=(),
    entry="add",
    solution="",
    calls=(["list", 0, 1], ["list", 2, 3]),
    base=1,
    tolerance=0,
)
OTHER_ENTRIES = ("add", "find_zero", "Diff", "check_str", "surface_Area", "digit_distance_nums")
RESULTS = (1, 0.5, [1, 2.0], (1,), {1: 2}, {1}, None, True, 1 << 5000, 1j, b"a", "a" * 30_000)


def results(rng):
    entry = rng.choice(OTHER_ENTRIES)
    calls = [rng.choice(([1, 2], [[1, 2]], ["a", "b"])) for _ in range(2)]
    calls = tuple(map(evalplus_run.encode, calls))
    row = replace(PLUS, entry=entry, calls=calls, tolerance=rng.choice((0, 1e-6)))
    pool = Scripted()
    judge = PlusJudge(pool, "python", "chat")
    expected = [rng.choice(RESULTS) for _ in calls]
    done = concurrent.futures.Future()
    done.set_result(Reference(expected, [1 << 17] * 2, math.inf, [1.0, 1.0], 5.0))
    judge.references[row.id] = done
    text = rng.choice(("```python\ndef add(x, y): return 1\n```", fuzz.text(rng)))
    submission = judge.submit(row, text)
    lines = []
    for _ in range(rng.randint(0, 4)):
        lines.append(evalplus_run.MARK + fuzz.broken(rng, f"[0.1, 9, {coded(rng)}]"))
    pool.end("\n".join(lines).encode(errors="surrogatepass") + fuzz.printed(rng), some_status(rng))
    return text, judge.collect([submission], 0)[0]


def coded(rng, depth=0):
    """JSON as a forger of evalplus_run.encode would write it."""
    kinds = (
        "int",
        "complex",
        "bytes",
        "list",
        "tuple",
        "set",
        "dict",
        "ratio",
        "long",
        "other",
        "x",
    )
    if depth > 3 or rng.random() < 0.3:
        digits = rng.choice(fuzz.NUMBERS)[:9000]
        return rng.choice((digits, json.dumps(digits), "1", '"ff"', "null", "true", "1.5"))
    parts = [
        json.dumps(rng.choice(kinds)),
        *(coded(rng, depth + 1) for _ in range(rng.randint(0, 3))),
    ]
    inner = f"[{', '.join(parts)}]"
    return "[" * (5000 * (rng.random() < 0.02)) + inner


def puzzle(rng):
    language = rng.choice(CALLED)
    entry = Entry(language.call["identity"], ("1",) * 10, ("1",) * 10)
    asked = Puzzle("p", rng.choice(PUZZLES), entry)
    pool = Scripted()
    judge = SolveJudge(pool, language)
    tag = rng.choice(("input", "output", language.fence[0]))
    inner = fuzz.broken(rng, rng.choice(("1", language.call["identity"], fuzz.text(rng))))
    whole = f"</think> <answer>```{tag}\n{inner}\n```</answer>"
    text = rng.choice((whole, whole, fuzz.broken(rng, whole)))
    submission = judge.submit(asked, text)
    nonce = submission.running.nonce if submission.running else None
    pool.end(fuzz.printed(rng, nonce, 5), some_status(rng))
    return text, judge.collect([submission], 0)[0]


TAKES = (number, translation, benchmark, results, puzzle)


def take(judged, seed):
    """Judge one sample; what is wrong is said with all that is needed to see it again."""
    rng = random.Random(seed)
    started = time.process_time()
    text, verdict = "", None
    try:
        text, verdict = judged(rng)
        assert isinstance(verdict.reward, float)
        assert verdict.judged or verdict.status == "sandbox_error"
        assert not verdict.correct or verdict.status == "ok"
        row = judged_row(
            Problem("p", "sums", "?", None), Completion(0, 0, (1,), (0.0,), "stop"), text, verdict
        )
        json.dumps(row).encode()
        seconds = time.process_time() - started
        assert seconds < MOST_SECONDS, f"{seconds:.1f} s of CPU"
    except BaseException as error:
        said = f"{judged.__name__}, seed {seed}: {type(error).__name__}: {error}"
        raise AssertionError(f"{said}\ncompletion {text!r:.2000}\n{verdict!r:.2000}") from error


@pytest.mark.parametrize("judged", TAKES)
def test_a_judge_has_a_verdict_on_anything(judged):
    for seed in range(150):
        take(judged, seed)


@pytest.mark.slow
@pytest.mark.parametrize("judged", TAKES)
def test_a_judge_has_a_verdict_on_anything_for_longer(judged):
    """10 s each, and 20 s below: other samples every time."""
    for seed in seeds(10):
        take(judged, seed)


def seeds(seconds):
    """Seeds for so many seconds: others each time, or from RARECODE_FUZZ on."""
    seed = int(os.environ.get("RARECODE_FUZZ") or time.time_ns() // 1000)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield seed
        seed += 1


# ---- what self-play reads and writes again ----


def propose(seed):
    """A proposal is refused or becomes an entry; a literal is read and written, or a ValueError."""
    rng = random.Random(seed)
    language = rng.choice(CALLED)
    value = rng.choice((fuzz.value(rng, language), fuzz.text(rng)))
    program = fuzz.broken(rng, language.call["identity"])
    blocks = f"```input\n{value}\n```\n" * PAIRS
    answer = f"```{language.fence[0]}\n{program}\n```\n{blocks}```message\nm\n```"
    completion = f"</think> <answer>{rng.choice((answer, fuzz.broken(rng, answer)))}</answer>"
    try:
        try:
            parse_proposal(completion, rng.choice(PUZZLES), language, "f", ("f", "f")[: seed % 3])
        except Refused:
            pass
        try:
            found = read(value, language)
        except ValueError:
            return
        for one in found:
            assert same(read_one(write(one, language), language), one, language)
            for expected in EXPECTED:
                same_value(one, expected)
    except Exception as error:
        raise AssertionError(f"seed {seed}, {language.name}: {value!r:.2000}") from error


def test_a_value_that_is_read_can_be_written_and_read_again():
    for seed in range(300):
        propose(seed)


@pytest.mark.slow
def test_a_value_that_is_read_can_be_written_and_read_again_for_longer():
    for seed in seeds(10):
        propose(seed)


# ---- how long reading takes ----

NONCE = "0123456789abcdef01234567"
NUMBER = Problem("p", "sums", "?", Fraction(3))


def outputs(language):
    """{what is tried: reader of an output}."""
    table = language.answer.get("tests")
    readers = {
        "printed_value": lambda text: printed_value(text.encode(), NONCE),
        "outcomes": lambda text: outcomes(ended_with(text), NONCE, 3),
        "same_output": lambda text: same_output(text, "1\n2"),
        "result_lines": lambda text: result_lines(ended_with(text)),
    }
    if table:
        judge = TestJudge(None, language)
        readers["passes"] = lambda text: judge.passes(ended_with(text), "1")
    return readers


def completions(language):
    """{what is tried: reader of a completion}."""
    fence = language.fence[0]
    readers = {
        "parse_translation": lambda text: parse_translation(
            f"```{fence}\n{text}\n```", language, "f"
        ),
        "fenced_blocks": fenced_blocks,
        "compose": lambda text: compose(f"g_0 {text}", ("f",), language),
        "normalised": lambda text: normalised(text, language),
        "answer_of": lambda text: answer_of(f"</think><answer>{text}</answer>"),
        "with_header": lambda text: with_header(text, language),
    }
    if "main" in language.answer:
        readers["answer_files"] = lambda text: answer_files(language, text, text, NONCE)
        readers["components"] = lambda text: components(text, language)
        whole = completion("{}", "{}", "{}", language)
        readers["whole"] = lambda text: components(whole.replace("{}", text), language)
    if "tests" in language.answer:
        readers["program"] = lambda text: program(ADD, f"```{fence}\n{text}\n```", language, "chat")
        readers["job"] = lambda text: TestJudge(None, language).job(text, (1, 2))
    return readers


def components(text, language):
    facts = Facts(text, parse(text, language), language, False, NUMBER)
    for component in COMPONENTS.values():
        component(facts)


def ended_with(text):
    return Result("ok", text.encode(), b"", 0, None, 0.1, 0.1, 1, "kernel", False)


UNITS = (*fuzz.WRAPPING, *fuzz.CODE, *fuzz.MARKS, f"\n{NONCE} ", f"\n{NONCE} value 0 ", f" {NONCE}")
UNITS += (
    "1",
    "1,",
    "a ",
    "f(",
    "a f(",
    "a f(a) ",
    "f ",
    "f =",
    "define @f(",
    "(def ^",
    "func (",
    "main ",
)
UNITS += (
    evalplus_run.MARK,
    "let ",
    "function ",
    "package ",
    "import (\n",
    "\r\n",
    "é",
    "{-",
    "--",
    "//",
)


def takes_linear_time(seed, short):
    """A text of two things repeated: four times as long, it takes at most eight times the time.

    short: characters. What takes less than 0.1 s is not compared, since clocks are coarse.
    """
    rng = random.Random(seed)
    language = rng.choice(LANGUAGES)
    readers = rng.choice((outputs, completions))(language)
    name = rng.choice(sorted(readers))
    once, between = rng.choice(UNITS), rng.choice(("", "", rng.choice(UNITS)))

    def seconds(length):
        text = (between + (once * (length // 4 // len(once)) + between) * 4)[:length]
        gc.disable()  # it looks at all that is alive, now and then
        started = time.process_time()
        try:
            readers[name](text)
        except Refused:
            pass
        finally:
            gc.enable()
        return time.process_time() - started

    long = seconds(4 * short)
    if long > 0.1:
        long = min(long, seconds(4 * short))
        ratio = long / seconds(short)
        said = f"seed {seed}: {name}, {language.name}, {once!r} and {between!r}: {long:.1f} s"
        assert ratio < 8, f"{said}, {ratio:.0f} times as long as a quarter of it takes"


def test_reading_takes_linear_time():
    for seed in range(1000):
        takes_linear_time(seed, 6_000)


@pytest.mark.slow
def test_reading_takes_linear_time_in_longer_texts():
    for seed in seeds(20):
        takes_linear_time(seed, 25_000)


# The worst that have been found, each of which took seconds to minutes for 100 kB.
SLOW = [
    ("python", "parse_translation", "\n"),
    ("bash", "parse_translation", "\r"),
    ("cpp", "parse_translation", "a f(a) b"),
    ("clojure", "parse_translation", "(def ^"),
    ("julia", "parse_translation", "f("),
    ("go", "parse_translation", "func ("),
    ("llvm-ir", "parse_translation", "define "),
    ("go", "answer_files", "import (\n"),
    ("lua", "outcomes", f"\n{NONCE} value 0 "),
    ("lua", "printed_value", f"\n{NONCE} "),
    ("lua", "same_output", "1"),
    ("lua", "whole", "\n"),
]


@pytest.mark.parametrize("name, reader, once", SLOW)
def test_what_took_long_no_longer_does(name, reader, once):
    language = load_language(name)
    read_all = (outputs(language) | completions(language))[reader]
    text = once * (100_000 // len(once))
    started = time.process_time()
    read_all(text)
    assert time.process_time() - started < MOST_SECONDS


# ---- real programs ----

RETURNED = (
    "10 ** 400",
    "int('9' * 4000) * 10 ** 4000",
    "float('nan')",
    "[1e308 * 10]",
    "{(1, 2): {frozenset([3]): 4}}",
    "'\\ud800'",
    "'\\0' * 70000",
    "[" * 90 + "]" * 90,
    "{'a': " * 40 + "1" + "}" * 40,
    "lambda: 1",
    "1j",
)
SAID = (
    b"\xff\xfe\x00" * 100,
    b"\xe2\x82",
    b"1" * 60_000,
    b"1e999999999",
    b"NONCE value 0 1 NONCE",
    b"NONCE 84/2",
    b"NONCE value " + b"9" * 5000 + b" 1 NONCE",
    b"NONCE value 0 ]]]]((((\x00 NONCE",
    "NONCE value \u0663 \ufeff NONCE".encode(),
)


def programs():
    """Python programs that return each of RETURNED, or say each of SAID and then return 1."""
    found = [f"def f(a):\n    return {value}" for value in RETURNED]
    for said in SAID:
        head, *rest = said.split(b"NONCE")
        parts = [f"bytes.fromhex('{part.hex()}')" for part in (b"\n" + head, *rest)]
        found.append(f"{FIND}print_bytes({', '.join(parts)})\ndef f(a):\n    return 1")
    return found


# It finds its nonce in its own file, as a program may.
FIND = """\
import re, sys
nonce = re.search(rb'[0-9a-f]{24}', open('main.py', 'rb').read())[0]
def print_bytes(*parts):
    sys.stdout.buffer.write(nonce.join(parts) + b'\\n')
    sys.stdout.flush()
"""


def test_real_programs_end_in_a_verdict_whatever_they_return_and_print():
    cases = tuple(Case(args=(2,), expected=value) for value in (0.5, 3))
    with Pool(workers=2) as pool:
        tried = []
        for source in programs():
            block = f"```python\n{source}\n```"
            text = completion("r", source, "f(1)", "python")
            tried.append((Judge(pool, "python"), NUMBER, text))
            problem = Translation("x/1", "c", "q", "f", cases, target="python")
            tried.append((TranslateJudge(pool), problem, block))
            entry = Entry(source, ("1",) * 10, ("1",) * 10)
            language = load_language("python")
            answer = f"</think><answer>{block}\n```input\n1\n```</answer>"
            tried.append((SolveJudge(pool, language), Puzzle("p", "abduction", entry), answer))
            tried.append((SolveJudge(pool, language), Puzzle("p", "induction", entry), answer))

        started = [(judge, judge.submit(problem, text)) for judge, problem, text in tried]
        verdicts = [judge.collect([submission], 120)[0] for judge, submission in started]
    assert all(verdict.judged for verdict in verdicts)
    # Saying more before it returns 1 makes no program that returns 1 another one.
    assert not any(verdict.reward == 1 for verdict in verdicts if verdict.problem != "p")
