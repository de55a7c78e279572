"""Literals of any language, read as Python objects: the [call.values] table of its TOML says how.

    read('1, "a"', python) -> [1, 'a']
    read_one("'(1 (a . 2))", racket) -> [1, Pair(Symbol("a"), 2)]

A model's text is never evaluated: read() is a parser that raises ValueError for anything but
literals. What enters a program is never that text but values.write() of what was read, so a text
that closes the call and goes on cannot pass.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from sandbox.languages.values import (
    LUA_SMALLEST,
    MAX_TEXT,
    SMALLEST,
    Char,
    Compound,
    Map,
    Pair,
    Set,
    Symbol,
    cons,
    key_of,
    table_of,
    vector_of,
    write,
)

MAX_DEPTH = 30  # levels of nesting
MAX_TERMS = 3 * MAX_DEPTH  # operators of a Prolog term, members of a dotted list: each nests once

_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")
_ESCAPES = {
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


def read(text, language):
    """The values of a text, separated by commas, or by white space in the Lisp family.

    ValueError says what is not a literal.
    """
    table = table_of(language)
    if len(text) > MAX_TEXT:
        raise ValueError(f"the value has more than {MAX_TEXT} characters")

    found = _values(text, table)
    for value in found:
        # What cannot be written (a control character) and read again (31 levels) is no value either.
        again = _values(write(value, language), table)
        if [key_of(one, table) for one in again] != [key_of(value, table)]:
            raise ValueError(f"{text[:20]!r} has no literal that means the same")
    return found


def _values(text, table):
    reader_of = {"lists": _ListReader, "brackets": _BracketReader}
    return reader_of[table["family"]](text, table).sequence()


def read_one(text, language):
    found = read(text, language)
    if len(found) != 1:
        raise ValueError(f"one value is expected, not {len(found)}")
    return found[0]


def _number(text, table):
    """Exact value of a numeral: int, Fraction (in the language's notation) or float; else None."""
    ratio = table.get("ratio")
    if ratio and re.fullmatch(rf"[-+]?[0-9]+{re.escape(ratio)}[0-9]+", text):
        above, below = text.split(ratio)
        if int(below) == 0:
            raise ValueError(f"{text} divides by zero")
        value = Fraction(int(above), int(below))
        return int(value) if value.denominator == 1 else value

    if not _NUMBER.fullmatch(text):
        return None
    is_whole = re.fullmatch(r"[-+]?[0-9]+", text)
    bits = table.get("integer_bits")
    if is_whole and (not bits or -(2 ** (bits - 1)) <= int(text) < 2 ** (bits - 1)):
        return int(text)
    if is_whole and table.get("typed"):
        raise ValueError(f"{text[:20]} is more than any whole number")

    value = float(text)  # also a longer numeral of Lua
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is more than any float")
    return value


class _Reader:
    """A place in a text, and what both families read alike."""

    def __init__(self, text, table):
        self.text = text
        self.table = table
        self.at = 0
        self.depth = 0
        self.terms = 0

    def fail(self, why):
        raise ValueError(f"{why} at {self.text[self.at : self.at + 20]!r}")

    def space(self):
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, pattern):
        """Text of a regular expression that matches here (moves on), or None."""
        match = re.compile(pattern).match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[0]

    def nested(self, read):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"more than {MAX_DEPTH} levels")
        found = read()
        self.depth -= 1
        return found

    def quoted(self, quote):
        """The rest of a string after its opening quote."""
        table = self.table
        is_raw = quote in table.get("raw_quotes", "")
        special = "" if is_raw else re.escape(table.get("interpolation", ""))
        parts = []
        while True:
            parts.append(self.take(rf"[^\\{quote}{special}]*"))
            if self.at >= len(self.text):
                self.fail("a string without an end")

            mark = self.text[self.at]
            self.at += 1
            if mark == quote:
                return "".join(parts)
            if mark == "\\":
                meant = self.take(rf"[\\{quote}]") or mark if is_raw else self.escape()
                parts.append(meant)
                continue
            follows = re.compile(table.get("interpolated", ""))
            if follows.match(self.text, self.at):  # Julia's $: "$(run(`...`))" is a program
                self.fail("interpolation is not a literal")
            parts.append(mark)  # Ruby's # alone

    def escape(self):
        """The letter that is meant by what follows a backslash."""
        in_hex = r"x[0-9a-fA-F]{2}"
        if self.table.get("escape_ends"):
            in_hex = r"x[0-9a-fA-F]{1,6}\\?"
        if code := self.take(in_hex):
            return chr(int(code.strip("x\\"), 16))
        if code := self.take(r"u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}"):
            return chr(int(code.strip("u{}"), 16))

        mark = self.take(r"[^\W\d]|0(?!\d)|[^\w]")
        if mark is None or (mark.isalnum() and mark not in _ESCAPES):
            self.fail("unknown escape")
        return _ESCAPES.get(mark, mark)


# ---- the family "brackets" ----


@dataclass(frozen=True)
class _Item:
    """A key with its value, inside of a dictionary."""

    key: object
    value: object


_TRAILING = object()  # a comma before the closing parenthesis, which makes (1,) a tuple


class _BracketReader(_Reader):
    """Languages that write [1, 2], {"a": 1}, f(x): all punctuation comes from the table."""

    def sequence(self):
        values = self.items(r"\Z", ",")
        if any(isinstance(value, _Item) for value in values):
            self.fail("a key with a value outside of a dictionary")
        return values

    def items(self, closer, separator):
        """Values and _Items up to the regular expression `closer`, which is taken too."""
        values = []
        self.space()
        while self.take(closer) is None:
            if values and not self.take(separator):
                self.fail("a comma or an end is missing")
            self.space()
            if values and self.take(closer) is not None:  # a comma at the end
                return [*values, _TRAILING] if closer == r"\)" else values
            values.append(self.item())
            self.space()
        return values

    def item(self):
        """A value, or an _Item of a dictionary."""
        symbol_key = self.table.get("symbol_key")
        if symbol_key and (name := self.take(symbol_key)):  # Ruby: a: 1 is :a => 1
            self.space()
            return _Item(Symbol(name[:-1]), self.nested(self.value))

        key = self.key()
        self.space()
        arrow = self.table.get("arrow")
        if not arrow or not self.take(re.escape(arrow)):
            return key

        self.space()
        return _Item(key, self.nested(self.value))

    def key(self):
        """What may stand before an arrow. Lua: [1] = 2, name = 2. JavaScript: name: 2, 1: 2."""
        bare = self.table.get("bare_key")
        if bare and (name := self.take(bare)):
            return name
        opened = None
        if self.table.get("key"):
            opened = self.take(r"\[\s*|[A-Za-z_]\w*(?=\s*=)")
        if opened is None:
            return self.nested(self.value)
        if opened[0] != "[":
            return opened

        key = self.nested(self.value)
        self.space()
        if not self.take(r"\]"):
            self.fail("] is missing")
        return key

    def value(self):
        """A value, in Prolog perhaps with operators: a-1, k=v."""
        value = self.simple()
        self.space()
        operators = self.table.get("operators")
        while operators and (operator := self.take(operators)):
            self.space()
            self.terms += 1
            if self.terms > MAX_TERMS:
                self.fail("too many operators")
            value = Compound(operator, (value, self.simple()))
            self.space()
        return value

    def simple(self):
        """A value without operators."""
        table = self.table
        start = self.at

        # Numbers.
        if ratio := table.get("ratio"):
            if text := self.take(rf"[-+]?[0-9]+{re.escape(ratio)}[0-9]+(?!\w)"):
                return _number(text, table)
        if text := self.take(rf"{_NUMBER.pattern}(?![\w.])"):
            return _number(text, table)
        if table.get("integer_bits") and self.take(re.escape(LUA_SMALLEST)):
            return SMALLEST

        # Collections.
        if "empty_set" in table and self.take(re.escape(table["empty_set"])):
            return Set(())
        for kind in ("map", "set", "list", "tuple"):
            if kind in table and (opened := self.take(self.opener(kind))):
                values = self.collection(kind)
                return _promoted(values) if table.get("promotes") and opened == "[" else values

        # Characters, strings, symbols.
        if "char" in table and self.take("'"):
            text = self.quoted("'")
            return Char(text) if len(text) == 1 else self.fail("a character has one letter")
        if quote := self.take(f"[{table['quotes']}]"):
            return self.quoted(quote)
        if "symbol" in table:
            before = table["symbol"].split("...")[0]
            if text := self.take(rf"{before}(?:{table['symbol_name']})(?!\w)"):
                return self.symbol(text)
        if "atom_quote" in table and self.take(table["atom_quote"]):
            return self.term(self.quoted(table["atom_quote"]))

        # Words: the longest, so that "trueish" is none.
        word = self.take(r"[A-Za-z_]\w*")
        for name, value in (("true", True), ("false", False), ("none", None)):
            if word is not None and word == table.get(name):
                return value

        self.at = start
        self.fail("not a literal")

    def symbol(self, text):
        if "operators" in self.table:  # Prolog: perhaps with arguments
            return self.term(text)
        return Symbol(text[1:])  # Julia: :name

    def term(self, name):
        """A Prolog atom, with arguments where a parenthesis follows."""
        if "operators" not in self.table or not self.take(r"\("):
            return Symbol(name)
        args = self.nested(lambda: self.items(r"\)", ","))
        if not args or _TRAILING in args:
            self.fail("arguments are missing")
        return Compound(name, tuple(args))

    def opener(self, kind):
        """A regular expression for what opens a collection."""
        return self.table.get(f"read_{kind}") or re.escape(self.table[kind].split("...")[0])

    def collection(self, kind):
        """The rest of a map, set, list or tuple after what opens it."""
        table = self.table
        closer = re.escape(table[kind].split("...")[1])
        separator = "," if kind == "tuple" else table.get("separator", ",")
        values = self.nested(lambda: self.items(closer, separator))
        if any(isinstance(value, _Item) for value in values):
            return self.dictionary("map" if table.get("vectors") else kind, values)
        if table.get("vectors"):
            return self.vector(kind, values)

        if kind == "map":
            if table["map"] == table.get("set"):  # Python: {} is a dictionary, {1} a set
                return Set(tuple(values)) if values else Map(())
            if table["map"] == table["list"]:  # Lua: {1, 2} is a list
                return values
            return Map(()) if not values else self.fail("a key is missing")
        if kind == "tuple":
            if len(values) == 1:
                return values[0]  # (1) is 1 in parentheses
            return tuple(value for value in values if value is not _TRAILING)
        return Set(tuple(values)) if kind == "set" else values

    def vector(self, kind, values):
        """What R's c(...) or list(...) holds."""
        if kind == "map":  # written as a list is
            return tuple(values)
        if isinstance(vector_of(values), tuple):
            self.fail("c() joins and converts its arguments: only list() holds several kinds")
        return values

    def dictionary(self, kind, values):
        """A Map of values of which one at least is an _Item."""
        has_places = "key" in self.table  # Lua: what has no key has the next place
        if kind != "map":
            self.fail("keys and values where none are allowed")
        if not has_places and not all(isinstance(value, _Item) for value in values):
            self.fail("keys and values where none are allowed")

        place = 0
        pairs = {}
        for value in values:
            if not isinstance(value, _Item):
                place += 1
                value = _Item(place, value)
            pairs[key_of(value.key, self.table)] = (value.key, value.value)

        found = Map(tuple(pairs.values()))
        return _table_as_list(found) if has_places else found


def _promoted(values):
    """Julia makes [1, 2.5] a list of floats (Any[1, 2.5] stays as it is)."""
    all_numbers = {type(value) for value in values} <= {int, Fraction, float}
    if all_numbers and any(isinstance(value, float) for value in values):
        return [float(value) for value in values]
    return values


def _table_as_list(found):
    """Lua has one type for both: the keys 1 ... n make a list."""
    by_key = {k: v for k, v in found.items if type(k) is int}
    if len(by_key) != len(found.items) or set(by_key) != set(range(1, len(by_key) + 1)):
        return found
    return [by_key[k] for k in sorted(by_key)]


# ---- the family "lists" ----


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
        """A literal, or a constructor with literals: (list 1 2), (cons 1 2), (hash "a" 1)."""
        self.space()
        if self.take("'"):
            return self.datum()
        if not self.take(r"\((?!\s*\))"):
            return self.datum(quoted=False)

        name = self.take(r"[^\s()'\"]+")
        args = []
        self.space()
        while self.take(r"\)") is None:
            args.append(self.nested(self.value))
            self.space()
        return self.construct(name, args)

    def construct(self, name, args):
        table = self.table
        if name == "quote" or name not in table["constructors"]:
            self.fail(f"({name} ...) is not a literal")

        kind = table["constructors"][name]
        if kind == "pair":
            return cons(*args) if len(args) == 2 else self.fail("cons takes two values")
        if kind == "map":
            if len(args) % 2:
                self.fail("a key without a value")
            return Map(tuple(zip(args[::2], args[1::2])))
        if kind == "alist":
            if len(args) != 1 or not isinstance(args[0], list):
                self.fail("a list of pairs is missing")
            return self.map_of(args[0])
        return tuple(args) if kind == "vector" else args

    def datum(self, quoted=True):
        """What may stand behind a quote. quoted: not behind one, a symbol is a variable."""
        self.space()
        table = self.table
        if self.take('"'):
            return self.quoted('"')

        # Collections.
        if "map" in table and self.take(table["read_map"]):
            return self.map_of(self.nested(lambda: self.list_items(")")))
        if self.take(r"#\("):
            return tuple(self.nested(lambda: self.list_items(")")))
        if opened := self.take(r"[(\[]"):
            closer = {"(": ")", "[": "]"}[opened]
            return self.nested(lambda: self.list_items(closer))

        # A character: #\a, #\space.
        if self.take(r"#\\"):
            name = self.take(r"[A-Za-z]+|[\s\S]") or self.fail("a character is missing")
            letter = name if len(name) == 1 else table["char_names"].get(name.lower())
            return Char(letter) if letter else self.fail("unknown character")

        plain = r"[^\s()\[\]{}\"';`,|#\\][^\s()\[\]{}\"';`,|\\]*"
        text = self.take(rf"{plain}|#[a-z]+|\|[^|\\]*\|")
        return self.atom(text or "", quoted)

    def atom(self, text, quoted):
        """A number, a word such as #t, or a symbol."""
        table = self.table
        numeral = text
        if table.get("casefold"):  # Common Lisp's 1.5d0
            numeral = re.sub(r"(?<=[\d.])[dDfF](?=[-+]?\d+$)", "e", text)
        number = _number(numeral, table)
        if number is not None:
            return number

        name = text.lower() if table.get("casefold") else text
        if name in table["words"]:
            return {"true": True, "false": False, "empty": []}[table["words"][name]]

        if not text or text[0] in "#|" or name == ".":
            self.fail("not a literal")
        if not quoted and text[0] != ":":  # a variable
            self.fail("not a literal")
        if not re.fullmatch(r"[\x21-\x7e]+", text):
            self.fail("not a literal")
        return Symbol(name)

    def list_items(self, closer):
        """The rest of a list after its opening parenthesis; Pairs when it has a dot."""
        values = []
        tail = []  # the one value behind a dot
        self.space()
        while self.take(re.escape(closer)) is None:
            if self.at >= len(self.text) or tail:
                self.fail(f"{closer} is missing")
            if values and self.take(r"\.(?=[\s()])"):
                tail = [self.nested(self.datum)]
            else:
                values.append(self.nested(self.datum))
            self.space()

        if not tail:
            return values
        if len(values) > MAX_TERMS:
            self.fail("a dotted list is too long")
        found = tail[0]
        for first in reversed(values):
            found = cons(first, found)
        return found

    def map_of(self, pairs):
        """A Map of what '((a . 1) (b 2)) gives: Pairs and lists."""
        if not isinstance(pairs, list):
            self.fail("a dictionary is made of pairs")

        items = []
        for pair in pairs:
            if isinstance(pair, Pair):
                items.append((pair.first, pair.second))
            elif isinstance(pair, list) and pair:
                items.append((pair[0], pair[1:]))
            else:
                self.fail("a dictionary is made of pairs")
        return Map(tuple(items))
