"""Components that look at the form of a completion: as published, and in linear time."""

import random
import re
import time
from fractions import Fraction

import pytest

import rewards
from sandbox.languages import load_language
from tasks.problems import Problem


def facts_of(text, language):
    problem = Problem("p", "sums", "?", Fraction(7))
    return rewards.Facts(text, rewards.parse(text, language), language, False, problem)


def test_layout_is_the_published_pattern():
    """soft_format and strict_format on 20,000 texts of marks, blanks and letters, drawn by chance."""
    language = load_language("prolog")
    names = rewards.tags_of(language)
    marks = [f"<{name}>" for name in names] + [f"</{name}>" for name in names]
    pieces = [*marks, *marks, "\n", "\n", "\n", " ", "x"]
    soft = r"\s*".join(rf"<{name}>\s*(.+?)\s*</{name}>" for name in names)
    strict = r"\s*".join(rf"<{name}>\n(.+?)\n</{name}>" for name in names) + r"\s*$"

    chance = random.Random(0)
    found = [0, 0]
    for _ in range(20_000):
        text = ""
        for name in names:  # often right, each piece sometimes left out or doubled
            for piece in (f"<{name}>", "\n", "x", "\n", f"</{name}>", "\n"):
                text += piece * chance.choice((0, 1, 1, 1, 1, 1, 1, 2))
                text += chance.choice(pieces) * (chance.random() < 0.05)
        facts = facts_of(text, language)
        for number, (component, pattern) in enumerate(
            ((rewards.soft_format, soft), (rewards.strict_format, strict))
        ):
            right = re.match(pattern, text, re.DOTALL) is not None
            assert component(facts) == right, text
            found[number] += right
    assert min(found) > 300  # both outcomes occur


@pytest.mark.parametrize(
    "text",
    [
        "<reasoning>" + "\n" * 60_000,
        "<reasoning>" + "</reasoning><code></code><query></query>" * 1500,
        "<reasoning>x</reasoning><code>x" + " " * 60_000 + "x</code><query>x</query>",
        "<reasoning>" + "\n</reasoning>" * 5000 + "\n<code>\n" * 5000,
    ],
    ids=["blanks", "parts", "blanks in code", "ends"],
)
def test_no_completion_stalls_the_trainer(text):
    """Components and parse are linear: the first took minutes, cubic in its blanks."""
    language = load_language("prolog")
    started = time.process_time()
    facts = facts_of(text, language)
    for name, component in rewards.COMPONENTS.items():
        component(facts)
        assert time.process_time() - started < 2, name
