"""What must not be trained on: problems that overlap a benchmark, or whose source shows its tests.

tests/test_contamination.py holds every training task against the benchmarks, by its own reading.
"""

import functools
import re

from tasks.data import read_if_here

WORDS = 13  # in a row: a text that shares so many counts as copied

# HumanEval problem 106 is called f, which says nothing.
MEANINGLESS = {"f"}


@functools.cache
def read_benchmark(data=None):
    """The Benchmark of a data folder, read once."""
    return Benchmark(data)


class Overlap:
    """Names and texts that something must not share.

    names: of functions, without _ and capitals. grams: every 13 words in a row of the texts.
    """

    def __init__(self):
        self.names, self.grams = set(), set()

    def add(self, name, text):
        self.names.add(_bare(name))
        self.grams |= grams(text, WORDS)

    def shares(self, names, text):
        """Whether one of some names, or 13 words in a row of a text, are among them."""
        if not self.names.isdisjoint(map(_bare, names)):
            return True
        return not self.grams.isdisjoint(grams(text, WORDS))


class Benchmark(Overlap):
    """What MultiPL-E and MBPP+ test, as far as they are at hand.

    names: of its functions. grams: of its prompts and of the canonical solutions.
    """

    def __init__(self, data=None):
        super().__init__()
        for family in ("humaneval", "mbpp"):
            file = f"multipl_e/v3/{family}-py-reworded.jsonl"
            for name, prompt in read_if_here(file, _name_and_prompt, data):
                self.add(name.split("_", 2)[2], prompt)
        for name, solved in read_if_here("evalplus/MbppPlus.jsonl", _name_and_solved, data):
            self.add(name, solved)
        self.names -= MEANINGLESS

        codes = ("cpp", "go", "java", "js", "rust")
        translated = [f"humaneval_x/humaneval_{code}.jsonl" for code in codes]
        for file in ["humaneval/HumanEval.jsonl", *translated]:
            for solved in read_if_here(file, _solved, data):
                self.grams |= grams(solved, WORDS)

    def contains(self, problem):
        """Whether a Translation overlaps: a name that it defines, or 13 words in a row."""
        parts = problem.id.split("/")  # translate/SET/TITLE/... or user/TITLE/...
        title = parts[2] if parts[0] == "translate" else parts[1]
        return self.shares([problem.entry, title, *defined(problem.question)], problem.question)


def defined(source):
    """Names of the functions that a source defines: is_palindrome is a problem of its own."""
    found = re.findall(r"\bdef (\w+)|(\w+) ?\([^()]*\) ?\{|\bfn (\w+)", source)
    return ["".join(names) for names in found]


def _name_and_prompt(_, row):
    return row["name"], row["prompt"]


def _name_and_solved(_, row):
    return row["entry_point"], row["prompt"] + row["canonical_solution"]


def _solved(_, row):
    return row["prompt"] + row["canonical_solution"]


def _bare(name):
    return name.replace("_", "").lower()


def grams(text, n):
    """All sequences of n words in a row of a text, as a set of strings."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    starts = range(len(words) - n + 1)
    return {" ".join(words[i : i + n]) for i in starts}


def shows_cases(problem):
    """Whether the source itself holds hidden cases, as some of MBXP's solutions do.

    It calls itself with one, or compares its only argument with every one.
    """
    arguments = [case.args for case in problem.cases if case.args]
    for args in arguments:
        call = f"{problem.entry}({', '.join(map(repr, args))})"
        if call in problem.question:
            return True
    if len(arguments) < 2:
        return False
    return all(len(args) == 1 and _compares(problem.question, args[0]) for args in arguments)


def _compares(source, value):
    literal = re.escape(repr(value))
    return re.search(rf"==\s*{literal}(?![\w.])", source) is not None
