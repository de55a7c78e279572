"""Which functions GEPO must not train on: what translation holds out, and benchmarks' own.

Without this RL alone and RL with GEPO are not the same experiment: of 61 held-out GeeksforGeeks
problems 35 had their C function in GEPO's groups, and 13 functions that RL drops as MultiPL-E's.
"""

from tasks import translate
from tasks.contamination import Overlap, defined, read_benchmark
from tasks.translate_data import EXERCISM, Translation, built_in, read_problems

HELD_OUT = "held out by translation"
BENCHMARK = "overlaps MultiPL-E or MBPP+"


class Exclusions:
    """What groups may not hold.

    data: the folder of the data sets. path: --translate_data, the user's own problems.
    """

    def __init__(self, data=None, path=""):
        self.benchmark = read_benchmark(data)
        self.held_out = Overlap()
        for problem in _problems(data, path):
            if translate.is_held_out(problem):
                name = problem.entry if _says_something(problem.entry) else ""
                self.held_out.add(name, problem.question)
        self.held_out.names.discard("")

    def reason(self, family, entry, source):
        """Why a function is left out: HELD_OUT, BENCHMARK, or "" when it is not.

        family: gfg/NAME, exercism/SLUG/FILE or a file's path. The name decides for the built-in
        sets, whether or not they are at hand; for all others a function's name of several words, or
        13 words in a row.
        """
        if any(map(translate.is_held_out, _counterparts(family, source))):
            return HELD_OUT
        title = family.rpartition("/")[2]
        names = [entry, title, *defined(source)]
        if self.benchmark.shares(names, source):
            return BENCHMARK
        return HELD_OUT if self.held_out.shares([entry, title], source) else ""

    def is_complete(self):
        """Whether the benchmarks are at hand at all."""
        return bool(self.benchmark.names)


def _says_something(name):
    """A name of one word may be any function's: total, rows, f."""
    return "_" in name and name != "f_gold"


def _problems(data, path):
    if path:
        return read_problems(path)
    try:
        return built_in(data)
    except ValueError:  # none at hand: names decide
        return []


def _counterparts(family, source):
    """Translation's problems of the same function in another language."""
    kind, *rest = family.split("/")
    if kind == "gfg":
        names = [f"gfg/{rest[0]}"]
    elif kind == "exercism":
        properties = dict(word.split(":") for word in EXERCISM.split())
        names = [f"exercism/{rest[0]}.{name}" for name in properties.get(rest[0], "").split(",")]
    else:
        names = []
    return [Translation(f"translate/{name}/c", "c", source, "", ()) for name in names]
