"""Patterns of the languages' TOMLs take linear time, whatever a model wrote.

Each meets texts made of its own words: one of them, a long run of something, and an end at which it
fails. A pattern in quadratic time takes four times as long for a run twice as long.
"""

import re
import time

import pytest

from sandbox.languages import language_names, load_language

SHORT = 16_000  # characters; the quadratic patterns below take 0.25 s or more for twice as many
TOO_SHORT = 0.02  # seconds that say nothing; a linear pattern takes some 2 ms for twice as many
RUNS = (" ", "\n", "\t ", "a", "0", "(", "a ", "a\n", "*")
ENDS = ("\x01", "\n\x01")
SEARCHED = ("drop", "imports", "holder", "private", "call")


def patterns(language):
    """A language's patterns that are looked for in a model's text: {place in its TOML: pattern}."""
    answer = language.answer
    tests = answer.get("tests", {})
    found = {"defines": language.defines}
    found |= {f"answer.{key}": answer.get(key) for key in ("hoist", "entry")}
    found |= {f"answer.tests.{key}": tests.get(key) for key in SEARCHED}
    return {place: text.replace("NAME", "f") for place, text in found.items() if text}


def texts(pattern, length):
    """Words of the pattern (of "^return\\b": "return") beside runs."""
    words = dict.fromkeys(["", *re.findall(r"(?<!\\)[A-Za-z_<>/]{2,}", pattern)])
    for word in words:
        for run in (*RUNS, f"{word} ", f"{word}\n"):
            for end in ENDS:
                yield word + run * (length // len(run)) + end


def seconds(pattern, text):
    started = time.process_time()
    for _ in pattern.finditer(text):
        pass
    return time.process_time() - started


def slow(pattern):
    """Texts for which a pattern takes quadratic time."""
    for short, long in zip(texts(pattern.pattern, SHORT), texts(pattern.pattern, 2 * SHORT)):
        took = seconds(pattern, long)
        if took > TOO_SHORT:
            took = min(took, seconds(pattern, long))
            if took > 3 * seconds(pattern, short):
                yield short[:40], took


# What JavaScript's, C#'s and Lua's tables had.
QUADRATIC = (
    r"(?m)^\s*export\s+(?:default\s+)?",
    r"(?m)\bfunction\s*\*?\s*f\b",
    r"(?m)^[ \t]*(?:(?:private|protected|internal)\s+)*(?=static\s)",
    r"(?m)^return\b[^\n]*\s*\Z",
)


@pytest.mark.parametrize("pattern", QUADRATIC)
def test_slow_patterns_are_seen(pattern):
    assert any(slow(re.compile(pattern)))


@pytest.mark.parametrize("name", language_names())
def test_patterns_take_linear_time(name):
    for place, pattern in patterns(load_language(name)).items():
        assert not list(slow(re.compile(pattern))), place
