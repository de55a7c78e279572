"""Problems to translate: source functions of four data sets or of the user's JSON lines, with input/output cases that belong to no language.

What overlaps MultiPL-E, or shows a hidden case in its source, is told apart here; translate.py leaves it out.
"""

import ast
import functools
import math
import re
import warnings
from dataclasses import dataclass

from tasks.data import find_data, read_jsonl

SETS = ("multipl_t", "transcoder_gfg", "mbxp", "exercism")
TRANSLATABLE = {"python": "Python", "cpp": "C++"}

# Exercism's own language-neutral cases (problem-specifications) by exercise: the properties for which the Python track's example is a function that
# takes a case's inputs in their order and passes every case (test_translate.py runs them all). Examples with classes have no such function.
EXERCISM = """
acronym:abbreviate all-your-base:rebase alphametics:solve anagram:find_anagrams armstrong-numbers:is_armstrong_number
atbash-cipher:decode,encode binary-search:find bob:response book-store:total bottle-song:recite camicia:simulate_game
change:find_fewest_coins collatz-conjecture:steps darts:score difference-of-squares:difference_of_squares,square_of_sum,sum_of_squares
eliuds-eggs:egg_count flatten-array:flatten flower-field:annotate forth:evaluate game-of-life:tick grains:square hamming:distance
house:recite isbn-verifier:is_valid isogram:is_isogram knapsack:maximum_value largest-series-product:largest_product leap:leap_year
list-ops:append,concat,length,reverse markdown:parse matching-brackets:is_paired minesweeper:annotate nth-prime:prime ocr-numbers:convert
pangram:is_pangram pascals-triangle:rows perfect-numbers:classify poker:best_hands prime-factors:factors protein-translation:proteins
rail-fence-cipher:decode,encode raindrops:convert rectangles:rectangles resistor-color:color_code resistor-color-duo:value
rna-transcription:to_rna roman-numerals:roman rotational-cipher:rotate run-length-encoding:decode,encode satellite:tree_from_traversals
say:say scrabble-score:score series:slices sieve:primes spiral-matrix:spiral_matrix square-root:square_root tournament:tally
triangle:equilateral,isosceles,scalene twelve-days:recite variable-length-quantity:decode,encode wordy:answer
"""


@dataclass(frozen=True)
class Case:
    """One hidden test: args and expected (plain JSON values), or stdin and stdout."""

    args: tuple | None = None
    expected: object = None
    stdin: str | None = None
    stdout: str | None = None


@dataclass(frozen=True)
class Translation:
    id: str  # "translate/mbxp/11/python"
    source_language: str  # python, cpp
    question: str  # the source program, as the model and the log see it
    entry: str  # its function; "" for a whole program that reads standard input
    cases: tuple
    target: str = ""  # name of the language to write
    task: str = "translate"
    answer: None = None
    steps: tuple = ()


# ---- the sets ----


@functools.cache  # both splits read it
def built_in(data=None):
    """Problems of the four sets that are at hand, in a fixed order."""
    found = {name: reader(data) for name, reader in READERS.items()}
    if not any(found.values()):
        raise ValueError(
            f"no translation data: put {', '.join(SETS)} under --data, RARECODE_DATA or ../shared/data, or give --translate_data FILE"
        )
    return [p for problems in found.values() for p in problems]


def read_problems(path):
    """The user's JSON lines: {"id", "source", "source_language", "tests", "entry" (with args)}, tests of {"args", "expected"} or {"stdin", "stdout"}."""
    return [p for p in read_jsonl(path, _user_row)]


def _user_row(index, row):
    cases = tuple(_case(test) for test in row["tests"])
    calls = [c for c in cases if c.stdin is None]
    if not cases or (calls and len(calls) != len(cases)):
        raise ValueError("tests must all be {args, expected} or all {stdin, stdout}, at least one")
    if calls and not row.get("entry"):
        raise ValueError("tests with args need entry, the name of the source's function")
    if not isinstance(row["source"], str) or not row["source"].strip():
        raise ValueError("source must be the text of a program")
    if row["source_language"] not in TRANSLATABLE:
        raise ValueError(
            f"source_language is {row['source_language']!r}: use {' or '.join(TRANSLATABLE)}"
        )
    return Translation(
        f"user/{row.get('id', index)}/{row['source_language']}",
        row["source_language"],
        row["source"],
        row.get("entry", ""),
        cases,
    )


def _case(test):
    if "stdin" in test:
        return Case(stdin=str(test["stdin"]), stdout=str(test["stdout"]))
    return Case(args=tuple(test["args"]), expected=test["expected"])


def _multipl_t(data):
    def read(_, row):
        if not (row["python"] and row["python_verified"] and row["io_tests"]):
            return None
        cases = tuple(map(_case, row["io_tests"]))
        return Translation(
            f"translate/multipl_t/{row['name']}/python",
            "python",
            without_docstrings(row["python"]),
            row["entry_point"],
            cases,
        )

    return _rows("multipl_t/python_to_rkt_ml_lua.jsonl", read, data)


def _transcoder_gfg(data):
    def read(_, row):
        languages = (
            [name for name in TRANSLATABLE if name in row["functions"]]
            if row.get("io_tests")
            else []
        )
        cases = tuple(map(_case, row["io_tests"] or ()))
        return [
            Translation(
                f"translate/gfg/{row['name']}/{n}", n, row["functions"][n].strip(), "f_gold", cases
            )
            for n in languages
        ]

    return [p for problems in _rows("transcoder_gfg/gfg.jsonl", read, data) for p in problems]


def _mbxp(data):
    """MBPP's functions in Python and C++ (MBXP), less the ids that MultiPL-E tests on; cases from MBPP's assertions."""
    evaluated = set(
        _rows(
            "multipl_e/v3/mbpp-py-reworded.jsonl",
            lambda _, row: int(row["name"].split("_")[1]),
            data,
        )
    )
    if not evaluated:
        return []  # without MultiPL-E's list of ids nobody can say what may be trained on
    rows = {}
    for language, name in (("python", "mbpp_release_v1"), ("cpp", "mbcpp_release_v1.2")):
        for number, row in _rows(
            f"mbxp/{name}.jsonl", lambda _, row: (int(row["task_id"].split("/")[1]), row), data
        ):
            if number not in evaluated and row["canonical_solution"]:
                rows.setdefault(number, {})[language] = row
    problems = []
    for number, by_language in rows.items():
        cases = _asserted(by_language["python"]["test"]) if "python" in by_language else ()
        for language, row in by_language.items() if cases else ():
            source = row["prompt"] + row["canonical_solution"]
            source = (
                without_docstrings(source)
                if language == "python"
                else re.sub(r"/\*.*?\*/\s*", "", source, flags=re.DOTALL)
            )
            problems.append(
                Translation(
                    f"translate/mbxp/{number}/{language}",
                    language,
                    source.strip(),
                    row["entry_point"],
                    cases,
                )
            )
    return problems


def _asserted(text):
    """Cases of "assert candidate(args) == expected" lines whose values are literals; () when one is not."""
    cases = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            try:
                call, expected = node.test.left, node.test.comparators[0]
                values = [_plain(ast.literal_eval(v)) for v in (*call.args, expected)]
                cases.append(Case(args=tuple(values[:-1]), expected=values[-1]))
            except (ValueError, AttributeError, IndexError):
                return ()
    return tuple(cases)


def _plain(value):
    """A Python literal as JSON: tuples as lists. ValueError for sets, complex numbers and bytes."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _plain(v) for k, v in value.items()}
    if (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise ValueError


def _exercism(data):
    """Exercises with language-neutral cases, from the Python track's examples."""
    specifications = dict(
        _rows(
            "exercism/problem-specifications.jsonl",
            lambda _, row: (row["slug"], row["canonical_data"]),
            data,
        )
    )
    names = {
        slug: properties.split(",")
        for slug, properties in (word.split(":") for word in EXERCISM.split())
    }
    problems = []
    for slug, source in _rows(
        "exercism/python.jsonl",
        lambda _, row: (row["slug"], "\n".join(row["example"].values())),
        data,
    ):
        for name in names.get(slug, ()):
            cases = exercism_cases(specifications[slug], name)
            problems.append(
                Translation(
                    f"translate/exercism/{slug}.{name}/python",
                    "python",
                    without_docstrings(source),
                    name,
                    cases,
                )
            )
    return problems


def exercism_cases(canonical, name):
    """Cases of one property (as a Python name) that expect a value, not an error."""
    cases, waiting = [], list(canonical.get("cases", []))
    while waiting:
        case = waiting.pop(0)
        waiting = case.get("cases", []) + waiting
        if re.sub(r"(?<!^)(?=[A-Z])", "_", case.get("property", "")).lower() == name and not (
            isinstance(case["expected"], dict) and "error" in case["expected"]
        ):
            cases.append(Case(args=tuple(case["input"].values()), expected=case["expected"]))
    return tuple(cases)


READERS = {
    "multipl_t": _multipl_t,
    "transcoder_gfg": _transcoder_gfg,
    "mbxp": _mbxp,
    "exercism": _exercism,
}


def _rows(name, read, data):
    path = find_data(name, data)
    return [row for row in read_jsonl(path, read) if row is not None] if path else []


def without_docstrings(source):
    """Python text without docstrings: they may hold examples, and examples are tests."""
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # '\d' in a plain string, which other people's code is full of
            tree = ast.parse(source)
    except SyntaxError:  # mixed tabs and spaces, or an older Python
        return re.sub(
            r"^[ \t]*(\"{3}|'{3}).*?\1[ \t]*\n?", "", source, flags=re.DOTALL | re.MULTILINE
        )
    lines = source.splitlines()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
            or not body
            or ast.get_docstring(node, clean=False) is None
        ):
            continue
        first = body[0]
        kept = " " * first.col_offset + "pass" if len(body) == 1 else None
        lines[first.lineno - 1 : first.end_lineno] = [kept] + [None] * (
            first.end_lineno - first.lineno
        )
    return "\n".join(line for line in lines if line is not None)


@functools.cache
def read_benchmark(data):
    return Benchmark(data)


def shows_cases(problem):
    """The source itself holds hidden cases: it calls itself with one, or compares its argument with each (some of MBXP's solutions do)."""
    calls = [c.args for c in problem.cases if c.args]
    text = problem.question
    if any(f"{problem.entry}({', '.join(map(repr, args))})" in text for args in calls):
        return True
    return len(calls) > 1 and all(
        len(args) == 1 and re.search(rf"==\s*{re.escape(repr(args[0]))}(?![\w.])", text)
        for args in calls
    )


class Benchmark:
    """What MultiPL-E tests, as far as it is at hand: names, and every 13 words in a row of prompts and canonical solutions."""

    WORDS = 13

    def __init__(self, data=None):
        prompts = [
            r
            for f in ("humaneval", "mbpp")
            for r in _rows(
                f"multipl_e/v3/{f}-py-reworded.jsonl",
                lambda _, row: (row["name"], row["prompt"]),
                data,
            )
        ]
        files = [
            "humaneval/HumanEval.jsonl",
            *(
                f"humaneval_x/humaneval_{code}.jsonl"
                for code in ("cpp", "go", "java", "js", "rust")
            ),
        ]
        solved = [
            text
            for file in files
            for text in _rows(file, lambda _, row: row["prompt"] + row["canonical_solution"], data)
        ]
        self.names = {_bare(name.split("_", 2)[2]) for name, _ in prompts} - {
            "f"
        }  # HumanEval 106 is called f, which says nothing
        self.grams = {
            gram for text in [p for _, p in prompts] + solved for gram in grams(text, self.WORDS)
        }

    def contains(self, problem):
        title = problem.id.split("/")[2 if problem.id.startswith("translate/") else 1]
        defined = re.findall(
            r"\bdef (\w+)|(\w+) ?\([^()]*\) ?\{", problem.question
        )  # helpers too: is_palindrome is a problem of its own
        names = {_bare(name) for name in (problem.entry, title, *map("".join, defined))}
        return bool(names & self.names) or not self.grams.isdisjoint(
            grams(problem.question, self.WORDS)
        )


def _bare(name):
    return name.replace("_", "").lower()


def grams(text, n):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}
