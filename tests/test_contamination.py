"""No benchmark row may be reachable from any training task: by id, by name, by words in a row."""

import re
from dataclasses import dataclass

import pytest

import known_programs
import sft
from sandbox.languages import language_names, load_language
from selfplay import triples
from settings import Settings
from tasks.multipl_e import SOURCES, load_benchmark
from tasks.problems import Problem, load_problems
from tasks.translate import load_translations

needs_data = pytest.mark.skipif(
    not known_programs.DATA.is_dir(), reason="../shared/data is not here"
)

# Every --task of train.py and sft.py, and how many words in a row count as copied there: code
# repeats itself sooner than prose.
TASKS = {"sums": 8, "gsm8k": 8, "gsm8k_steps": 8, "translate": 13, "selfplay": 8}


def training_problems(task):
    if task == "translate":
        return load_translations("train", [load_language(name) for name in language_names()])
    if task == "selfplay":
        return demonstrations()
    return load_problems(task, "train")


def demonstrations():
    """What self-play's warm start trains on."""
    problems = []
    for name in ("racket", "julia", "lua", "python"):
        for texts in triples.demonstrations(load_language(name), 300, 0, 6, False):
            id = f"triples/{len(problems)}"
            problems.append(Problem(id, "selfplay", " ".join(texts), None))
    return problems


@pytest.mark.parametrize("settings", [Settings, sft.WarmStart])
def test_no_training_task_is_forgotten(settings):
    text = settings.__dataclass_fields__["task"].metadata["help"]
    named = re.sub(r" \(.*?\)", "", text.rpartition(": ")[2])
    assert set(re.split(r", | or ", named)) <= set(TASKS)


@dataclass
class Evaluated:
    """All of MultiPL-E, also of languages without a TOML, the sources of translate, and MBPP+."""

    ids: set  # of (bench, number)
    names: set
    grams: dict  # {n: set of n words in a row}


@pytest.fixture(scope="module")
def evaluated():
    rows = []
    for path in sorted((known_programs.DATA / "multipl_e/v3").glob("*.gz")):
        rows += known_programs.rows(path)
    assert len({row["language"] for row in rows}) == 23

    ids, names, texts = set(), set(), []
    for row in rows:
        bench, number, name = row["name"].split("_", 2)
        ids.add((bench.lower(), number))
        names.add(bare(name))
        texts.append(row["prompt"])
    for row in known_programs.rows("evalplus/MbppPlus.jsonl.gz"):
        ids.add(("mbpp", row["task_id"].split("/")[1]))
        names.add(bare(row["entry_point"]))
        texts += [row["prompt"], row["canonical_solution"]]
    names.remove("f")  # HumanEval 106 is called so, which says nothing
    for source in SOURCES:
        problems = load_benchmark("translate", "python", source=source)
        texts += [problem.source for problem in problems]

    shared = {}
    for length in set(TASKS.values()):
        shared[length] = set().union(*(grams(text, length) for text in texts))
    return Evaluated(ids, names, shared)


def bare(name):
    return name.replace("_", "").lower()


def grams(text, n):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


@needs_data
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Python sources in the data
@pytest.mark.parametrize("task", TASKS)
def test_no_benchmark_row_is_reachable_from_a_training_task(task, evaluated):
    """Over all 23 languages, and MBPP+, of which 23 problems are not in MultiPL-E."""
    defined = r"(\w+_\w+)()"  # in prose, anything that looks like a function's name
    if task == "translate":
        defined = r"\bdef (\w+)|(\w+) ?\([^()]*\) ?\{"
    length = TASKS[task]
    copied = evaluated.grams[length]

    for problem in training_problems(task):
        assert not re.search("humaneval|multipl_e|/test/", problem.id, re.IGNORECASE), problem.id
        number = re.search(r"mb[a-z]?[xp]p?/(\d+)", problem.id)
        assert not number or ("mbpp", number[1]) not in evaluated.ids, problem.id

        names = map("".join, re.findall(defined, problem.question))
        names = {bare(name) for name in [getattr(problem, "entry", ""), *names]}
        assert not evaluated.names & names, problem.id
        assert copied.isdisjoint(grams(problem.question, length)), problem.id


@needs_data
def test_gsm8k_train_and_test_are_apart():
    """As their publisher split them.

    Three test questions share a phrase of thirteen words with a train question, none a question.
    """
    train, test = load_problems("gsm8k", "train"), load_problems("gsm8k", "test")
    assert not {problem.question for problem in test} & {problem.question for problem in train}
    known = set().union(*(grams(problem.question, 13) for problem in train))
    shared = [problem.id for problem in test if not known.isdisjoint(grams(problem.question, 13))]
    assert len(shared) == 3
