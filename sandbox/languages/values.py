"""Values as data: types, equality and canonical literals in any language, as its TOML's [call.values] table says.

    write([1, "a"], lua) -> '{1, "a"}'        same(1, 1.0, python) -> True, same(1, 1.0, racket) -> False

literals.py reads what write() writes.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

LUA_SMALLEST = (
    "(-9223372036854775807-1)"  # -2**63: as a numeral it would be the negative of a float
)
MAX_TEXT = 2000  # characters of a value; longer ones are refused, never cut


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Char:
    text: str


@dataclass(frozen=True)
class Pair:
    """A cons cell whose second part is no list: (a . b)."""

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
    """A Prolog term name(args) that is no list."""

    name: str
    args: tuple


def cons(first, second):
    return [first, *second] if isinstance(second, list) else Pair(first, second)


def table_of(language):
    if "values" not in language.call:
        raise ValueError(
            f"{language.name} cannot be used for self-play: its TOML has no [call.values] table"
        )
    return language.call["values"]


# ---- comparing ----


def same(a, b, language):
    """Equality as the language sees it: [call.values] numbers = "value" (1 equals 1.0) or "exact" (it does not)."""
    table = table_of(language)
    return key_of(a, table) == key_of(b, table)


def key_of(value, table):
    """Nested tuples that are equal when the values are; sets and dictionaries have no order."""
    if value is None or isinstance(value, bool):
        return ("word", value)
    if isinstance(value, (int, float, Fraction)):
        return (
            ("number", Fraction(value))
            if table["numbers"] == "value"
            else ("number", isinstance(value, float), Fraction(value))
        )
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(key_of(v, table) for v in value))
    if isinstance(value, Map):
        return (
            "map",
            *sorted(((key_of(k, table), key_of(v, table)) for k, v in value.items), key=repr),
        )
    if isinstance(value, Set):
        return ("set", *sorted({key_of(v, table) for v in value.items}, key=repr))
    if isinstance(value, Pair):
        return ("pair", key_of(value.first, table), key_of(value.second, table))
    if isinstance(value, Compound):
        return ("compound", value.name, *(key_of(v, table) for v in value.args))
    return (type(value).__name__, value)


# ---- writing ----


def write(value, language, limit=MAX_TEXT):
    """The canonical literal of a value (also of plain JSON: dict, list, str, numbers, None); dictionaries and sets sorted.
    ValueError when the language has none, such as an infinite float or a tuple in Lua."""
    table = table_of(language)
    if isinstance(value, dict):
        value = Map(tuple(value.items()))
    text = (_write_lists if table["family"] == "lists" else _write_brackets)(value, table)
    if len(text) > limit:
        raise ValueError(f"the value has more than {limit} characters")
    return text


def _plain(value, table):
    """Numbers, strings, words and characters; None for the rest."""
    if isinstance(value, bool) or value is None:
        word = table.get({True: "true", False: "false", None: "none"}[value])
        return word if word is not None else _no(value)
    if isinstance(value, int):
        if table.get("integer_bits") == 64 and value == -(2**63):
            return LUA_SMALLEST
        return str(value)
    if isinstance(value, Fraction):
        return (
            f"{value.numerator}{table['ratio']}{value.denominator}"
            if "ratio" in table
            else _no(value)
        )
    if isinstance(value, float):
        return _write_float(value)
    if isinstance(value, str):
        return _write_string(value, table, '"')
    return None


def _no(value):
    raise ValueError(f"this language has no literal for {type(value).__name__}")


def _write_float(value):
    """Shortest text that gives the same double, with a decimal point: 1e16 -> 1.0e16, as every language reads it."""
    if not math.isfinite(value):
        raise ValueError("an infinite or undefined number has no literal")
    digits, mark, exponent = repr(value).partition("e")
    return (digits if "." in digits else f"{digits}.0") + (f"e{int(exponent)}" if mark else "")


def _write_string(text, table, quote):
    named = (
        {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
        if table["escapes"] == "c"
        else {"\n": "\n", "\t": "\t"}
    )
    named |= {"\\": "\\\\", quote: f"\\{quote}"} | {
        mark: f"\\{mark}" for mark in table.get("interpolation", "")
    }
    if any(letter not in named and not letter.isprintable() for letter in text):
        raise ValueError("a control character has no literal")
    return quote + "".join(named.get(letter, letter) for letter in text) + quote


def _write_brackets(value, table):
    inner = lambda v: _write_brackets(v, table)
    if (text := _plain(value, table)) is not None:
        return text
    if isinstance(value, Symbol):
        return _write_symbol(value.name, table)
    if isinstance(value, Compound):
        if (
            value.name in table["infix"]
            and len(value.args) == 2
            and not any(_needs_parentheses(v) for v in value.args)
        ):
            return f"{inner(value.args[0])}{value.name}{inner(value.args[1])}"  # Prolog: a-1
        return f"{_write_symbol(value.name, table)}({', '.join(map(inner, value.args))})"
    if isinstance(value, Char) and "char" in table:
        return _write_string(value.text, table, "'")
    if isinstance(value, dict):
        value = Map(tuple(value.items()))
    kind = {list: "list", tuple: "tuple", Map: "map", Set: "set"}.get(type(value))
    if kind not in table:
        _no(value)
    if kind == "map":
        key = table.get("key", "...")
        items = sorted(
            f"{key.replace('...', inner(k))}{table.get('write_arrow', ' ' + table['arrow'] + ' ')}{inner(v)}"
            for k, v in value.items
        )
    else:
        items = [inner(v) for v in (value.items if kind == "set" else value)]
        items = sorted(set(items)) if kind == "set" else items
    text = f"{table.get('separator', ',')} ".join(items) + (
        "," if kind == "tuple" and len(items) == 1 else ""
    )
    form = (
        table["mixed"][kind] if kind in table.get("mixed", {}) and _is_mixed(value) else table[kind]
    )
    if kind == "set" and not items:
        form = table.get("empty_set", form)
    return form.replace("...", text, 1)


def _write_symbol(name, table):
    form = table.get("symbol")
    if form and re.fullmatch(table["symbol_name"], name):
        return form.replace("...", name)
    if "atom_quote" in table:
        return _write_string(name, table, table["atom_quote"])
    raise ValueError(f"{name!r} is no symbol that has a literal here")


def _needs_parentheses(value):
    return isinstance(value, Compound) or (isinstance(value, (int, float, Fraction)) and value < 0)


def _is_mixed(value):
    """Julia would make [1, 2.0] a list of floats: members of different kinds need Any[...]."""
    if isinstance(value, Map):
        return (
            len({_shape(k) for k, _ in value.items}) > 1
            or len({_shape(v) for _, v in value.items}) > 1
        )
    return len({_shape(v) for v in (value.items if isinstance(value, Set) else value)}) > 1


def _shape(value):
    if isinstance(value, (list, tuple, Set)):
        return (
            type(value),
            *sorted({repr(_shape(v)) for v in (value.items if isinstance(value, Set) else value)}),
        )
    return (Map, repr(value)) if isinstance(value, Map) else type(value)


def _write_lists(value, table):
    if (text := _plain(value, table)) is not None:
        return text
    if isinstance(value, Char) or (
        isinstance(value, Symbol) and value.name.startswith(":") and table.get("casefold")
    ):
        return _write_datum(value, table)
    if table["constructor_map"] and _has_map(value):
        return _write_constructor(value, table)
    return "'" + _write_datum(value, table)


def _has_map(value):
    if isinstance(value, Pair):
        return _has_map(value.first) or _has_map(value.second)
    return isinstance(value, (dict, Map)) or (
        isinstance(value, (list, tuple)) and any(map(_has_map, value))
    )


def _write_datum(value, table):
    inner = lambda v: _write_datum(v, table)
    if (text := _plain(value, table)) is not None:
        return text
    if isinstance(value, dict):
        value = Map(tuple(value.items()))
    if isinstance(value, Symbol):
        return value.name
    if isinstance(value, Char):
        names = {letter: name for name, letter in table["char_names"].items()}
        return "#\\" + (
            value.text
            if value.text.isprintable() and value.text != " "
            else names.get(value.text) or _no(value)
        )
    if isinstance(value, list):
        return f"({' '.join(map(inner, value))})"
    if isinstance(value, tuple):
        return f"#({' '.join(map(inner, value))})"
    if isinstance(value, Pair):
        parts = []
        while isinstance(value, Pair):
            parts.append(inner(value.first))
            value = value.second
        return f"({' '.join(parts)} . {inner(value)})"
    if isinstance(value, Map) and "map" in table:
        return table["map"].replace(
            "...", " ".join(sorted(f"({inner(k)} . {inner(v)})" for k, v in value.items)), 1
        )
    _no(value)


def _write_constructor(value, table):
    """Common Lisp has no literal for hash tables: (list 1 (alist-hash-table (list (cons 'a 2))))."""
    inner = lambda v: _write_constructor(v, table)
    if not _has_map(value):
        return _write_lists(value, table)
    if isinstance(value, Pair):
        return f"(cons {inner(value.first)} {inner(value.second)})"
    if isinstance(value, (dict, Map)):
        items = value.items if isinstance(value, Map) else tuple(value.items())
        return table["constructor_map"].replace(
            "...", " ".join(sorted(f"(cons {inner(k)} {inner(v)})" for k, v in items)), 1
        )
    return f"({'list' if isinstance(value, list) else 'vector'} {' '.join(map(inner, value))})"
