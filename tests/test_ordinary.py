"""Ordinary programs of every language run inside the walls, and print the same at every level.

tests/ordinary.toml holds one for each: what such programs read and start. What the walls refuse,
and why, is in docs/sandbox.md.
"""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import Job, Pool
from sandbox.languages import load_language
from sandbox.probe import LEVELS, available_level, probe

PROGRAMS = tomllib.loads((Path(__file__).parent / "ordinary.toml").read_text())
SLOW = ("cpp", "java", "julia", "r", "racket", "ruby", "scala", "typescript")  # over 0.5 s of CPU
BEST = available_level(probe())[0]
REACHED = LEVELS[: LEVELS.index(BEST) + 1]


def job_of(name):
    if sentence := load_language(name).missing():
        pytest.skip(sentence)
    language = load_language(name)
    source = PROGRAMS[name]["source"].lstrip("\n")
    return Job(name, {language.file: source}, b"21\n", replace(language.limits, cpu=10.0))


@pytest.mark.parametrize("level", [level for level in REACHED if level != "portable"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PROGRAMS],
)
def test_an_ordinary_program(name, level):
    job = job_of(name)
    with Pool(workers=1, level=level) as pool:
        result = pool.submit(job).result()
    lines = [line.rstrip() for line in result.stdout.decode().splitlines()]
    assert lines == PROGRAMS[name]["expected"].strip().splitlines(), result
    assert result.status == "ok", result
