"""When a printed number, a value of some language, or printed output is the right answer."""

from fractions import Fraction

import pytest

from sandbox.languages import language_names, load_language
from sandbox.languages.values import Char, Map, Symbol
from tasks.answers import (
    close_number,
    printed_number,
    same_number,
    same_output,
    same_value,
    written_number,
)

EMPTY = Map(())
ANSWERING = [name for name in language_names() if load_language(name).answer]

# ---- numbers as people write them ----


@pytest.mark.parametrize(
    "text, value",
    [
        ("42", "42"),
        (" 1,200\n", "1200"),
        ("1,234,567.5", "1234567.5"),
        ("-5", "-5"),
        ("42.50", "85/2"),
        ("0.5", "1/2"),
    ],
)
def test_written_numbers(text, value):
    assert written_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["", "3,5", "12,34", "1,20", "12,3456", "1,2345", ",200", "1/2", "1e3", "$3", "4 2", "7."]
    + ["0x2A", "\u0664\u0662", "9" * 401],
)
def test_what_is_no_written_number(text):
    assert written_number(text) is None


# ---- numbers as languages print them ----


@pytest.mark.parametrize("name", ANSWERING)
def test_every_language_prints_decimals(name):
    read = [printed_number(text, load_language(name)) for text in ("42", "-7", "42.0", " 0.5\t")]
    assert read == [42, -7, 42, Fraction(1, 2)]


@pytest.mark.parametrize(
    "name, text, value",
    [
        # Each as the language prints what it has computed: 7 / 2 and 84 / 2 ...
        ("prolog", "7r2", "7/2"),
        ("prolog", "-7r2", "-7/2"),
        ("lisp", "7/2", "7/2"),
        ("racket", "7/2", "7/2"),
        ("scheme", "-7/2", "-7/2"),
        ("clojure", "7/2", "7/2"),
        ("python", "7/2", "7/2"),
        ("perl", "7/2", "7/2"),
        ("julia", "7//2", "7/2"),
        ("julia", "42//1", 42),
        ("haskell", "7 % 2", "7/2"),
        ("haskell", "(-7) % 2", "-7/2"),
        ("haskell", "42 % 1", 42),
        ("ruby", "7/2", "7/2"),
        ("ruby", "42/1", 42),
        ("go", "42/1", 42),
        # ... and 1e22, or what has an exponent there.
        ("prolog", "1.0e10", 10**10),
        ("lisp", "1.0e22", 10**22),
        ("lisp", "42.0d0", 42),
        ("lisp", "1.5f0", "3/2"),
        ("racket", "1e22", 10**22),
        ("scheme", "1.0e22", 10**22),
        ("julia", "1.0e-7", "1/10000000"),
        ("haskell", "1.0e7", 10**7),
        ("java", "1.0E10", 10**10),
        ("clojure", "1.0E10", 10**10),
        ("elixir", "1.0e16", 10**16),
        ("php", "1.0E+25", 10**25),
        ("python", "1e+16", 10**16),
        ("python", "1E+3", 1000),
        ("ruby", "1.0e+16", 10**16),
        ("ruby", "0.42e2", 42),
        ("lua", "1e+22", 10**22),
        ("r", "1e+05", 10**5),
        ("javascript", "1e+21", 10**21),
        ("bash", ".5", "1/2"),
    ],
)
def test_a_language_prints_numbers_in_forms_of_its_own(name, text, value):
    assert printed_number(text, load_language(name)) == Fraction(value)


# Terms, text for people, another base, and what is too large.
UNCOMPUTED = [
    *("", "x", "84/2", "84//2", "84r2", "84 % 2", "84 rdiv 2", "21*2", "21 * 2", "40+2", "- 5"),
    *("--5", "1,200", "1 200", "1_200", "+42", "0x2A", "0b101010", "1e3", "1E3", "$42", "42%"),
    *("42 dollars", "[42]", "(42)", "'42'", "42.", "1.2.3", "1e", "e5", "-", ".", "4 2", "42\n43"),
    *("7r0", "1/0", "0/0", "7/-2", "42/1/1", "inf", "nan", "NaN", "true", "True", "nil", "()"),
    *("\u0664\u0662", "1.0e9999999", "1e+99999999999", "9" * 401),
]


@pytest.mark.parametrize("name", ANSWERING)
def test_what_nobody_computed_is_no_number(name):
    read = {text: printed_number(text, load_language(name)) for text in UNCOMPUTED}
    if name == "racket":
        del read["1e3"]  # Racket prints 1e22
    assert set(read.values()) == {None}, read


@pytest.mark.parametrize(
    "name, text",
    [
        ("prolog", "7/2"),
        ("prolog", "42r1"),  # Prolog prints 42
        ("lisp", "42/1"),
        ("python", "42/1"),
        ("julia", "7/2"),
        ("haskell", "7/2"),
        ("ruby", "7//2"),
        ("ruby", "84/2"),
        ("lua", "7/2"),
        ("r", "7/2"),
        ("javascript", "7/2"),
        ("lisp", "1.5E0"),
        ("prolog", "1e10"),
        ("java", "1.0e10"),
        ("python", "1e16"),
    ],
)
def test_another_languages_form_is_no_number(name, text):
    assert printed_number(text, load_language(name)) is None


@pytest.mark.parametrize(
    "value, answer, same",
    [
        ("3.3333333", "10/3", True),
        ("3.33", "10/3", False),
        ("10.000000000000002", 10, True),
        (10000001, 10000000, False),
        (0, 0, True),
        ("0.001", 0, False),
    ],
)
def test_numbers_are_the_same_exactly_or_within_a_millionth(value, answer, same):
    assert same_number(Fraction(value), Fraction(answer)) is same


# ---- values of a language ----


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
        # what returns nothing does not say false; Lisp's nil, which is [] here, does
        (None, False, False),
        (EMPTY, False, False),
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


# ---- printed output ----


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
        ("\u0663", "3", False),  # an Arabic digit
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
