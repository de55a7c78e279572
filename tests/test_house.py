"""Arrows point one way: what a chapter may import of ours. The short read stays short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train", "eval", "sft"}
CORE = {path.stem for path in ROOT.glob("*.py")} - SCRIPTS
# Chapter -> the first words of the modules of ours that its files may import, besides its own.
MAY_IMPORT = {
    "kernels": set(),
    "sandbox": set(),
    "runtime": {"model", "kernels"},
    "tasks": {"kernels", "sandbox"},
    "selfplay": CORE - {"build", "gepo"} | {"runtime", "tasks", "kernels", "sandbox"},
}
OURS = SCRIPTS | CORE | set(MAY_IMPORT) | {"bench"}


def imported(path):
    """First words of the modules of ours that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found & OURS


@pytest.mark.parametrize("chapter", MAY_IMPORT)
def test_a_chapter_imports_only_what_lies_below_it(chapter):
    for path in (ROOT / chapter).rglob("*.py"):
        assert imported(path) <= MAY_IMPORT[chapter] | {chapter}, path


def test_nothing_imports_a_script_but_scripts_and_the_bench():
    """Only train.py has to do with bench/: it ends by writing its run's page."""
    may = {"train": {"eval", "bench"}, "build": {"eval", "sft"}}
    for path in [*ROOT.glob("*.py"), *(ROOT / "selfplay").glob("*.py")]:
        allowed = may.get(path.stem, set())
        assert imported(path) & (SCRIPTS | {"bench"}) <= allowed, path
    assert not imported(ROOT / "bench/report.py") & (SCRIPTS | {"build", "bench"})


def test_the_root_is_a_table_of_contents():
    assert len(list(ROOT.glob("*.py"))) <= 18


def test_the_short_read_stays_short():
    """train, rollout, rewards, grpo, batches: what one person reads in one sitting."""
    names = ("train", "rollout", "rewards", "grpo", "batches")
    lines = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in names)
    assert lines <= 1600


def test_every_test_that_the_review_names_is_there():
    """`test_a.py::test_one`, `test_two` are both of test_a.py; "..." stands for the rest."""
    text = (ROOT / "docs/review.md").read_text()
    file = ""
    for named, test, rest in re.findall(r"`(?:(test_\w+\.py)(?:::)?)?(test_\w+)?(\.\.\.)?", text):
        file = named or file
        if test:
            end = r"\w*" if rest else ""
            found = re.findall(rf"^def {test}{end}\(", (ROOT / "tests" / file).read_text(), re.M)
            assert len(found) == 1, f"{file}::{test}"
