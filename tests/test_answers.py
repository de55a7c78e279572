"""When a value of some language, or printed output, is the right answer."""

from fractions import Fraction

import pytest

from sandbox.languages.values import Char, Map, Symbol
from tasks.answers import close_number, same_number, same_output, same_value

EMPTY = Map(())


@pytest.mark.parametrize(
    "value,expected,same",
    [
        # numbers, by value
        (3, 3, True),
        (3.0, 3, True),
        (3, 3.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (Fraction(3, 10), 0.3, True),
        (2**70, 2**70, True),
        (2**70 + 1, 2**70, False),
        ("1", 1, False),
        (10**400, 2.5, False),  # no float is that large
        # truth values are no numbers
        (1, True, False),
        (True, 1, False),
        (False, 0, False),
        (False, False, True),
        (True, False, False),
        (Symbol("true"), True, True),
        (Symbol("false"), False, True),
        (Symbol("true"), "true", False),
        # lists, vectors and tuples alike
        ([1, [2]], [1, [2]], True),
        ((1, 2), [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 2], False),
        # nil, [] and {} are nothing, whichever the language has
        ([], [], True),
        ([], False, True),
        ([], None, True),
        (None, [], True),
        (None, {}, True),
        (EMPTY, [], True),
        (EMPTY, {}, True),
        ([[]], [False], True),
        # but false is only false, and 0 and "" are something
        (False, [], False),
        (False, None, False),
        ([], 0, False),
        ([], "", False),
        (None, "", False),
        (1, None, False),
        ([], [1], False),
        # text
        ("a", "a", True),
        (Char("a"), "a", True),
        (Symbol("a"), "a", False),
        # objects
        (Map((("a", 1),)), {"a": 1}, True),
        (Map(((Symbol("a"), 1),)), {"a": 1}, True),
        (Map((("a", 2),)), {"a": 1}, False),
        (Map((("a", 1), ("b", 2))), {"a": 1}, False),
        ([1], {"a": 1}, False),
        (Map((([1], 2),)), {"a": 1}, False),  # Lua: {[{1}] = 2}
    ],
)
def test_same_value(value, expected, same):
    assert same_value(value, expected) is same


@pytest.mark.parametrize(
    "printed,wanted,same",
    [
        ("3\n", "3", True),
        ("3 \n\n", "3", True),
        ("3.0", "3", True),
        ("0.30000000000000004", "0.3", True),
        ("0.31", "0.3", False),
        ("True", "true", True),
        ("1 2\n3", "1 2\n3", True),
        ("1  2", "1 2", True),
        ("1 2 3", "1 2\n3", False),
        ("10000000000000001", "10000000000000002", False),
        ("a b", "ab", False),
        ("", "0", False),
        ("nan", "nan", True),
        ("Yes", "yes", False),
        ("9" * 5000, "9", False),  # Python reads no integer of more than 4300 digits
    ],
)
def test_same_output(printed, wanted, same):
    assert same_output(printed, wanted) is same


def test_a_whole_number_is_exact_in_text_and_close_as_a_float():
    """1 in 10,000,000 is within 1e-6: only what is known to be whole is compared exactly."""
    assert not same_number(Fraction("10000001.0"), Fraction(10000000))
    assert close_number(10000001.0, 10000000)
    assert not close_number(10000001, 10000000)
    assert same_number(Fraction("0.333333"), Fraction("0.3333331"))
    assert close_number(Fraction(333333, 10**6), 0.3333331)
