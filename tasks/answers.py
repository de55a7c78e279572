"""Is what a program gave the right answer? Three kinds of answers, three notions of "same".

same_number   printed text that was read exactly, as the language prints numbers (GSM8K, sums)
same_value    a value of some language against a JSON value (translation by calls)
same_output   printed output against wanted output, word by word (translation by standard input)
"""

import math
import re
from fractions import Fraction

from sandbox.languages.values import Char, Map, Symbol

LONGEST_NUMBER = 400  # characters: no answer is that long, and a huge integer costs time
LONGEST_EXPONENT = 3  # digits: no float has more, and 1e999999999 would fill the memory

# What a language prints when its TOML says nothing else: 42, -0.5, 1e+16.
PRINTED_NUMBER = r"-?\d+(\.\d+)?(e[+-]\d+)?"

_SMALLEST = Fraction(1, 10**3)  # answers nearer to 0 are compared as if they were this large

_WRITTEN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_OUTPUT_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
_OUTPUT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


# ---- numbers ----


def written_number(text):
    """Exact value of a number as people write it (a question, a gold answer), or None.

    42, -5, 1,200, 42.50. Not 3,5 or 12,34: thousands are separated, decimals are not.
    """
    text = text.strip()
    if len(text) > LONGEST_NUMBER or not _WRITTEN.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def printed_number(text, language):
    """Exact value of a number as the language prints one that it has computed, or None.

    The forms stand in the language's [answer] table (docs/sandbox.md). Prolog prints 42, 1.0e10 and
    7r2; what it prints as 84/2, 21*2, 1,200 or +42 is a term that nobody computed.
    """
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    table = language.answer

    ratio = re.fullmatch(table.get("ratio", "(?!)"), text, re.ASCII)  # (?!) matches nothing
    if ratio:
        numerator, denominator = map(int, ratio.groups())
        smallest = 1 if table.get("whole_ratio") else 2  # Ruby prints 84r/2 as 42/1, Lisp as 42
        if denominator < smallest or math.gcd(numerator, denominator) != 1:
            return None
        return Fraction(numerator, denominator)

    if not re.fullmatch(table.get("number", PRINTED_NUMBER), text, re.ASCII):
        return None
    digits, _, exponent = re.sub("[A-Za-z]", "e", text).partition("e")  # Lisp: 1.0d7
    if len(exponent.lstrip("+-0")) > LONGEST_EXPONENT:
        return None
    return Fraction(f"{digits}e{exponent or 0}")


def same_number(value, answer):
    """Two Fractions read from text: equal, or within 1e-6 of the answer when one is not whole.

    Floats round, but 10000001 is not 10000000. Text tells exactly what is whole: 10000001.0 is not
    10000000 either. (close_number sees a float of a language there, and takes the two for equal.)
    """
    if value.denominator == 1 and answer.denominator == 1:
        return value == answer
    return abs(value - answer) <= Fraction(1, 10**6) * max(abs(answer), _SMALLEST)


# ---- values of a language ----


def same_value(value, expected):
    """Whether a value of some language equals a case's JSON value.

    Numbers by value (floats within 1e-6); lists, vectors and tuples alike. Where a language has one
    thing for several (nil, the empty table), it equals any of them.
    """
    # Prolog's truth values are atoms.
    if isinstance(value, Symbol) and value.name in ("true", "false"):
        value = value.name == "true"

    # nil is null and the empty list, and of Lisp false; Lua's {} is an empty list and object.
    if _is_nothing(value) and _is_empty(expected):
        return expected is not False or value == []  # a Python that returns nothing says nothing
    # A truth value is no number: Python's True == 1 must not count.
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, (int, float)):
        return close_number(value, expected)
    if isinstance(expected, str):
        text = value.text if isinstance(value, Char) else value
        return text == expected
    if isinstance(expected, list):
        return _same_list(value, expected)
    if isinstance(expected, dict):
        return _same_object(value, expected)
    return value is expected  # expected is null, and the value is something


def _is_nothing(value):
    """What one language or other writes for an empty list: nil, [], {}. (False is only false.)"""
    return value is None or value == [] or value == Map(())


def _is_empty(expected):
    """null, false, [] and {} in JSON; 0 and "" are not."""
    return expected is None or expected is False or expected == [] or expected == {}


def _same_list(value, expected):
    if not isinstance(value, (list, tuple)) or len(value) != len(expected):
        return False
    return all(map(same_value, value, expected))


def _same_object(value, expected):
    if not isinstance(value, Map):
        return False
    found = {}
    for key, item in value.items:
        key = key.name if isinstance(key, Symbol) else key
        if not isinstance(key, str):  # JSON has no other; a list would not even be hashable
            return False
        found[key] = item
    if found.keys() != expected.keys():
        return False
    return all(same_value(found[key], item) for key, item in expected.items())


def close_number(value, expected):
    """A language's number against a JSON number: exact between whole numbers, else within 1e-6.

    A float is never whole here, whatever it holds: a language that computes 10000000 in floats may
    be off by rounding. (same_number compares text, where 10000001.0 is a whole number.)
    """
    if not isinstance(value, (int, float, Fraction)):
        return False
    is_whole = not isinstance(value, float) and value.denominator == 1
    if isinstance(expected, int) and is_whole:
        return value == expected
    return _close(value, expected)


def _close(left, right):
    try:
        return math.isclose(float(left), float(right), rel_tol=1e-6, abs_tol=1e-9)
    except OverflowError:  # 10**400 is no float, and close to none
        return False


# ---- printed output ----


def same_output(printed, wanted):
    """Whether printed output is the wanted one, line by line and word by word.

    White space at line ends does not count, nor how much of it separates words. Words are the same
    when they are equal, truth values in any case, or decimals within 1e-6: "1  2.0" is "1 2".
    """
    lines, wanted_lines = _lines(printed), _lines(wanted)
    if lines == wanted_lines:
        return True

    words = [line.split() for line in lines]
    wanted_words = [line.split() for line in wanted_lines]
    if list(map(len, words)) != list(map(len, wanted_words)):
        return False
    return all(map(_same_words, words, wanted_words))


def _lines(text):
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same_words(words, wanted_words):
    return all(map(_same_word, words, wanted_words))


def _same_word(printed, wanted):
    if printed == wanted:
        return True
    if wanted in ("true", "false"):
        return printed.lower() == wanted
    if len(printed) > LONGEST_NUMBER:
        return False
    if _OUTPUT_INTEGER.fullmatch(printed) and _OUTPUT_INTEGER.fullmatch(wanted):
        return int(printed) == int(wanted)
    if _OUTPUT_NUMBER.fullmatch(printed) and _OUTPUT_NUMBER.fullmatch(wanted):
        return _close(printed, wanted)
    return False
