"""Values as data: types, equality and canonical literals in any language.

    write([1, "a"], lua) -> '{1, "a"}'
    same(1, 1.0, python) -> True, same(1, 1.0, racket) -> False

A language's TOML says how its literals look, in its [call.values] table: "family" is "brackets"
([1, 2], {"a": 1}, f(x)) or "lists" ('(1 2), the Lisp family). literals.py reads what write() gives.
`numbers` says which are equal (same()). `typed`: the members of a list are of one kind, and whole
numbers have `integer_bits` (OCaml). `vectors`: what vector_of() says (R).

Integers, floats, strings, truth values, None, lists and tuples (vectors in the Lisp family) are
Python's own; ratios are Fractions. The other kinds are below.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_TEXT = 2000  # characters of a value; longer ones are refused, never cut
SMALLEST = -(2**63)
LUA_SMALLEST = "(-9223372036854775807-1)"  # as a numeral it would be the negative of a float


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Char:
    text: str


@dataclass(frozen=True)
class Pair:
    """A cons cell whose second part is not a list: (a . b)."""

    first: object
    second: object


@dataclass(frozen=True)
class Map:
    items: tuple  # of (key, value)


@dataclass(frozen=True)
class Set:
    items: tuple


@dataclass(frozen=True)
class Compound:
    """A Prolog term name(args) that is not a list."""

    name: str
    args: tuple


def cons(first, second):
    return [first, *second] if isinstance(second, list) else Pair(first, second)


def table_of(language):
    """A language's [call.values] table; ValueError when it has none."""
    if "values" not in language.call:
        raise ValueError(
            f"{language.name} cannot be used for self-play: its TOML has no [call.values] table"
        )
    return language.call["values"]


# ---- comparing ----


def same(a, b, language):
    """Equality as the language sees it.

    [call.values] numbers = "value": 1 equals 1.0; "exact": it does not; "text": "1" equals 1 too.
    """
    table = table_of(language)
    return key_of(a, table) == key_of(b, table)


def key_of(value, table):
    """Nested tuples that are equal when the values are; sets and dictionaries have no order."""
    if table.get("vectors"):
        value = vector_of(value)
    if value is None or isinstance(value, bool):
        return ("word", value)
    if isinstance(value, str) and table["numbers"] == "text":
        value = _number_of_text(value)

    if isinstance(value, (int, float, Fraction)):
        if table["numbers"] != "exact":
            return ("number", Fraction(value))
        return ("number", isinstance(value, float), Fraction(value))

    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(key_of(v, table) for v in value))

    if isinstance(value, Map):
        pairs = [(key_of(k, table), key_of(v, table)) for k, v in value.items]
        return ("map", *sorted(pairs, key=repr))
    if isinstance(value, Set):
        return ("set", *sorted({key_of(v, table) for v in value.items}, key=repr))

    if isinstance(value, Pair):
        return ("pair", key_of(value.first, table), key_of(value.second, table))
    if isinstance(value, Compound):
        return ("compound", value.name, *(key_of(v, table) for v in value.args))
    return (type(value).__name__, value)


def vector_of(value):
    """A value as R has it: [1] is 1, [] is None, and a list of several kinds is a tuple.

    Lists are written c(...), tuples list(...).
    """
    if isinstance(value, Map) and not value.items:
        return ()
    if not isinstance(value, list):
        return value
    if not value:
        return None
    kinds = {float if type(member) is int else type(member) for member in value}
    if len(kinds) > 1 or not kinds <= {bool, float, str}:
        return tuple(value)
    return value[0] if len(value) == 1 else value


def _number_of_text(text):
    """The number that Perl writes so, else the text: "15" -> 15, "1.5" -> 1.5, "1.50" -> "1.50"."""
    if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text):
        return int(text)
    if re.fullmatch(r"-?[0-9][0-9.e+-]{0,30}", text):
        try:
            number = float(text)
        except ValueError:
            return text
        return number if text == f"{number:.15g}" != "-0" else text
    return text


# ---- writing ----


def write(value, language, limit=MAX_TEXT):
    """The canonical literal of a value, dictionaries and sets sorted.

    value: also plain JSON, with dicts. limit: most characters.
    ValueError when the text is longer, or when the language has no literal for the value: an
    infinite float, a tuple in Lua.
    """
    table = table_of(language)
    if table["family"] == "lists":
        text = _write_lists(value, table)
    else:
        text = _write_brackets(value, table)

    if len(text) > limit:
        raise ValueError(f"the value has more than {limit} characters")
    return text


def _plain(value, table):
    """Numbers, strings, truth values and None as text; None for the rest."""
    if isinstance(value, bool) or value is None:
        name = {True: "true", False: "false", None: "none"}[value]
        return table[name] if name in table else _no_literal(value)

    if isinstance(value, int):
        if table.get("integer_bits") == 64 and value == SMALLEST:
            return LUA_SMALLEST
        if table.get("typed") and not _fits(value, table):
            _no_literal(value)
        return str(value)
    if isinstance(value, Fraction):
        if "ratio" not in table:
            _no_literal(value)
        return f"{value.numerator}{table['ratio']}{value.denominator}"
    if isinstance(value, float):
        return _write_float(value)
    if isinstance(value, str):
        return _write_string(value, table, '"')
    return None


def _fits(value, table):
    """Whether a typed language's whole numbers hold this one: 63 bits in OCaml."""
    most = 2 ** (table["integer_bits"] - 1)
    return -most <= value < most


def _no_literal(value):
    raise ValueError(f"this language has no literal for {type(value).__name__}")


def _write_float(value):
    """Shortest text that gives the same double, with a point for every language: 1e16 -> 1.0e16."""
    if not math.isfinite(value):
        raise ValueError("an infinite or undefined number has no literal")

    digits, mark, exponent = repr(value).partition("e")
    if "." not in digits:
        digits += ".0"
    return f"{digits}e{int(exponent)}" if mark else digits


def _write_string(text, table, quote):
    if table["escapes"] == "c":
        named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    else:  # Common Lisp: a line break stands for itself
        named = {"\n": "\n", "\t": "\t"}
    for mark in ("\\", quote, *table.get("interpolation", "")):
        named[mark] = f"\\{mark}"

    if any(letter not in named and not letter.isprintable() for letter in text):
        raise ValueError("a control character has no literal")
    return quote + "".join(named.get(letter, letter) for letter in text) + quote


def _as_map(items):
    """A Map, also of a Python dict."""
    return Map(tuple(items.items())) if isinstance(items, dict) else items


# ---- the family "brackets" ----


def _write_brackets(value, table):
    """[1, "a"], {"k": 1}, foo(1): all punctuation comes from the table."""
    value = _as_map(value)
    if table.get("vectors"):
        value = vector_of(value)
    text = _plain(value, table)
    if text is not None:
        return text
    if isinstance(value, Symbol):
        return _write_symbol(value.name, table)
    if isinstance(value, Compound):
        return _write_compound(value, table)
    if isinstance(value, Char) and "char" in table:
        return _write_string(value.text, table, "'")

    kind = {list: "list", tuple: "tuple", Map: "map", Set: "set"}.get(type(value))
    if kind not in table:
        _no_literal(value)

    if kind == "map":
        items = sorted(_write_item(k, v, table) for k, v in value.items)
    else:
        items = [_write_brackets(v, table) for v in _members(value)]
    if kind == "set":
        items = sorted(set(items))
    separator = "," if kind == "tuple" else table.get("separator", ",")
    text = f"{separator} ".join(items)
    if kind == "tuple" and len(items) == 1 and not table.get("vectors"):
        text += ","

    form = table[kind]
    if table.get("typed") and kind == "list" and _is_mixed(value):
        _no_literal(value)
    if kind in table.get("mixed", {}) and _is_mixed(value):
        form = table["mixed"][kind]
    if kind == "set" and not items:
        form = table.get("empty_set", form)
    return form.replace("...", text, 1)


def _write_item(key, value, table):
    """One entry of a dictionary: "a": 1 in Python, ["a"] = 1 in Lua, "a" => 1 in Julia."""
    if "bare_key" in table and (not isinstance(key, str) or key == table.get("no_key")):
        _no_literal(key)  # JavaScript would make the key a string, or set the prototype
    key_text = table.get("key", "...").replace("...", _write_brackets(key, table))
    arrow = table.get("write_arrow", f" {table['arrow']} ")
    return f"{key_text}{arrow}{_write_brackets(value, table)}"


def _write_symbol(name, table):
    form = table.get("symbol")
    if form and re.fullmatch(table["symbol_name"], name):
        return form.replace("...", name)
    if "atom_quote" in table:
        return _write_string(name, table, table["atom_quote"])
    raise ValueError(f"{name!r} is not a symbol that has a literal here")


def _write_compound(term, table):
    """A Prolog term: foo(bar, -1), or a-1 where the reader needs no parentheses."""
    args = [_write_brackets(v, table) for v in term.args]
    is_infix = term.name in table["infix"] and len(args) == 2
    if is_infix and not any(_needs_parentheses(v) for v in term.args):
        return f"{args[0]}{term.name}{args[1]}"
    return f"{_write_symbol(term.name, table)}({', '.join(args)})"


def _needs_parentheses(value):
    if isinstance(value, Compound):
        return True
    return isinstance(value, (int, float, Fraction)) and value < 0


def _members(value):
    return value.items if isinstance(value, Set) else value


def _is_mixed(value):
    """Julia would make [1, 2.0] a list of floats: members of different kinds need Any[...]."""
    if isinstance(value, Map):
        keys = {_shape(k) for k, _ in value.items}
        values = {_shape(v) for _, v in value.items}
        return len(keys) > 1 or len(values) > 1
    return len({_shape(v) for v in _members(value)}) > 1


def _shape(value):
    """What Julia's own type of a value depends on."""
    if isinstance(value, (list, tuple, Set)):
        return (type(value), *sorted({repr(_shape(v)) for v in _members(value)}))
    if isinstance(value, Map):
        return (Map, repr(value))
    return type(value)


# ---- the family "lists" ----


def _write_lists(value, table):
    """'(1 (a . 2)), :key, or a constructor for what a quoted datum cannot hold."""
    text = _plain(value, table)
    if text is not None:
        return text

    is_keyword = isinstance(value, Symbol) and value.name.startswith(":") and table.get("casefold")
    if isinstance(value, Char) or is_keyword:
        return _write_datum(value, table)
    if table["constructor_map"] and _has_map(value):
        return _write_constructor(value, table)
    return "'" + _write_datum(value, table)


def _has_map(value):
    if isinstance(value, (dict, Map)):
        return True
    if isinstance(value, Pair):
        return _has_map(value.first) or _has_map(value.second)
    return isinstance(value, (list, tuple)) and any(map(_has_map, value))


def _write_datum(value, table):
    """What stands behind a quote."""
    text = _plain(value, table)
    if text is not None:
        return text

    value = _as_map(value)
    if isinstance(value, Symbol):
        return value.name
    if isinstance(value, Char):
        return _write_char(value, table)
    if isinstance(value, list):
        return "(" + " ".join(_write_datum(v, table) for v in value) + ")"
    if isinstance(value, tuple):
        return "#(" + " ".join(_write_datum(v, table) for v in value) + ")"

    if isinstance(value, Pair):
        parts = []
        while isinstance(value, Pair):
            parts.append(_write_datum(value.first, table))
            value = value.second
        return f"({' '.join(parts)} . {_write_datum(value, table)})"

    if isinstance(value, Map) and "map" in table:
        pairs = [f"({_write_datum(k, table)} . {_write_datum(v, table)})" for k, v in value.items]
        return table["map"].replace("...", " ".join(sorted(pairs)), 1)
    _no_literal(value)


def _write_char(value, table):
    if value.text.isprintable() and value.text != " ":
        return "#\\" + value.text
    for name, letter in table["char_names"].items():
        if letter == value.text:
            return "#\\" + name
    _no_literal(value)


def _write_constructor(value, table):
    """(list 1 (alist-hash-table (list (cons 'a 2)))): Common Lisp has no literal for hash maps."""
    if not _has_map(value):
        return _write_lists(value, table)

    if isinstance(value, Pair):
        return _write_cons(value.first, value.second, table)
    value = _as_map(value)
    if isinstance(value, Map):
        pairs = sorted(_write_cons(k, v, table) for k, v in value.items)
        return table["constructor_map"].replace("...", " ".join(pairs), 1)

    name = "list" if isinstance(value, list) else "vector"
    return f"({name} {' '.join(_write_constructor(v, table) for v in value)})"


def _write_cons(first, second, table):
    return f"(cons {_write_constructor(first, table)} {_write_constructor(second, table)})"
