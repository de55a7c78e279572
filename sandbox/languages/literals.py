"""Literals of any language, as text -> Python objects, driven by the [call.values] table of its TOML.

    read('1, "a"', python) -> [1, 'a']        read_one("'(1 (a . 2))", racket) -> [1, Pair(Symbol("a"), 2)]

A model's text is never evaluated: read() is a parser that raises ValueError for anything but literals. What enters a program is
never that text but values.write() of what was read, so a text that closes the call and goes on cannot pass.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from sandbox.languages.values import (
    LUA_SMALLEST,
    MAX_TEXT,
    Char,
    Compound,
    Map,
    Pair,
    Set,
    Symbol,
    cons,
    key_of,
    table_of,
    write,
)

MAX_DEPTH = 30


def read(text, language):
    """The values of a text, a list: separated by commas, or by white space in the Lisp family. ValueError says what is no literal."""
    table = table_of(language)
    if len(text) > MAX_TEXT:
        raise ValueError(f"the value has more than {MAX_TEXT} characters")
    reader = (_ListReader if table["family"] == "lists" else _BracketReader)(text, table)
    found = reader.sequence()
    for value in found:
        write(
            value, language
        )  # what cannot be written (an infinite float, a control character) is no value either
    return found


def read_one(text, language):
    found = read(text, language)
    if len(found) != 1:
        raise ValueError(f"one value is expected, not {len(found)}")
    return found[0]


_NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d{1,4})?")
_SIMPLE_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "0": "\0",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "e": "\x1b",
}


def _number(text, table):
    """Exact value of a numeral: int, Fraction (in the language's notation) or float; None when it is none."""
    ratio = table.get("ratio")
    if ratio and re.fullmatch(rf"[-+]?\d+{re.escape(ratio)}\d+", text):
        above, below = text.split(ratio)
        if int(below) == 0:
            raise ValueError(f"{text} divides by zero")
        value = Fraction(int(above), int(below))
        return int(value) if value.denominator == 1 else value
    if not _NUMBER.fullmatch(text):
        return None
    if not re.fullmatch(r"[-+]?\d+", text):
        return float(text)
    bits = table.get("integer_bits")  # Lua: a longer numeral is a float
    value = int(text)
    return value if not bits or -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) else float(text)


class _Reader:
    def __init__(self, text, table):
        self.text, self.table, self.at, self.depth, self.terms = text, table, 0, 0, 0

    def fail(self, why):
        raise ValueError(f"{why} at {self.text[self.at : self.at + 20]!r}")

    def space(self):
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, pattern):
        """Text of a regular expression that matches here (moves on), or None."""
        match = re.compile(pattern).match(self.text, self.at)
        if match:
            self.at = match.end()
        return match and match[0]

    def nested(self, read):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"more than {MAX_DEPTH} levels")
        found = read()
        self.depth -= 1
        return found

    def quoted(self, quote):
        """The rest of a string after its opening quote."""
        parts = []
        while True:
            parts.append(
                self.take(rf"[^\\{quote}{re.escape(self.table.get('interpolation', ''))}]*")
            )
            if self.at >= len(self.text):
                self.fail("a string without an end")
            mark = self.text[self.at]
            self.at += 1
            if mark == quote:
                return "".join(parts)
            if mark != "\\":  # Julia's $: "$(run(`...`))" is a program
                self.fail("interpolation is no literal")
            parts.append(self.escape())

    def escape(self):
        if code := self.take(
            r"x[0-9a-fA-F]{1,6}\\?" if self.table.get("escape_ends") else r"x[0-9a-fA-F]{2}"
        ):
            return chr(int(code.strip("x\\"), 16))
        if code := self.take(r"u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}"):
            return chr(int(code.strip("u{}"), 16))
        mark = self.take(r"[^\W\d]|0(?!\d)|[^\w]")
        if mark is None or (mark.isalnum() and mark not in _SIMPLE_ESCAPES):
            self.fail("unknown escape")
        return _SIMPLE_ESCAPES.get(mark, mark)


class _BracketReader(_Reader):
    """Languages that write [1, 2], {"a": 1}, f(x): all punctuation comes from the table."""

    def sequence(self):
        values = self.items(r"\Z")
        if any(isinstance(v, _Entry) for v in values):
            self.fail("a key with a value outside of a dictionary")
        return values

    def items(self, closer):
        values = []
        self.space()
        while self.take(closer) is None:
            if values and not self.take(re.escape(self.table.get("separator", ","))):
                self.fail("a comma or an end is missing")
            self.space()
            if values and self.take(closer) is not None:  # a comma at the end
                return values + [_TRAILING] if closer == r"\)" else values
            values.append(self.entry())
            self.space()
        return values

    def entry(self):
        """A value, or key and value of a dictionary."""
        arrow = self.table.get("arrow")
        if self.table.get("key") and (
            name := self.take(r"\[\s*|[A-Za-z_]\w*(?=\s*=)")
        ):  # Lua: [1] = 2, name = 2
            key = name if name[0] != "[" else self.nested(self.value)
            self.space()
            if name[0] == "[" and not self.take(r"\]"):
                self.fail("] is missing")
        else:
            key = self.nested(self.value)
        self.space()
        if not arrow or not self.take(re.escape(arrow)):
            return key
        self.space()
        return _Entry(key, self.nested(self.value))

    def value(self):
        value = self.simple()
        self.space()
        while operator := self.table.get("operators") and self.take(
            self.table["operators"]
        ):  # Prolog: a-1, k=v
            self.space()
            self.terms += 1
            if self.terms > 3 * MAX_DEPTH:
                self.fail("too many operators")
            value = Compound(operator, (value, self.simple()))
            self.space()
        return value

    def simple(self):
        table, start = self.table, self.at
        if table.get("ratio") and (
            text := self.take(rf"[-+]?\d+{re.escape(table['ratio'])}\d+(?!\w)")
        ):
            return _number(text, table)
        if text := self.take(rf"{_NUMBER.pattern}(?![\w.])"):
            return _number(text, table)
        if table.get("integer_bits") and self.take(re.escape(LUA_SMALLEST)):
            return -(2**63)
        if "empty_set" in table and self.take(re.escape(table["empty_set"])):
            return Set(())
        for kind in ("map", "set", "list", "tuple"):
            if kind in table and (opened := self.take(self.opener(kind))):
                values = self.collection(kind)
                return promoted(values) if table.get("promotes") and opened == "[" else values
        if "char" in table and self.take("'"):
            text = self.quoted("'")
            return Char(text) if len(text) == 1 else self.fail("a character has one letter")
        if quote := self.take(f"[{table['quotes']}]"):
            return self.quoted(quote)
        if "symbol" in table and (
            text := self.take(
                table["symbol"].split("...")[0] + f"(?:{table['symbol_name']})(?!\\w)"
            )
        ):
            return self.word(text)
        if "atom_quote" in table and self.take(table["atom_quote"]):
            return self.compound(self.quoted(table["atom_quote"]))
        if (text := self.take(r"[A-Za-z_]\w*")) in [
            table.get(k) for k in ("true", "false", "none")
        ] and text:
            return {table.get("true"): True, table.get("false"): False}.get(text)
        self.at = start
        self.fail("no literal")

    def word(self, text):
        """A symbol; in Prolog perhaps with arguments."""
        if "operators" not in self.table:
            return Symbol(text[1:])
        return self.compound(text)

    def compound(self, name):
        if "operators" in self.table and self.take(r"\("):
            args = self.nested(lambda: self.items(r"\)"))
            return (
                Compound(name, tuple(args))
                if args and _TRAILING not in args
                else self.fail("arguments are missing")
            )
        return Symbol(name)

    def opener(self, kind):
        return self.table.get(f"read_{kind}") or re.escape(self.table[kind].split("...")[0])

    def collection(self, kind):
        closer = re.escape(self.table[kind].split("...")[1])
        values = self.nested(lambda: self.items(closer))
        entries = [v for v in values if isinstance(v, _Entry)]
        if entries:
            return self.dictionary(kind, values)
        shared = "set" in self.table and self.table.get("set") == self.table.get("map")
        if kind == "map" and shared:  # Python: {} is a dictionary, {1} a set
            return Set(tuple(values)) if values else Map(())
        if kind == "map":  # Lua: {1, 2} is a list
            return (
                values
                if self.table["list"] == self.table["map"]
                else Map(())
                if not values
                else self.fail("a key is missing")
            )
        if kind == "tuple":
            if len(values) == 1:
                return values[0]  # (1) is 1 in parentheses
            return tuple(v for v in values if v is not _TRAILING)
        return Set(tuple(values)) if kind == "set" else values

    def dictionary(self, kind, values):
        if kind != "map" or (
            not self.table.get("key") and not all(isinstance(v, _Entry) for v in values)
        ):
            self.fail("keys and values where none are allowed")
        places = iter(range(1, len(values) + 1))  # Lua: what has no key has the next place
        pairs = {
            (key_of(e.key, self.table)): (e.key, e.value)
            for e in (v if isinstance(v, _Entry) else _Entry(next(places), v) for v in values)
        }
        return (
            _table_as_list(Map(tuple(pairs.values())))
            if self.table.get("key")
            else Map(tuple(pairs.values()))
        )


def promoted(values):
    """Julia makes [1, 2.5] a list of floats (Any[1, 2.5] stays as it is)."""
    mixed = {type(v) for v in values} - {int, Fraction, float} == set() and any(
        isinstance(v, float) for v in values
    )
    return [float(v) for v in values] if mixed else values


def _table_as_list(found):
    """Lua has one type for both: the keys 1 ... n make a list."""
    by_key = {k: v for k, v in found.items if type(k) is int}
    whole = len(by_key) == len(found.items) and set(by_key) == set(range(1, len(by_key) + 1))
    return [by_key[k] for k in sorted(by_key)] if whole else found


@dataclass(frozen=True)
class _Entry:
    key: object
    value: object


_TRAILING = Symbol("a comma at the end, which makes (1,) a tuple")


class _ListReader(_Reader):
    """The Lisp family: '(1 (a . 2)), (list 1 "a"), #(1 2)."""

    def sequence(self):
        values = []
        self.space()
        while self.at < len(self.text):
            values.append(self.value())
            self.space()
        return values

    def value(self):
        """A literal, or a constructor with literals: (list 1 2), (cons 1 2), (vector 1 2), (hash "a" 1)."""
        self.space()
        if self.take("'"):
            return self.datum()
        if not self.take(r"\((?!\s*\))"):
            return self.datum(quoted=False)
        name, args = self.take(r"[^\s()'\"]+"), []
        self.space()
        while self.take(r"\)") is None:
            args.append(self.nested(self.value))
            self.space()
        return self.construct(name, args)

    def construct(self, name, args):
        table = self.table
        if name == "quote" or name not in table["constructors"]:
            self.fail(f"({name} ...) is no literal")
        kind = table["constructors"][name]
        if kind == "pair":
            return cons(*args) if len(args) == 2 else self.fail("cons takes two values")
        if kind == "map":
            if len(args) % 2:
                self.fail("a key without a value")
            return Map(tuple(zip(args[::2], args[1::2])))
        if kind == "alist":
            return (
                self.map_of(args[0])
                if len(args) == 1 and isinstance(args[0], list)
                else self.fail("a list of pairs is missing")
            )
        return tuple(args) if kind == "vector" else args

    def datum(self, quoted=True):
        self.space()
        table = self.table
        if self.take('"'):
            return self.quoted('"')
        if "map" in table and self.take(table["read_map"]):
            return self.map_of(self.nested(lambda: self.list_items(")")))
        if self.take(r"#\("):
            return tuple(self.nested(lambda: self.list_items(")")))
        if opened := self.take(r"[(\[]"):
            return self.nested(lambda: self.list_items(")" if opened == "(" else "]"))
        if self.take(r"#\\"):
            name = self.take(r"[A-Za-z]+|[\s\S]") or self.fail("a character is missing")
            letter = name if len(name) == 1 else table["char_names"].get(name.lower())
            return Char(letter) if letter else self.fail("unknown character")
        return self.atom(
            self.take(r"[^\s()\[\]{}\"';`,|#\\][^\s()\[\]{}\"';`,|\\]*|#[a-z]+|\|[^|\\]*\|") or "",
            quoted,
        )

    def atom(self, text, quoted):
        table = self.table
        number = _number(
            re.sub(r"(?<=[\d.])[dDfF](?=[-+]?\d+$)", "e", text) if table.get("casefold") else text,
            table,
        )
        if number is not None:
            return number
        name = text.lower() if table.get("casefold") else text
        if name in table["words"]:
            return {"true": True, "false": False, "empty": []}[table["words"][name]]
        if (
            not text
            or text[0] in "#|"
            or (not quoted and text[0] != ":")
            or name == "."
            or not re.fullmatch(r"[\x21-\x7e]+", text)
        ):
            self.fail("no literal")
        return Symbol(name)

    def list_items(self, closer):
        values, tail = [], None
        self.space()
        while self.take(re.escape(closer)) is None:
            if self.at >= len(self.text) or tail is not None:
                self.fail(f"{closer} is missing")
            if values and self.take(r"\.(?=[\s()])"):
                tail = [self.nested(self.datum)]
            else:
                values.append(self.nested(self.datum))
            self.space()
        if tail and len(values) > 3 * MAX_DEPTH:
            self.fail("a dotted list is too long")
        for first in reversed(values if tail else []):
            tail = [cons(first, tail[0])]
        return tail[0] if tail else values

    def map_of(self, pairs):
        if not isinstance(pairs, list) or not all(
            isinstance(p, Pair) or (isinstance(p, list) and p) for p in pairs
        ):
            self.fail("a dictionary is made of pairs")
        return Map(
            tuple((p.first, p.second) if isinstance(p, Pair) else (p[0], p[1:]) for p in pairs)
        )
