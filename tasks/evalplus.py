"""HumanEval+ and MBPP+ for Python (EvalPlus, arXiv 2305.01210): the old problems, far more inputs.

A program's function is called on all inputs of its problem in the sandbox (evalplus_run.py), and
what it returns is compared here with what the problem's own solution returned, which ran there
before. So no process of a program ever holds an expected result, and there is nothing to forge.

Two verdicts: base, on the inputs of HumanEval or MBPP alone, and correct, on these and the added
ones. Comparisons, tolerances and time limits follow EvalPlus 0.3.1.
"""

import ast
import concurrent.futures
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox import Job
from sandbox.languages import language_of
from tasks import evalplus_run
from tasks.data import find_data, read_jsonl, take
from tasks.evalplus_run import MARK, decode, encode
from tasks.multipl_e import program
from tasks.requests import answer_stops
from tasks.verdicts import Parsed, Submission, Verdict

# Benchmark -> its file, how its ids begin, and where a base model's completion is cut.
STOPS = ("\nif __name__", "\ndef main(", "\nprint(")
BENCHMARKS = {
    "humaneval+": (
        "HumanEvalPlus",
        "HumanEval",
        (*STOPS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "),
    ),
    "mbpp+": ("MbppPlus", "mbpp", (*STOPS, '\n"""', "\nassert")),
}

# Where the lists of MBPP+'s inputs are tuples, which JSON cannot say: (argument, levels of nesting)
# -> the numbers of the problems, as EvalPlus reads its data.
ALL = "all arguments"
TUPLES = {
    (ALL, (0,)): (
        *(2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630),
        *(726, 740, 744, 809),
    ),
    (ALL, (1,)): (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
    (ALL, (0, 1)): (259, 278, 401, 445),
    (ALL, range(100)): (580, 615, 791),
    (0, (0,)): (250, 307, 405, 446, 617, 720, 763, 808),
    (0, (1,)): (75, 413, 444, 722, 753),
    (1, (0,)): (106, 750),
}
IMPORTS = (ast.Import, ast.ImportFrom)
LEFT_OUT = {(255, 88)}  # (problem, input) of MBPP+: its result takes more than 1 GB
NUMBERS = {124: (float, complex), 252: (complex,)}  # whose arguments are texts in JSON

# A call may take 4 times the CPU time of the problem's own solution, at least 1 s; all calls of a
# program together 60 s, and 1 s more. As often, what the own solution took to start and print.
FACTOR = 4.0
LEAST_SECONDS = 1.0
MOST_SECONDS = 60.0
REFERENCE_SECONDS = 120.0  # for the problem's own solution, all calls
# Equal results may differ in how long they are written: 1 and 1.0 and True.
LONGER = 8
SOME = 1000

# Problems for which equality is not what is asked, by function.
SAME_ELEMENTS = (
    *("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly"),
    *("larg_nnum", "intersection_array", "find_dissimilar", "Diff"),
)
BY_ARGUMENTS = ("find_zero", "surface_Area", "digit_distance_nums")
SOMETHING_OR_NONE = ("check_str", "text_match_three", "text_starta_endb")


@dataclass(frozen=True)
class PlusProblem:
    """One problem; the fields that multipl_e.BenchmarkProblem has, and how it is judged."""

    id: str  # "mbpp+/py/mbpp_2_similar_elements"
    task: str
    question: str
    prompt: str
    stop_tokens: tuple
    entry: str  # the function that is called
    solution: str  # the problem's own
    calls: tuple  # the arguments of each call, as evalplus_run.encode writes them
    base: int  # how many of the calls are HumanEval's or MBPP's own; they come first
    tolerance: float  # absolute, of floats; 0: none but for results that are floats
    tests: str = ""  # none that stand in the program
    source: str = ""
    answer: None = None


@dataclass(frozen=True)
class Reference:
    """What a problem's own solution returned, and what another program is allowed."""

    expected: list
    lengths: list  # most characters of each result's line
    longest: int  # of any result: a program that returns more has no need to go on
    limits: list  # seconds of CPU of each call
    seconds: float  # of all together


@dataclass(frozen=True)
class Outcome:
    """How a program did."""

    status: str
    base: bool = False
    correct: bool = False
    value: str | None = None  # where it went wrong


# ---- problems ----


def load_problems(bench, language, data=None, count=None, seed=0):
    """list[PlusProblem] of humaneval+ or mbpp+.

    count: a sample drawn by `seed`, in file order.
    ValueError with one sentence for another language than Python, or when the data is missing.
    """
    if language_of(language).name != "python":
        raise ValueError(f"{bench} has Python programs only: use --lang python")
    file, family, stops = BENCHMARKS[bench]
    path = find_data(f"evalplus/{file}.jsonl", data)
    if path is None:
        raise ValueError(
            f"evalplus/{file}.jsonl is not in ../shared/data: give its folder by --data or "
            "RARECODE_DATA"
        )

    def read(_, row):
        number = row["task_id"].split("/")[1]
        inputs = [*row["base_input"], *row["plus_input"]]
        if bench == "mbpp+":
            inputs = [
                in_form(int(number), arguments)
                for place, arguments in enumerate(inputs)
                if (int(number), place) not in LEFT_OUT
            ]
        return PlusProblem(
            id=f"{bench}/py/{family}_{number}_{row['entry_point']}",
            task=bench,
            question=row["prompt"],
            prompt=row["prompt"],
            stop_tokens=stops,
            entry=row["entry_point"],
            solution=row["prompt"] + row["canonical_solution"],
            calls=tuple(map(encode, inputs)),
            base=len(row["base_input"]),
            tolerance=row["atol"],
        )

    return take(read_jsonl(path, read), count, seed)


def in_form(number, arguments):
    """The arguments of a call of an MBPP problem, from JSON: with its tuples and numbers.

    number: the problem's. 75 and [[[1, 2], [3]], 4] -> [[(1, 2), (3,)], 4].
    """
    if number in NUMBERS:
        return [kind(value) for kind, value in zip(NUMBERS[number], arguments)]
    for (place, levels), numbers in TUPLES.items():
        if number in numbers:
            return [
                with_tuples(value, levels) if place in (ALL, i) else value
                for i, value in enumerate(arguments)
            ]
    return arguments


def with_tuples(value, levels, level=0):
    """A value with tuples for its lists at these levels. Level 0 is the value itself."""
    if isinstance(value, list):
        items = [with_tuples(item, levels, level + 1) for item in value]
        return tuple(items) if level in levels else items
    if isinstance(value, dict):
        return {key: with_tuples(item, levels, level + 1) for key, item in value.items()}
    return value


# ---- verdicts ----


class PlusJudge:
    """Scores completions of PlusProblems; submit() and collect() as tasks/verdicts.py has them.

    mode: completion, chat or think: how a program is found in a completion (multipl_e.program).
    """

    def __init__(self, pool, language, mode="completion"):
        self.pool = pool
        self.language = language_of(language)
        self.mode = mode
        self.references = {}  # problem id -> future of its Reference, or of None

    def stop_strings(self, row):
        """What a completion is cut at."""
        return answer_stops(row, self.mode)

    def submit(self, row, text, sample=0):
        """Start a completion's program -> Submission, whose future is of an Outcome."""
        source = program(row, text, self.language, self.mode)
        if self.mode != "completion":
            source = what_is_needed(source, row.entry)
        outcome = None
        if source:
            outcome = concurrent.futures.Future()
            _then(
                self._reference(row), outcome, lambda found: self._run(row, source, found, outcome)
            )
        parsed = Parsed(reasoning="", code=source, query="", format_ok=bool(source))
        return Submission(row, sample, text, parsed, nonce="", future=outcome)

    def _reference(self, row):
        """Future of what the problem's own solution returns; it runs once."""
        if row.id not in self.references:
            future = self.references[row.id] = concurrent.futures.Future()
            limits = [REFERENCE_SECONDS] * len(row.calls)
            job = self._job(row, row.solution, limits, REFERENCE_SECONDS, 1 << 28, math.inf)
            run = self.pool.submit(job)
            _then(run, future, lambda result: future.set_result(read_reference(row, result)))
        return self.references[row.id]

    def _run(self, row, source, reference, outcome):
        """Run a program under the reference's limits, and compare."""
        if reference is None:  # the problem's own solution does not run here: nobody can judge
            outcome.set_result(Outcome("sandbox_error"))
            return
        output = sum(reference.lengths) + (64 << 10)
        limits, seconds = reference.limits, reference.seconds
        job = self._job(row, source, limits, seconds, output, reference.longest)
        run = self.pool.submit(job)
        _then(run, outcome, lambda result: outcome.set_result(judge(row, reference, result)))

    def _job(self, row, source, limits, seconds, output, longest):
        """The job that calls a program's function on every input."""
        calls = {"entry": row.entry, "longest": longest, "calls": list(zip(row.calls, limits))}
        files = {
            self.language.file: Path(evalplus_run.__file__).read_text("utf-8"),
            "solution.py": source,
            "calls.json": json.dumps(calls),
        }
        bounds = replace(self.language.limits, cpu=seconds, wall=None, output=output)
        return Job(self.language.name, files, limits=bounds, id=row.id)

    def collect(self, submissions, deadline=None):
        """Verdicts in order; what is not done `deadline` seconds from now is a sandbox error."""
        started = [submission.future for submission in submissions if submission.future]
        concurrent.futures.wait(started, timeout=deadline)
        return [self._verdict(submission) for submission in submissions]

    def _verdict(self, submission):
        future = submission.future
        if future is None:
            outcome = Outcome("no_program")
        elif future.done():
            outcome = future.result()
        else:
            outcome = Outcome("sandbox_error")
        judged = outcome.status != "sandbox_error"
        reward = float(outcome.correct) if judged else math.nan
        base = float(outcome.base) if judged else math.nan
        return Verdict(
            problem=submission.problem.id,
            reward=reward,
            components={"correct": reward, "base": base},
            correct=outcome.correct,
            status=outcome.status,
            value=outcome.value,
            program=submission.parsed.code,
            parsed=submission.parsed,
        )


def what_is_needed(source, name):
    """The parts of an answer that a function needs: imports, and what it uses, directly or not.

    EvalPlus does so too (sanitize): a model's own examples and assertions behind its function are
    often wrong, and would end a right program while it is loaded. An answer that Python cannot
    read, or that does not define the function, stays as it is.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source
    defined = {}  # name -> the statements that give it a value, in order
    for statement in tree.body:
        for given in _names_given(statement):
            defined.setdefault(given, []).append(statement)
    if name not in defined:
        return source

    needed = set()
    waiting = [name]
    while waiting:
        for statement in defined.pop(waiting.pop(), ()):
            needed.add(statement)
            used = (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
            waiting.extend(used)
    kept = [node for node in tree.body if node in needed or isinstance(node, IMPORTS)]
    return "\n".join(ast.unparse(node) for node in kept)


def _names_given(statement):
    """Names that a statement of a module defines or assigns; no import, no loop, no expression."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    found = (node for target in targets for node in ast.walk(target))
    return [node.id for node in found if isinstance(node, ast.Name)]


def _then(first, outcome, use):
    """Call use(result) when `first` is done, in a thread of the pool: an error is the outcome."""

    def done(first):
        try:
            use(first.result())
        except Exception as error:
            outcome.set_exception(error)

    first.add_done_callback(done)


# ---- results ----


def read_reference(row, result):
    """Reference from the run of a problem's own solution; None when it failed."""
    lines = result_lines(result)
    if result.status != "ok" or len(lines) != len(row.calls):
        return None
    expected, limits = [], []
    around = result.cpu
    longest = 0
    for line in lines:
        seconds, length, coded = json.loads(line)
        longest = max(longest, LONGER * length + SOME)
        around -= seconds
        value = decode(coded)
        if row.entry in SOMETHING_OR_NONE:
            value = value is not None
        expected.append(value)
        limits.append(max(LEAST_SECONDS, FACTOR * seconds))
    lengths = [LONGER * len(line) + SOME for line in lines]
    together = min(MOST_SECONDS, sum(limits)) + 1 + FACTOR * max(around, 0.0)
    return Reference(expected, lengths, longest, limits, together)


def result_lines(result):
    """What evalplus_run.py printed, without the mark."""
    lines = result.stdout.decode(errors="replace").splitlines()
    return [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]


def judge(row, reference, result):
    """Outcome of a program's run. No text of it is trusted: whatever cannot be read is wrong."""
    if result.status == "sandbox_error":
        return Outcome("sandbox_error")
    lines = result_lines(result)
    base_wrong = first_wrong(row, reference, lines, range(row.base))
    wrong = base_wrong
    if wrong is None:
        wrong = first_wrong(row, reference, lines, range(row.base, len(row.calls)))
    if wrong is None and result.status == "ok":
        return Outcome("ok", base=True, correct=True)

    status = result.status
    if wrong is not None and lines[wrong:] == ['["OutOfTime"]']:
        status = "cpu_limit"
    value = None if wrong is None else f"call {wrong}: {''.join(lines[wrong : wrong + 1])[:200]}"
    return Outcome(status, base=base_wrong is None, value=value)


def first_wrong(row, reference, lines, numbers):
    """Number of the first call among `numbers` whose result is missing or wrong, or None."""
    tolerance = row.tolerance
    for number in numbers:
        expected = reference.expected[number]
        # As in EvalPlus: from the first expected float on.
        if tolerance == 0 and is_floats(expected):
            tolerance = 1e-6
        if number >= len(lines) or len(lines[number]) > reference.lengths[number]:
            return number
        try:
            _, _, coded = json.loads(lines[number])
            value = decode(coded)
            arguments = decode(row.calls[number]) if row.entry in BY_ARGUMENTS else ()
            if not is_right(row.entry, arguments, value, expected, tolerance):
                return number
        except Exception:  # no value, too deep, cannot be hashed, added up or compared
            return number
    return None


def is_right(entry, arguments, value, expected, tolerance):
    """Whether a function's value is right, by EvalPlus's rules: equal, or close where floats are.

    Some problems ask for less than equality: any zero of a polynomial, the same elements in any
    order, a match or none, or either reading of an ambiguous task.
    """
    if entry == "find_zero":
        (coefficients,) = arguments
        total = sum(c * math.pow(value, power) for power, c in enumerate(coefficients))
        return abs(total) <= tolerance

    if entry in SAME_ELEMENTS:
        equal = set(value) == set(expected)
    elif entry in SOMETHING_OR_NONE:
        something = value if isinstance(value, bool) else value is not None
        equal = something == expected
    else:
        equal = value == expected
    if entry == "surface_Area":
        equal = equal or abs(value - pyramid_surface(*arguments)) <= tolerance
    elif entry == "digit_distance_nums":
        equal = equal or value == digit_distance(*arguments)

    if equal or not tolerance:
        return equal
    return type(value) is type(expected) and is_close(value, expected, tolerance)


def is_floats(value):
    """A float, or a list or tuple of nothing but floats."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def is_close(value, expected, tolerance):
    """numpy.allclose with rtol 1e-7, of numbers and of sequences of the same shape."""
    if isinstance(expected, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(expected):
            return False
        return all(is_close(a, b, tolerance) for a, b in zip(value, expected))
    return value == expected or abs(value - expected) <= tolerance + 1e-7 * abs(expected)


def pyramid_surface(base, height):
    """Of a square pyramid by its upright height; the own solution takes it for the slant one."""
    slant = math.sqrt((base / 2) ** 2 + height**2)
    return round(base**2 + 2 * base * slant)


def digit_distance(a, b):
    """Sum of the distances of two numbers' digits, place by place. 123, 256 -> 1 + 3 + 3 = 7."""
    texts = [str(a), str(b)]
    width = max(map(len, texts))
    pairs = zip(*(text.zfill(width) for text in texts))
    return sum(abs(int(x) - int(y)) for x, y in pairs)
