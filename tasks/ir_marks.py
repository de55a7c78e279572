"""Marks in LLVM IR that tell an edit without a look at the source: GEPO's losers must have none.

A compiler's output has no dead value, no cast there and back and nothing left to fold. Where a
loser has what no winner of its group has, a model learns the mark instead of the meaning.
"""

import re
from collections import Counter

VALUE = r"%[\w.]+"
DEFINITION = re.compile(rf"\s*({VALUE}) = (.*)$")
NUMBER = r"(?:-?\d+(?:\.\d+e[-+]\d+)?|true|false|null|undef|poison|0x[0-9A-F]+)"
# Instructions whose result nobody has to read.
EFFECTS = re.compile(r"(?:(?:tail|musttail|notail) )?call |invoke |load volatile|atomicrmw|cmpxchg")

CAST = re.compile(rf"(trunc|zext|sext) \S+ ({VALUE}) to (\S+)$")
# Type and two operands of what can be computed without the first or the second.
TWO = re.compile(
    r"(add|sub|mul|[su]div|[su]rem|shl|[la]shr|and|or|xor|[if]cmp \w+)"
    rf"(?: (?:nsw|nuw|exact))* \S+ ({VALUE}|{NUMBER}), ({VALUE}|{NUMBER})$"
)
SELECT = re.compile(r"select (?:\w+ )*i1 (\S+), \S+ (\S+), \S+ (\S+)$")
NEUTRAL = {"add": "0", "sub": "0", "shl": "0", "lshr": "0", "ashr": "0", "or": "0", "xor": "0"}
NEUTRAL |= {"mul": "1", "sdiv": "1", "udiv": "1"}
SAME_OPERANDS = ("sub", "xor", "and", "or", "icmp", "sdiv", "udiv", "srem", "urem")


def marks(ir):
    """Counter of the marks of a text: dead, unused, named, cast_back, foldable.

    dead: a value that nobody reads. unused: a declaration that nobody calls. named: a value that
    has a name, which passes give to what they make. cast_back: an integer cut, then widened again.
    foldable: an instruction whose result a reader knows without the program's input, or that is one
    of its operands: add i32 2, 3; mul i32 %1, 1; sub i32 %1, %1; select i1 true; br i1 true.
    """
    found = Counter()
    for body in re.findall(r"^define.*?^}", ir, re.DOTALL | re.MULTILINE):
        found += _function_marks(body.splitlines())
    for name in re.findall(r"^declare .*?(@[\w.]+)\(", ir, re.MULTILINE):
        found["unused"] += len(re.findall(rf"{re.escape(name)}\b", ir)) == 1
    return +found


def of_all(members):
    """Marks that some of the members {"ir"} have: they tell nothing there."""
    return set().union(*(marks(member["ir"]) for member in members))


def telling(winners, losers):
    """Kinds of the losers that have a mark which no winner has, one for each."""
    usual = of_all(winners)
    return [loser["kind"] for loser in losers if marks(loser["ir"]).keys() - usual]


def _function_marks(lines):
    definitions = {}
    reads = Counter()
    for line in lines:
        defined = DEFINITION.match(line)
        reads.update(re.findall(VALUE, defined[2] if defined else line))
        if defined:
            definitions[defined[1]] = defined[2]

    found = Counter()
    for name, instruction in definitions.items():
        found["named"] += not name[1:].isdigit()
        if not reads[name] and not EFFECTS.match(instruction):
            found["dead"] += 1
        if _casts_back(instruction, definitions):
            found["cast_back"] += 1
        if _is_foldable(instruction):
            found["foldable"] += 1
    found["foldable"] += sum(bool(re.match(r"\s*br i1 (true|false),", line)) for line in lines)
    return +found


def _casts_back(instruction, definitions):
    """Whether a trunc is widened again: what instcombine writes as a mask or a pair of shifts."""
    outer = CAST.match(instruction)
    inner = CAST.match(definitions.get(outer[2], "")) if outer else None
    return bool(inner) and inner[1] == "trunc" and outer[1] != "trunc"


def _is_foldable(instruction):
    if select := SELECT.match(instruction):
        condition, left, right = select.groups()
        return condition in ("true", "false") or left == right
    two = TWO.match(instruction)
    if not two:
        return False

    operation, left, right = two.groups()
    operation = operation.partition(" ")[0]
    if left == right and operation in SAME_OPERANDS:
        return True
    if re.fullmatch(NUMBER, left) and re.fullmatch(NUMBER, right):
        return True
    if operation in ("mul", "and", "sdiv", "udiv", "srem", "urem", "shl") and "0" in (left, right):
        return True
    return right == NEUTRAL.get(operation, "")
