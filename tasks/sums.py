"""Built-in grade-school word problems with exact steps, for a machine with no data and no network.

A problem is put together from sentence wordings ("pieces"): an opening, zero to three events, at
most one distractor and a question. Each piece says what it does to the running values, so the right
program comes with the text. The sequence of pieces, names and numbers left out, is its template.

Held out by construction: a template belongs to the test split when crc32(template) % 5 == 0, and a
combination of numbers when crc32(numbers) % 4 == 0. A test problem needs both, a train problem
needs neither, whatever the seed: no test problem shares its template or its numbers with any train
problem. The words themselves occur in both splits.
"""

import random
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple
from zlib import crc32

NAMES = {
    "He": "Tom Sam Ben Max Leo Jack Omar Luis".split(),
    "She": "Ann Mia Eva Zoe Lily Nina Sara Ruth".split(),
}
THINGS = "apples cards stickers pencils cookies shells coins books stamps balls cups eggs".split()
# Number classes of the slots: {n}, {m2}, ... draw from the range named by their letter; c is a
# price such as 2.5.
RANGES = {"n": (10, 90), "m": (3, 40), "k": (2, 9), "h": (100, 300), "c": (0, 9)}
STEP_SHARES = (0.25, 0.35, 0.25, 0.15)  # of problems with one, two, three and four steps
DISTRACTOR_SHARE = 0.25

# A piece: "sentence => NAME=expression, ...". T is the running total; a bare number only names a
# value, anything else is a step.
THINGS_OPEN = """
{N} has {n} {things}. => T=n
{N} starts the day with {n} {things}. => T=n
There are {n} {things} in the bag of {N}. => T=n
{N} finds {n} {things} in the morning and {m} in the afternoon. => T=n+m
{N} has {n} red {things} and {m} blue {things}. => T=n+m
{N} has {k} boxes with {m} {things} in each box. => T=k*m
{N} buys {k} bags of {things}. Each bag holds {m} {things}. => T=k*m
{N} finds {m} {things} every day for {k} days. => T=m*k
{N} had {n} {things} but lost {m} of them. => T=n-m
{M} has {n} {things}. {N} has {k} times as many. => T=n*k
{M} has {n} {things}. {N} has {m} more than {M}. => T=n+m
{M} has {n} {things}. {N} has {m} fewer than {M}. => T=n-m
"""
THINGS_EVENT = """
{P} buys {m} more. => T=T+m
{P} finds {m} more under the bed. => T=T+m
{O} gives {N} {m} more. => T=T+m
{P} gives {m} of them to {O}. => T=T-m
{P} loses {m} on the way home. => T=T-m
{P} sells {m} of them. => T=T-m
Then {p} gives half of them to {O}. => T=T/2
The next day {p} doubles what {p} has. => T=T*2
{P} uses {k} every day for {k2} days. => S=k*k2, T=T-S
{P} buys {k} packs of {k2} more. => S=k*k2, T=T+S
{P} gives {k} to each of {k2} friends. => S=k*k2, T=T-S
{P} throws a third of them away. => S=T/3, T=T-S
"""
THINGS_ASK = """
How many {things} does {N} have now? =>
How many {things} are there in the end? =>
How many {things} does {N} have left? =>
{P} puts them equally into {k} boxes. How many {things} are in each box? => T=T/k
{P} shares them equally among {k} friends. How many {things} does each friend get? => T=T/k
{P} sells them all for {k} dollars each. How many dollars does {p} get? => T=T*k
{O} has {m} more than {N}. How many {things} does {O} have? => T=T+m
{O} has {n} {things}. How many {things} do {N} and {O} have together? => T=T+n
{P} wants to have {h} {things}. How many more does {p} need? => T=h-T
"""
MONEY_OPEN = """
{N} has {n} dollars. => T=n
{M} gives {N} {n} dollars. => T=n
{N} works {k} hours and earns {m} dollars an hour. => T=k*m
{N} saves {m} dollars a week for {k} weeks. => T=m*k
{N} sells {m} {things} for {k} dollars each. => T=m*k
{N} earns {n} dollars on Monday and {m} dollars on Tuesday. => T=n+m
{M} has {n} dollars. {N} has {k} times as much. => T=n*k
"""
MONEY_EVENT = """
{P} buys a book for {m} dollars. => T=T-m
{P} spends {m} dollars on food. => T=T-m
{P} buys {k} {things} for {k2} dollars each. => S=k*k2, T=T-S
{P} buys {k} {things} for {c} dollars each. => S=k*c, T=T-S
{P} spends half of the money on a gift. => T=T/2
{O} gives {N} {m} dollars. => T=T+m
{P} earns {k} dollars a day for {k2} days. => S=k*k2, T=T+S
{P} pays {k} dollars for the bus every day for {k2} days. => S=k*k2, T=T-S
"""
MONEY_ASK = """
How many dollars does {N} have now? =>
How many dollars does {N} have left? =>
How much money does {N} have in the end? =>
{P} shares the money equally among {k} friends. How many dollars does each friend get? => T=T/k
{P} wants a bike for {h} dollars. How many more dollars does {p} need? => T=h-T
{O} has {k} times as much. How many dollars does {O} have? => T=T*k
{P} spends it all on {things} for {k} dollars each. How many {things} does {p} get? => T=T/k
"""
SHOP_OPEN = """
{N} buys {k} {things} for {k2} dollars each. => T=k*k2
{N} buys {k} {things} for {c} dollars each. => T=k*c
{N} buys a bag for {n} dollars. => T=n
{N} buys a bag for {n} dollars and a hat for {m} dollars. => T=n+m
"""
SHOP_EVENT = """
{P} also buys {k} {other} for {k2} dollars each. => S=k*k2, T=T+S
{P} also buys a book for {m} dollars. => T=T+m
The shop takes {k} dollars off. => T=T-k
The shop takes half off. => T=T/2
"""
SHOP_ASK = """
How many dollars does {N} pay? =>
How much does {N} pay in all? =>
{P} pays with {h} dollars. How many dollars does {p} get back? => T=h-T
{N} and {O} share the cost equally. How many dollars does each of them pay? => T=T/2
"""
READ_OPEN = """
{N} reads {n} pages on Monday. => T=n
{N} reads {m} pages a day for {k} days. => T=m*k
{N} reads {n} pages on Monday and {m} pages on Tuesday. => T=n+m
{N} reads {k} parts of a book with {m} pages each. => T=k*m
{N} reads {n} pages on Monday and twice as many on Tuesday. => S=n*2, T=n+S
"""
READ_EVENT = """
The next day {p} reads {m} more pages. => T=T+m
Then {p} reads {k} pages every day for {k2} days. => S=k*k2, T=T+S
Then {p} reads half as many pages again. => S=T/2, T=T+S
"""
READ_ASK = """
How many pages does {N} read in all? =>
The book has {h} pages. How many pages are left? => T=h-T
{O} reads {m} pages fewer. How many pages does {O} read? => T=T-m
{O} reads {k} times as many. How many pages does {O} read? => T=T*k
{P} reads {k} pages an hour. How many hours does {p} read? => T=T/k
"""
PEOPLE_OPEN = """
A class has {n} boys and {m} girls. => T=n+m
There are {n} people on a bus. => T=n
There are {k} tables with {k2} people at each table. => T=k*k2
A train has {k} cars with {m} people in each car. => T=k*m
"""
PEOPLE_EVENT = """
Then {m} more people come. => T=T+m
Then {m} people leave. => T=T-m
Half of them go home. => T=T/2
Then {k} groups of {k2} people come. => S=k*k2, T=T+S
"""
PEOPLE_ASK = """
How many people are there now? =>
How many people are there in the end? =>
They sit in rows of {k}. How many rows are there? => T=T/k
Each of them needs {k} {things}. How many {things} do they need? => T=T*k
There are {h} seats. How many seats are free? => T=h-T
"""
MILES_OPEN = """
{N} drives {n} miles to town. => T=n
{N} drives {m} miles an hour for {k} hours. => T=m*k
{N} runs {k} miles every day for {k2} days. => T=k*k2
{N} walks {c} miles every day for {k} days. => T=c*k
"""
MILES_EVENT = """
Then {p} goes {m} more miles. => T=T+m
Then {p} goes {k} miles an hour for {k2} hours. => S=k*k2, T=T+S
{P} takes the same road back. => T=T*2
"""
MILES_ASK = """
How many miles is that in all? =>
How many miles does {N} go? =>
The road is {h} miles long. How many miles are left? => T=h-T
{O} goes {m} miles less. How many miles does {O} go? => T=T-m
{O} goes {k} times as far. How many miles does {O} go? => T=T*k
"""
COMPARE_OPEN = """
{N} has {n} {things}. => A=n
{N} finds {n} {things}. => A=n
{N} buys {k} bags of {m} {things}. => A=k*m
"""
COMPARE_SECOND = """
{M} has {m} more than {N}. => B=A+m
{M} has {m} fewer than {N}. => B=A-m
{M} has half as many as {N}. => B=A/2
{M} has {k} times as many as {N}. => B=A*k
"""
COMPARE_THIRD = """
{O} has {m} more than {M}. => C=B+m
{O} has {m} fewer than {M}. => C=B-m
{O} has half as many as {M}. => C=B/2
{O} has {k} times as many as {M}. => C=B*k
"""
PAIR_ASK = """
How many {things} do they have together? => T=A+B
How many {things} do {N} and {M} have? => T=A+B
How many more {things} does {M} have than {N}? => T=B-A
How many more {things} does {N} have than {M}? => T=A-B
"""
TRIO_ASK = """
How many {things} do the three have together? => T=A+B+C
How many {things} do {N} and {O} have together? => T=A+C
How many {things} does {O} have? => T=C
"""
DISTRACTORS = """
{Q} has {m} {other}.
{Q} is {m} years old.
{N} also has {k} {other}.
The bag of {Q} holds {m} {other}.
It is {k} miles to the shop.
"""


@dataclass(frozen=True)
class Story:
    """A word problem as it was told."""

    template: str  # its pieces, names and numbers left out
    numbers: tuple  # of strings: the numbers that its steps use
    question: str
    steps: list  # of (variable, expression), such as [("v1", "48/2"), ("v2", "48+v1")]


class Stage(NamedTuple):
    """One part of a story: how many pieces it takes of which."""

    pieces: list  # of (sentence, effect)
    fewest: int
    most: int


class World(NamedTuple):
    """What stories are about."""

    weight: float  # how often it is told, roughly by how many wordings it has
    stages: list
    fractions: bool  # its values may end in .5 or .25


def pieces(text):
    """[(sentence, effect)] of a block of pieces."""
    return [tuple(part.strip() for part in line.split("=>")) for line in text.strip().splitlines()]


def _stages(opening, events, ask):
    return [Stage(pieces(opening), 1, 1), Stage(pieces(events), 0, 3), Stage(pieces(ask), 1, 1)]


_FIRST = Stage(pieces(COMPARE_OPEN), 1, 1)
_SECOND = Stage(pieces(COMPARE_SECOND), 1, 1)
_THIRD = Stage(pieces(COMPARE_THIRD), 1, 1)

WORLDS = [
    World(4, _stages(THINGS_OPEN, THINGS_EVENT, THINGS_ASK), False),
    World(3, _stages(MONEY_OPEN, MONEY_EVENT, MONEY_ASK), True),
    World(2, _stages(SHOP_OPEN, SHOP_EVENT, SHOP_ASK), True),
    World(1.5, _stages(READ_OPEN, READ_EVENT, READ_ASK), False),
    World(1.5, _stages(PEOPLE_OPEN, PEOPLE_EVENT, PEOPLE_ASK), False),
    World(1.5, _stages(MILES_OPEN, MILES_EVENT, MILES_ASK), True),
    World(1, [_FIRST, _SECOND, Stage(pieces(PAIR_ASK), 1, 1)], False),
    World(1, [_FIRST, _SECOND, _THIRD, Stage(pieces(TRIO_ASK), 1, 1)], False),
]
_WEIGHTS = [world.weight for world in WORLDS]

_SLOT = re.compile(r"\{([nmkhc]\d?)\}")  # {n}, {k2}: a number in a sentence
_NUMBER_NAME = re.compile(r"[nmkhc]\d?")  # n, k2: the same in an effect
_NAME = re.compile(r"[a-zA-Z]\d?")  # or T, S, A, B, C: a running value
_OPERATOR = re.compile(r"[-+*/]")


def make(split, seed, index):
    """Story number `index` of a split ("train" or "test") and seed, always the same."""
    rng = random.Random(f"{split}/{seed}/{index}")
    wanted = rng.choices((1, 2, 3, 4), STEP_SHARES)[0]
    while True:
        chosen, fractions = _template(rng, split, wanted)
        # Most templates find fitting numbers in a few draws; some never do.
        for _ in range(20):
            story = _fill(rng, split, chosen, fractions)
            if story:
                return story


def is_test(text, modulus):
    """Whether a text belongs to the test split: a template (modulus 5) or numbers (modulus 4)."""
    return crc32(text.encode()) % modulus == 0


def _template(rng, split, wanted):
    """Draw pieces of one world until they have `wanted` steps and their wording is the split's.

    Returns (pieces, whether values may have fractions).
    """
    while True:
        world = rng.choices(WORLDS, _WEIGHTS)[0]
        chosen = []
        for stage in world.stages:
            for _ in range(rng.randint(stage.fewest, stage.most)):
                chosen.append(rng.choice(stage.pieces))

        sentences = [sentence for sentence, _ in chosen]
        steps = sum(len(re.findall(r"=[^,]*[-+*/]", effect)) for _, effect in chosen)
        if steps != wanted or len(set(sentences)) < len(sentences):
            continue
        if is_test(" ".join(sentences), 5) == (split == "test"):
            return chosen, world.fractions


def _fill(rng, split, chosen, fractions):
    """A Story with numbers and names in the template's places.

    None when a value is not positive, too large, not whole enough, or the numbers are the other
    split's.
    """
    texts, numbers, steps = [], [], []
    values = {}  # of the steps: v1, v2, ...
    names = {}  # running value (T, A ...) -> the step or number that it stands for

    for sentence, effect in chosen:
        slots = {slot: _number(rng, slot[0]) for slot in _SLOT.findall(sentence)}
        texts.append(_with_numbers(sentence, slots))
        for assignment in effect.split(", ") if effect else []:
            name, expression = assignment.split("=")
            numbers += [slots[slot] for slot in _NUMBER_NAME.findall(expression)]
            expression = _with_values(expression, slots, names)
            if not _OPERATOR.search(expression):  # T=n only gives a number a name
                names[name] = expression
                continue

            value = _evaluate(expression, values)
            if not 0 < value < 1000 or value.denominator not in ((1, 2, 4) if fractions else (1,)):
                return None
            variable = f"v{len(steps) + 1}"
            names[name] = variable
            values[variable] = value
            steps.append((variable, expression))

    if is_test(" ".join(numbers), 4) != (split == "test"):
        return None
    template = " ".join(sentence for sentence, _ in chosen)
    return Story(template, tuple(numbers), _tell(rng, texts), steps)


def _number(rng, kind):
    value = rng.randint(*RANGES[kind])
    return f"{value}.5" if kind == "c" else str(value)


def _with_numbers(sentence, slots):
    return _SLOT.sub(lambda match: slots[match[1]], sentence)


def _with_values(expression, slots, names):
    """ "T-m" with m drawn as 7 and T standing for v2 -> "v2-7"."""
    return _NAME.sub(lambda match: slots.get(match[0]) or names[match[0]], expression)


def _evaluate(expression, values):
    """Value of a sum as it stands in the pieces: one operator, or several + and nothing else."""
    terms = [values.get(term) or Fraction(term) for term in _OPERATOR.split(expression)]
    operator = _OPERATOR.search(expression)[0]
    if operator == "+":
        return sum(terms)
    left, right = terms
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right


def _tell(rng, texts):
    """Put names and things into the sentences, and perhaps a distractor before the question."""
    if rng.random() < DISTRACTOR_SHARE:
        distractor = rng.choice(DISTRACTORS.strip().splitlines())
        distractor = re.sub(r"\{([mk])\}", lambda match: _number(rng, match[1]), distractor)
        texts = [*texts[:-1], distractor, texts[-1]]

    # The others are of the other sex, so that a pronoun means one person only.
    pronoun = rng.choice(("He", "She"))
    first = rng.choice(NAMES[pronoun])
    second, third, fourth = rng.sample(NAMES["She" if pronoun == "He" else "He"], 3)
    things, other = rng.sample(THINGS, 2)
    return " ".join(texts).format(
        N=first,
        M=second,
        O=third,
        Q=fourth,
        P=pronoun,
        p=pronoun.lower(),
        things=things,
        other=other,
    )
