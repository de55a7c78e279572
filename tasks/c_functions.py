"""C functions and how to call them: read from data sets or files, and a main that tries each one.

TransCoder's set has the same functions in C++ and Rust; there they get C's calling convention.
A function is usable when its parameters are numbers or arrays of numbers, and it returns a number
or changes an array. Skip says why one is not.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks.data import read_jsonl

TESTS = 12  # calls of one function
MARGIN = 16  # zeros before an array, and four times as many behind it

# Bits of the integer types.
INTEGERS = {
    "char": 8, "signed char": 8, "unsigned char": 8,
    "short": 16, "unsigned short": 16,
    "int": 32, "signed": 32, "signed int": 32, "unsigned": 32, "unsigned int": 32,
    "long": 64, "long int": 64, "unsigned long": 64, "unsigned long int": 64,
    "long long": 64, "long long int": 64, "unsigned long long": 64, "size_t": 64,
    "bool": 1, "_Bool": 1,
    "int8_t": 8, "uint8_t": 8, "int16_t": 16, "uint16_t": 16,
    "int32_t": 32, "uint32_t": 32, "int64_t": 64, "uint64_t": 64,
}  # fmt: skip
FLOATS = ("float", "double")
QUALIFIERS = ("const", "inline", "register", "extern", "restrict")

# C's names of Rust's types.
RUST = {
    "bool": "bool", "char": "char", "usize": "size_t", "f32": "float", "f64": "double",
    "i8": "int8_t", "i16": "int16_t", "i32": "int", "i64": "long",
    "u8": "uint8_t", "u16": "uint16_t", "u32": "unsigned", "u64": "unsigned long",
}  # fmt: skip

LANGUAGES = {"c": "C", "cpp": "C++", "rust": "Rust"}
CPP_HEAD = """#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
using namespace std;
"""

WHAT_TO_GIVE = "give C files, folders of them, or JSON lines with c_unit or example"


@dataclass
class Unit:
    """One function."""

    # What belongs on one side of a split: functions of a file, one function in three languages.
    family: str
    source: str  # its self-contained file
    entry: str  # its name
    tests: list | None = None  # arguments to call it with; None: they are made up from its types
    language: str = "c"

    @property
    def id(self):
        return f"{self.family}:{self.entry}:{self.language}"


class Parameter(NamedTuple):
    kind: str  # a type of INTEGERS or FLOATS, of its elements where it is an array
    is_array: bool


class Signature(NamedTuple):
    result: str  # a type of INTEGERS or FLOATS, or void
    parameters: list


class Skip(Exception):
    """Why a function gives no group: one of the reasons that the report counts."""


# ---- reading ----


def read_units(sources, languages=("c",)):
    """list[Unit] from transcoder_gfg's or Exercism's JSON lines, .c files and folders of them.

    languages: of LANGUAGES; only transcoder_gfg has others than C.
    ValueError names a source that has none.
    """
    units = []
    for source in map(Path, sources):
        if source.is_dir():
            files = sorted(source.rglob("*.c"))
        elif source.suffix == ".c":
            files = [source]
        else:
            for found in read_jsonl(source, lambda _, row: _row_units(row, languages)):
                units += found
            continue
        for file in files:
            units += _file_units(file)
    if not units:
        raise ValueError(f"no C function in {', '.join(map(str, sources))}: {WHAT_TO_GIVE}")
    return units


def _file_units(file):
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {WHAT_TO_GIVE}")
    headers = {path.name: path.read_text(errors="replace") for path in file.parent.glob("*.h")}
    text = _inline_headers(file.read_text(errors="replace"), headers)
    return _functions(str(file), text)


def _row_units(row, languages):
    if "functions" in row:
        return _gfg_units(row, languages)
    if "example" in row:
        return _exercism_units(row) if "c" in languages else []
    raise ValueError(
        "a row needs functions and c_unit (TransCoder's f_gold by language), or example "
        "({path: C text})"
    )


def _gfg_units(row, languages):
    """The function of a row of transcoder_gfg in each language that has it."""
    sources = {"c": row.get("c_unit")}
    if "cpp" in row["functions"]:
        # On a line of its own: signature() reads the next.
        sources["cpp"] = f'{CPP_HEAD}\nextern "C"\n{row["functions"]["cpp"].strip()}\n'
    if "rust" in row["functions"]:
        sources["rust"] = _callable_rust(row["files"]["rust"])

    tests = [test["args"] for test in row.get("io_tests") or []]
    return [
        Unit(f"gfg/{row['name']}", sources[language], "f_gold", tests or None, language)
        for language in languages
        if sources.get(language)
    ]


def _callable_rust(text):
    """A Rust file up to its tests, in which C can call f_gold."""
    code = text.partition("//TOFILL")[0]
    lines = [line for line in code.splitlines() if not line.startswith(("//", "#![feature"))]
    code = "\n".join(lines).strip() + "\n"
    return re.sub(r"pub unsafe fn f_gold", '#[no_mangle]\npub unsafe extern "C" fn f_gold', code)


def _exercism_units(row):
    # An example's header stands in for the stub's, which its C file includes by the slug.
    headers = {}
    for path, text in {**row.get("stub", {}), **row["example"]}.items():
        if path.endswith(".h"):
            headers[path.rpartition("/")[2]] = text
    for path, text in row["example"].items():
        if path.endswith("example.h"):
            headers[f"{row['slug'].replace('-', '_')}.h"] = text

    units = []
    for path, text in row["example"].items():
        if path.endswith(".c"):
            name = path.rpartition("/")[2].removesuffix(".c")
            family = f"exercism/{row['slug']}/{name}"
            units += _functions(family, _inline_headers(text, headers))
    return units


def _inline_headers(text, headers):
    """The C file with its own headers in place: #include "x.h" -> its text, guards and all."""

    def inlined(match):
        return headers.get(match[1].rpartition("/")[2], match[0])

    for _ in range(3):  # headers that include headers
        text = re.sub(r'^\s*#\s*include\s+"([^"]+)".*$', inlined, text, flags=re.MULTILINE)
    return text


def _functions(family, text):
    """One Unit for each function that a C file makes visible, but main."""
    definition = r"^(?!static)[A-Za-z_][\w \t]*[ \t*]+(\w+)\s*\([^();{}]*\)\s*\{"
    found = re.findall(definition, text, re.MULTILINE)
    return [
        Unit(family, text, entry)
        for entry in dict.fromkeys(found)
        if entry not in ("main", "if", "while", "for", "switch")
    ]


def signature(unit):
    """Signature of the entry function. Skip when it has types that a driver cannot make up."""
    found = _rust_signature(unit) if unit.language == "rust" else _c_signature(unit)
    fills_array = found.result == "void" and any(p.is_array for p in found.parameters)
    if not (found.result in INTEGERS or found.result in FLOATS or fills_array):
        raise Skip("unsupported signature")
    return found


def _c_signature(unit):
    definition = rf"^([\w \t]+?[\s*]+){unit.entry}\s*\(([^()]*)\)\s*\{{"
    found = re.search(definition, unit.source, re.MULTILINE)
    if not found:
        raise Skip("unsupported signature")
    parameters = []
    if found[2].strip() not in ("", "void"):
        parameters = [_parameter(text) for text in found[2].split(",")]
    return Signature(_type(found[1]), parameters)


def _rust_signature(unit):
    definition = rf"fn {unit.entry}\s*\(([^()]*)\)\s*(?:->\s*(\w+))?\s*\{{"
    found = re.search(definition, unit.source)
    if not found:
        raise Skip("unsupported signature")
    parameters = []
    for text in filter(str.strip, found[1].split(",")):
        kind = text.partition(":")[2].strip()
        pointer = re.fullmatch(r"\*mut (\w+)", kind)
        name = RUST.get(pointer[1] if pointer else kind)
        if name is None:
            raise Skip("unsupported signature")
        parameters.append(Parameter(name, bool(pointer)))
    return Signature(RUST.get(found[2], "void") if found[2] else "void", parameters)


def _parameter(text):
    dimensions = text.count("[") + text.count("*")
    *kind, _ = re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", text)) or [""]
    kind = _type(" ".join(kind))
    if dimensions > 1 or not (kind in INTEGERS or kind in FLOATS):
        raise Skip("unsupported signature")
    return Parameter(kind, bool(dimensions))


def _type(text):
    return " ".join(word for word in text.split() if word not in QUALIFIERS)


# ---- a main that calls it ----

HEAD = """#include <stdio.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>"""
SHOW = """static void show(double x) { printf("%.9g ", x); }
static void show_exact(long long x) { printf("%lld ", x); }"""


def driver(unit, seed=0):
    """(C text, calls) of a main that calls a function on its test inputs.

    calls: how many, at most TESTS of those that fit. Skip when fewer than two do.
    """
    form = signature(unit)
    rng = random.Random(f"{seed}/{unit.family}:{unit.entry}")  # the same in every language
    inputs = unit.tests or [made_up(form.parameters, rng) for _ in range(TESTS)]
    calls = []
    for values in inputs:
        try:
            calls.append(_call(unit, len(calls), form, values))
        except Skip:
            continue
        if len(calls) == TESTS:
            break
    if len(calls) < 2:
        raise Skip("no usable test input")

    kinds = [kind + (" *" if is_array else "") for kind, is_array in form.parameters]
    declaration = f"{form.result} {unit.entry}({', '.join(kinds) or 'void'});"
    text = "\n".join([HEAD, declaration, SHOW, "int main(void) {", *calls, "return 0;", "}"])
    return text, len(calls)


def made_up(parameters, rng):
    """Arguments for a function nobody has tests for.

    Arrays of 24, integers small enough to be their lengths.
    """
    return [
        _made_up_array(kind, rng) if is_array else _made_up_scalar(kind, rng)
        for kind, is_array in parameters
    ]


def _made_up_array(kind, rng):
    if kind == "char":
        length = rng.randint(3, 12)
        return "".join(rng.choice("abcdeABz 019") for _ in range(length))
    values = []
    for _ in range(24):
        value = _made_up_scalar(kind, rng)
        less = rng.randint(0, 9)  # some negative ones
        values.append(value - less if kind == "int" else value)
    return values


def _made_up_scalar(kind, rng):
    if kind in FLOATS:
        return round(rng.uniform(-9, 9), 2)
    return rng.randint(0, 1 if INTEGERS[kind] == 1 else 20)


def _call(unit, number, form, values):
    """C statements that call the function once and print its result and its arrays."""
    if len(values) != len(form.parameters):
        raise Skip("no usable test input")
    declared, arguments, shown = [], [], []
    for place, ((kind, is_array), value) in enumerate(zip(form.parameters, values)):
        if not is_array:
            arguments.append(_scalar(kind, value))
            continue
        if not isinstance(value, (list, str)):
            raise Skip("no usable test input")
        # Zeros on both sides: a function that looks one element too far should see the same at
        # every level.
        name = f"a{number}_{place}"
        elements = ", ".join(["0"] * MARGIN + [_scalar(kind, element) for element in value])
        declared.append(f"static {kind} {name}[{len(value) + 5 * MARGIN}] = {{{elements}}};")
        arguments.append(f"{name} + {MARGIN}")
        element = f"(double){name}[{MARGIN} + i]"
        shown.append(f"for (int i = 0; i < {len(value)}; i++) show({element});")

    call = f"{unit.entry}({', '.join(arguments)})"
    if form.result in INTEGERS:
        call = f"show_exact((long long){call})"
    elif form.result in FLOATS:
        call = f"show((double){call})"
    return "\n".join([*declared, f"{call};", *shown, 'puts("");', "fflush(stdout);"])


def _scalar(kind, value):
    """C text of a value. Skip when it does not fit the type."""
    if kind in FLOATS:
        if not isinstance(value, (int, float)):
            raise Skip("no usable test input")
        return repr(float(value))

    if isinstance(value, str) and len(value) == 1 and kind == "char":
        value = ord(value)
    bits = INTEGERS[kind]
    if not kind.startswith(("u", "size")):
        bits = max(bits - 1, 1)  # one is the sign
    if not isinstance(value, int) or not -(1 << 63) <= value < 1 << bits:
        raise Skip("no usable test input")
    if value == -(1 << 63):  # as a numeral it would be the negative of a number too large
        return "(-9223372036854775807LL - 1)"
    return f"({kind}){value}LL"
