"""No benchmark row may be reachable from any training task: by id, by name, by words in a row."""

import re

import known_programs
import pytest

import sft
from sandbox.languages import language_names, load_language
from selfplay import triples
from settings import Settings
from tasks import translate
from tasks.multipl_e import SOURCES, load_benchmark
from tasks.problems import Problem, load_problems

needs_data = pytest.mark.skipif(
    not known_programs.DATA.is_dir(), reason="../shared/data is not here"
)

TRAINING = {  # every --task of train.py and sft.py: the words in a row at which a shared text counts as copied, and its training problems
    "sums": (8, lambda: load_problems("sums", "train")),
    "gsm8k": (8, lambda: load_problems("gsm8k", "train")),
    "gsm8k_steps": (8, lambda: load_problems("gsm8k_steps", "train")),
    "translate": (
        13,
        lambda: translate.load_translations(
            "train", [load_language(name) for name in language_names()]
        ),
    ),  # code repeats itself sooner than prose
    "selfplay": (
        8,
        lambda: [
            Problem(f"triples/{n}", "selfplay", " ".join(d), None)
            for n, d in enumerate(demonstrations())
        ],
    ),  # of its warm start
}


def demonstrations():
    return [
        d
        for name in ("racket", "julia", "lua", "python")
        for d in triples.demonstrations(load_language(name), 300, 0, 6, False)
    ]


def test_no_training_task_is_forgotten():
    for settings in (Settings, sft.WarmStart):
        text = settings.__dataclass_fields__["task"].metadata["help"]
        assert set(re.split(r", | or ", re.sub(r" \(.*?\)", "", text.partition(": ")[2]))) <= set(
            TRAINING
        )


@pytest.fixture(scope="module")
def benchmark():
    """All of MultiPL-E: {(bench, number)}, function names, texts. Also of languages without a TOML; texts of what translate translates, too."""
    rows = [
        r
        for path in sorted((known_programs.DATA / "multipl_e/v3").glob("*.gz"))
        for r in known_programs.rows(path)
    ]
    assert len({r["language"] for r in rows}) == 23
    ids = {tuple(r["name"].lower().split("_", 2)[:2]) for r in rows}
    texts = [r["prompt"] for r in rows] + [
        r.source for source in SOURCES for r in load_benchmark("translate", "python", source=source)
    ]
    return (
        ids,
        {bare(r["name"].split("_", 2)[2]) for r in rows} - {"f"},
        texts,
    )  # HumanEval 106 is called f, which says nothing


def bare(name):
    return name.replace("_", "").lower()


def grams(text, n):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


@needs_data
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Python sources in the data
@pytest.mark.parametrize("task", TRAINING)
def test_no_benchmark_row_is_reachable_from_a_training_task(task, benchmark):
    """By id, by name and by words in a row, over all 23 languages."""
    ids, names, texts = benchmark
    length, problems = TRAINING[task][0], TRAINING[task][1]()
    assert not [p.id for p in problems if re.search("humaneval|multipl_e|/test/", p.id, re.I)]
    assert not [
        p.id
        for p in problems
        if (found := re.search(r"mb[a-z]?[xp]p?/(\d+)", p.id)) and ("mbpp", found[1]) in ids
    ]
    defined = (
        r"\bdef (\w+)|(\w+) ?\([^()]*\) ?\{" if task == "translate" else r"(\w+_\w+)()"
    )  # in prose, anything that looks like a function's name
    assert not names & {
        bare(name)
        for p in problems
        for name in (getattr(p, "entry", ""), *map("".join, re.findall(defined, p.question)))
    }
    copied = set().union(*(grams(text, length) for text in texts))
    assert not [p.id for p in problems if not copied.isdisjoint(grams(p.question, length))]


@needs_data
def test_gsm8k_train_and_test_are_apart():
    """As their publisher split them: three test questions share a phrase of thirteen words with a train question, none a question."""
    train, test = load_problems("gsm8k", "train"), load_problems("gsm8k", "test")
    known = set().union(*(grams(p.question, 13) for p in train))
    assert not {p.question for p in test} & {p.question for p in train}
    assert len([p.id for p in test if not known.isdisjoint(grams(p.question, 13))]) == 3
