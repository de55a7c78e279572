"""Problems to translate: source functions with input/output cases that belong to no language.

They come from four data sets, or from JSON lines of the user's own. What overlaps MultiPL-E, or
shows a hidden case in its source, is told apart in contamination.py; translate.py leaves it out.
"""

import ast
import functools
import math
import re
import warnings
from dataclasses import dataclass

from tasks.data import read_if_here, read_jsonl

SETS = ("multipl_t", "transcoder_gfg", "mbxp", "exercism")
# MBPP's numbers that MBPP+ tests on and MultiPL-E does not.
ONLY_IN_MBPP_PLUS = {
    *(2, 7, 82, 85, 98, 111, 124, 137, 139, 140, 232, 233, 235, 276, 300, 301, 311, 312, 473, 590),
    *(596, 620, 758),
}
TRANSLATABLE = {"python": "Python", "cpp": "C++"}

# Exercism's own language-neutral cases (problem-specifications) by exercise: the properties for
# which the Python track's example is a function that takes a case's inputs in their order and
# passes every case (test_translate.py runs them all). Examples with classes have no such function.
EXERCISM = """
acronym:abbreviate all-your-base:rebase alphametics:solve anagram:find_anagrams
armstrong-numbers:is_armstrong_number atbash-cipher:decode,encode binary-search:find bob:response
book-store:total bottle-song:recite camicia:simulate_game change:find_fewest_coins
collatz-conjecture:steps darts:score
difference-of-squares:difference_of_squares,square_of_sum,sum_of_squares eliuds-eggs:egg_count
flatten-array:flatten flower-field:annotate forth:evaluate game-of-life:tick grains:square
hamming:distance house:recite isbn-verifier:is_valid isogram:is_isogram knapsack:maximum_value
largest-series-product:largest_product leap:leap_year list-ops:append,concat,length,reverse
markdown:parse matching-brackets:is_paired minesweeper:annotate nth-prime:prime
ocr-numbers:convert pangram:is_pangram pascals-triangle:rows perfect-numbers:classify
poker:best_hands prime-factors:factors protein-translation:proteins
rail-fence-cipher:decode,encode raindrops:convert rectangles:rectangles resistor-color:color_code
resistor-color-duo:value rna-transcription:to_rna roman-numerals:roman rotational-cipher:rotate
run-length-encoding:decode,encode satellite:tree_from_traversals say:say scrabble-score:score
series:slices sieve:primes spiral-matrix:spiral_matrix square-root:square_root tournament:tally
triangle:equilateral,isosceles,scalene twelve-days:recite variable-length-quantity:decode,encode
wordy:answer
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
    source_language: str  # python, cpp, or text
    question: str  # the source program or the problem, as the model and the log see it
    entry: str  # its function; "" for a whole program that reads standard input
    cases: tuple
    target: str = ""  # name of the language to write
    task: str = "translate"
    answer: None = None
    steps: tuple = ()


# ---- the user's own ----


def read_problems(path):
    """list[Translation] of the user's JSON lines.

    A row: {"id", "source", "source_language", "tests", "entry"}, where tests are
    {"args", "expected"}, which need an entry, or {"stdin", "stdout"}. source_language "text": the
    source is a problem in words (as in Agnostics, arXiv 2508.04865), with tests of the second form.
    """
    return read_jsonl(path, _user_row)


def _user_row(index, row):
    cases = tuple(map(_case, row["tests"]))
    calls = [case for case in cases if case.stdin is None]
    if not cases or len(calls) not in (0, len(cases)):
        raise ValueError("tests must all be {args, expected} or all {stdin, stdout}, at least one")
    if calls and not row.get("entry"):
        raise ValueError("tests with args need entry, the name of the source's function")
    if not isinstance(row["source"], str) or not row["source"].strip():
        raise ValueError("source must be the text of a program")

    language = row["source_language"]
    if language not in (*TRANSLATABLE, "text"):
        raise ValueError(f"source_language is {language!r}: use {', '.join(TRANSLATABLE)} or text")
    if language == "text" and calls:
        raise ValueError("a problem in words needs tests {stdin, stdout}")
    id = f"user/{row.get('id', index)}/{language}"
    return Translation(id, language, row["source"], row.get("entry", ""), cases)


def _case(test):
    if "stdin" in test:
        return Case(stdin=str(test["stdin"]), stdout=str(test["stdout"]))
    return Case(args=tuple(test["args"]), expected=test["expected"])


# ---- the four sets ----


@functools.cache  # both splits read it
def built_in(data=None):
    """list[Translation] of the sets that are at hand, in a fixed order."""
    problems = [*_multipl_t(data), *_transcoder_gfg(data), *_mbxp(data), *_exercism(data)]
    if not problems:
        raise ValueError(
            f"no translation data: put {', '.join(SETS)} under --data, RARECODE_DATA or "
            "../shared/data, or give --translate_data FILE"
        )
    return problems


def _multipl_t(data):
    """MultiPL-T's Python functions with the tests that its authors ran."""

    def read(_, row):
        if not (row["python"] and row["python_verified"] and row["io_tests"]):
            return None
        return Translation(
            f"translate/multipl_t/{row['name']}/python",
            "python",
            without_docstrings(row["python"]),
            row["entry_point"],
            tuple(map(_case, row["io_tests"])),
        )

    return read_if_here("multipl_t/python_to_rkt_ml_lua.jsonl", read, data)


def _transcoder_gfg(data):
    """GeeksforGeeks functions of TransCoder's test set in Python and C++, where they have tests."""

    def read(_, row):
        cases = tuple(map(_case, row["io_tests"] or ()))
        problems = []
        for language in TRANSLATABLE:
            if cases and language in row["functions"]:
                id = f"translate/gfg/{row['name']}/{language}"
                source = row["functions"][language].strip()
                problems.append(Translation(id, language, source, "f_gold", cases))
        return problems

    found = read_if_here("transcoder_gfg/gfg.jsonl", read, data)
    return [problem for problems in found for problem in problems]


def _mbxp(data):
    """MBPP's functions in Python and C++ (MBXP); cases from MBPP's assertions.

    The ids that MultiPL-E and MBPP+ test on are left out. Without MultiPL-E's list nobody can say
    what may be trained on, so there are no problems at all.
    """

    def read_number(_, row):
        return int(row["name"].split("_")[1])

    def read_row(_, row):
        return int(row["task_id"].split("/")[1]), row

    evaluated = set(read_if_here("multipl_e/v3/mbpp-py-reworded.jsonl", read_number, data))
    if not evaluated:
        return []
    evaluated |= ONLY_IN_MBPP_PLUS

    functions = {}  # {number: {language: row}}
    for language, name in (("python", "mbpp_release_v1"), ("cpp", "mbcpp_release_v1.2")):
        for number, row in read_if_here(f"mbxp/{name}.jsonl", read_row, data):
            if number not in evaluated and row["canonical_solution"]:
                functions.setdefault(number, {})[language] = row

    problems = []
    for number, by_language in functions.items():
        if "python" not in by_language:
            continue
        cases = _asserted(by_language["python"]["test"])
        if not cases:
            continue
        for language, row in by_language.items():
            source = row["prompt"] + row["canonical_solution"]
            if language == "python":
                source = without_docstrings(source)
            else:
                source = re.sub(r"/\*.*?\*/\s*", "", source, flags=re.DOTALL)
            id = f"translate/mbxp/{number}/{language}"
            problems.append(Translation(id, language, source.strip(), row["entry_point"], cases))
    return problems


def _asserted(text):
    """Cases of "assert candidate(args) == expected" lines; () when one has more than literals."""
    cases = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assert):
            continue
        try:
            call, expected = node.test.left, node.test.comparators[0]
            arguments = tuple(_literal(argument) for argument in call.args)
            cases.append(Case(args=arguments, expected=_literal(expected)))
        except (ValueError, AttributeError, IndexError):
            return ()
    return tuple(cases)


def _literal(node):
    return _plain(ast.literal_eval(node))


def _plain(value):
    """A Python literal as JSON: tuples as lists. ValueError for sets, complex numbers and bytes."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"{value!r} cannot be written as JSON")


def _exercism(data):
    """Exercises with language-neutral cases, from the Python track's examples."""

    def read_cases(_, row):
        return row["slug"], row["canonical_data"]

    def read_source(_, row):
        return row["slug"], "\n".join(row["example"].values())

    canonical = dict(read_if_here("exercism/problem-specifications.jsonl", read_cases, data))
    properties = dict(word.split(":") for word in EXERCISM.split())

    problems = []
    for slug, source in read_if_here("exercism/python.jsonl", read_source, data):
        if slug not in properties:
            continue
        source = without_docstrings(source)
        for name in properties[slug].split(","):
            id = f"translate/exercism/{slug}.{name}/python"
            cases = exercism_cases(canonical[slug], name)
            problems.append(Translation(id, "python", source, name, cases))
    return problems


def exercism_cases(canonical, name):
    """Cases of one property (as a Python name) that expect a value, not an error."""
    cases, waiting = [], list(canonical.get("cases", []))
    while waiting:
        case = waiting.pop(0)
        waiting = case.get("cases", []) + waiting  # cases stand in groups, in their order

        camel = case.get("property", "")
        if re.sub(r"(?<!^)(?=[A-Z])", "_", camel).lower() != name:
            continue
        expected = case["expected"]
        if isinstance(expected, dict) and "error" in expected:
            continue
        cases.append(Case(args=tuple(case["input"].values()), expected=expected))
    return tuple(cases)


# ---- sources ----


def without_docstrings(source):
    """Python text without docstrings: they may hold examples, and examples are tests."""
    try:
        # '\d' in a plain string warns, and other people's code is full of it.
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except SyntaxError:  # mixed tabs and spaces, or an older Python
        quoted = r"^[ \t]*(\"{3}|'{3}).*?\1[ \t]*\n?"
        return re.sub(quoted, "", source, flags=re.DOTALL | re.MULTILINE)

    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        docstring = node.body[0]
        first, end = docstring.lineno - 1, docstring.end_lineno
        lines[first:end] = [None] * (end - first)  # the other line numbers stay
        if len(node.body) == 1:
            lines[first] = " " * docstring.col_offset + "pass"
    return "\n".join(line for line in lines if line is not None)
