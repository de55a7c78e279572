"""Values that programs print, compared with right ones: numbers (GSM8K, sums), values of any language and printed output (translation)."""

import math
import re
from fractions import Fraction

from sandbox.languages.values import Map, Symbol

_DECIMAL = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d*)?(?:[eEdDfFlLsS]([-+]?\d{1,3}))?")


_RATIO = re.compile(r"([-+]?\d+) ?(?:r|//?|%) ?(\d+)")


def parse_number(text):
    """Exact value of a printed number, or None: 42, 1,200, 42.0, 1e3, 42.0d0 (Lisp), 3/2, 3r2 (Prolog), 3//2 (Julia), 3 % 2 (Haskell)."""
    text = text.strip()
    if len(text) > 400:  # no answer is that long, and a huge integer costs time
        return None
    if match := _RATIO.fullmatch(text):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    match = _DECIMAL.fullmatch(text)
    if not match or not (match[2] or len(match[3] or "") > 1):
        return None
    sign, whole, decimals, exponent = match.groups()
    return Fraction(f"{sign}{(whole or '0').replace(',', '')}{decimals or ''}e{exponent or 0}")


def same_number(value, answer):
    """Equal, or within 1e-6 relative when one of them is no whole number: floats round, but 10000001 is not 10000000."""
    if value.denominator == 1 and answer.denominator == 1:
        return value == answer
    return abs(value - answer) <= Fraction(1, 10**6) * max(abs(answer), Fraction(1, 10**3))


def same_value(value, expected):
    """A value of some language equals a case's JSON value: numbers by value (floats within 1e-6), lists, vectors and tuples alike, and where a
    language has one thing for several (nil, empty table) any of them."""
    if isinstance(value, Symbol) and value.name in ("true", "false"):  # Prolog's
        value = value.name == "true"
    if value is None or value is False or value == [] or value == Map(()):
        if not expected and not isinstance(expected, (int, float, str)) or expected is False:
            return (
                value is expected
                or isinstance(expected, type(value))
                or value in (None, [], Map(()))
            )
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    if isinstance(expected, (int, float)):
        return close_number(value, expected)
    if isinstance(expected, list):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(map(same_value, value, expected))
        )
    if isinstance(expected, dict):
        found = (
            {k.name if isinstance(k, Symbol) else k: v for k, v in value.items}
            if isinstance(value, Map)
            else None
        )
        return (
            found is not None
            and found.keys() == expected.keys()
            and all(same_value(found[k], v) for k, v in expected.items())
        )
    if isinstance(expected, str):
        return (value.text if hasattr(value, "text") else value) == expected
    return value is expected


def close_number(value, expected):
    if not isinstance(value, (int, float)) and not hasattr(value, "numerator"):
        return False
    if isinstance(expected, int) and getattr(value, "denominator", 0) == 1:
        return value == expected
    return math.isclose(float(value), expected, rel_tol=1e-6, abs_tol=1e-9)


def same_output(printed, wanted):
    """Equal up to white space at line ends, or word by word where words are equal, truth values in any case, or decimals within 1e-6."""
    clean = lambda text: [line.rstrip() for line in text.rstrip().splitlines()]
    if clean(printed) == clean(wanted):
        return True
    words = [[line.split() for line in clean(text)] for text in (printed, wanted)]
    if [len(line) for line in words[0]] != [len(line) for line in words[1]]:
        return False
    return all(_same_word(a, b) for left, right in zip(*words) for a, b in zip(left, right))


def _same_word(printed, wanted):
    if printed == wanted or (wanted in ("true", "false") and printed.lower() == wanted):
        return True
    if not all(
        re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", w) for w in (printed, wanted)
    ):
        return False
    if re.fullmatch(r"[-+]?\d+", printed) and re.fullmatch(r"[-+]?\d+", wanted):
        return int(printed) == int(wanted)
    return math.isclose(float(printed), float(wanted), rel_tol=1e-6, abs_tol=1e-9)
