"""Small edits of LLVM IR text that should change what a function computes: GEPO's losers.

strip() takes out what names the optimisation level; renumber() gives values and blocks the numbers
LLVM itself would, so that an edit leaves no gap that gives it away. KINDS are edits meant to stay
valid (a run decides whether they differ); CHEAP are the paper's kind, which may be invalid; KEEPING
are edits that keep the meaning (a run confirms it), for more winners.
"""

import re

LOCAL = r"%(?:\d+|n\d+)\b"  # a numbered value or block; %n1 is one that an edit added
DEFINED = re.compile(rf"\s*({LOCAL}) = ")
LABEL = re.compile(r"(\d+|n\d+):")
TYPE = r"(?:\[[^\]]*\]|<[^>]*>|[a-z]\w*|%[\w.]+)\**"
FLAGS = (
    r"(?:(?:nsw|nuw|exact|inbounds|fast|nnan|ninf|nsz|arcp|contract|afn|reassoc"
    r"|tail|notail|musttail)\s+)*"
)

# Lines with two operands or arms that can be exchanged: (before, first, second).
ORDERED = r"sub|sdiv|udiv|srem|urem|shl|lshr|ashr|fsub|fdiv|icmp \w+|fcmp \w+"
BINARY = re.compile(rf"(\s*{LOCAL} = (?:{ORDERED}) {FLAGS}{TYPE}) ([^,]+), ([^,]+)$")
BRANCH = re.compile(rf"(\s*br i1 [^,]+), (label {LOCAL}), (label {LOCAL})$")
SELECT = re.compile(rf"(\s*{LOCAL} = select {FLAGS}i1 [^,]+), ([^,]+), ([^,]+)$")

CONSTANT = re.compile(r"(?<=[ (])(-?\d+(?:\.\d+e[-+]\d+)?|true|false)(?=[,)\]]|$| \])")
COMPARISON = re.compile(r"(?<== )([if])cmp (\w+)")
CAST = re.compile(rf"\s*({LOCAL}) = (?:trunc|[sz]ext) {TYPE} ({LOCAL}) to")

# Predicates of icmp and their signedness: i is any.
SIGNED = {
    "eq": "i", "ne": "i",
    "slt": "s", "sle": "s", "sgt": "s", "sge": "s",
    "ult": "u", "ule": "u", "ugt": "u", "uge": "u",
}  # fmt: skip
TWINS = {
    "sext": "zext", "zext": "sext",
    "sdiv": "udiv", "udiv": "sdiv", "srem": "urem", "urem": "srem",
    "ashr": "lshr", "lshr": "ashr",
    "sitofp": "uitofp", "uitofp": "sitofp", "fptosi": "fptoui", "fptoui": "fptosi",
    "icmp slt": "icmp ult", "icmp sle": "icmp ule", "icmp sgt": "icmp ugt", "icmp sge": "icmp uge",
    "icmp ult": "icmp slt", "icmp ule": "icmp sle", "icmp ugt": "icmp sgt", "icmp uge": "icmp sge",
}  # fmt: skip
TWIN = re.compile("(?<== )(" + "|".join(TWINS) + r")\b")

OPERATIONS = (("add", "sub", "mul"), ("and", "or", "xor"), ("fadd", "fsub", "fmul", "fdiv"))
NAMES = "|".join(name for names in OPERATIONS for name in names)
OPERATION = re.compile(rf"(\s*{LOCAL} = )({NAMES}) {FLAGS}(.*)$")

# For edits that keep the meaning.
COMMUTES = re.compile(
    rf"(\s*{LOCAL} = (?:add|mul|and|or|xor|fadd|fmul) {FLAGS}{TYPE}) ([^,]+), ([^,]+)$"
)
COMPARED = re.compile(rf"(\s*{LOCAL} = [if]cmp )(\w+) ({TYPE}) ([^,]+), ([^,]+)$")
PHI = re.compile(r"(\s*%\w+ = phi .*?)(\[[^\]]*\]), (\[[^\]]*\])(.*)$")
MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def mutate(rng, ir, edit):
    """One edit in a random function of the module -> IR text.

    edit: one of KINDS or CHEAP. None when it finds nothing to change.
    """
    lines = ir.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("define")]
    start = rng.choice(starts)
    end = lines.index("}", start) + 1
    changed = edit(rng, lines[start:end])
    if changed is None:
        return None
    text = renumber("\n".join([*lines[:start], *changed, *lines[end:]]))
    return None if text == ir else text


# ---- texts that name no level and have no gaps ----


def strip(ir):
    """IR text in which nothing names the level.

    Without comments, target, attributes (minsize, optsize ...), metadata and linkage marks.
    """
    marks = r" (?:#\d+|dso_local|local_unnamed_addr|unnamed_addr|mustprogress)\b"
    kept = []
    for line in ir.splitlines():
        if re.match(r"(;|source_filename|target |attributes #|!|\s*;)", line):
            continue
        line = re.sub(r"\s*;[^\"]*$", "", line)
        line = re.sub(r",? ![\w.]+(?: ![\w.]+)?(?=,|$| \{)", "", line)
        line = re.sub(marks, "", line)
        kept.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def without_names(ir):
    """IR text whose local names are %n1, %n2 ...: a pass calls what it makes %.not or %spec.select.

    Names of types and globals stay.
    """
    named = r"[-\w.$]*[-A-Za-z.$_][-\w.$]*"
    found = re.findall(rf"^ +%({named}) = |^({named}):", ir, re.MULTILINE)
    names = dict.fromkeys(value or label for value, label in found)
    numbers = {name: f"n{number}" for number, name in enumerate(names, 1)}

    def numbered(match):
        return match[1] + numbers.get(match[2], match[2])

    ir = re.sub(rf"(%)({named})", numbered, ir)
    return re.sub(rf"^()({named})(?=:)", numbered, ir, flags=re.MULTILINE)


def renumber(ir):
    """Number parameters, entry block, blocks and values of every function as LLVM prints them.

    In order of appearance. What is used but defined nowhere (a cheap loser may do that) gets the
    next free number.
    """
    out, body = [], []
    for line in ir.splitlines():
        body.append(line)
        in_function = body[0].startswith("define")
        if in_function and line != "}":
            continue
        out += _renumber_function(body) if in_function else body
        body = []
    return "\n".join(out + body) + "\n"


def _renumber_function(lines):
    parameters = re.findall(LOCAL, lines[0])
    names = [*parameters, f"%{len(parameters)}"]  # then the entry block, which has no label line
    for line in lines[1:]:
        found = LABEL.match(line) or DEFINED.match(line)
        if found:
            names.append("%" + found[1].lstrip("%"))
    numbers = {name: f"%{number}" for number, name in enumerate(dict.fromkeys(names))}

    def renamed(found):
        return numbers.setdefault(found[0], f"%{len(numbers)}")

    def relabelled(found):
        name = f"%{found[1]}"
        return numbers.setdefault(name, f"%{len(numbers)}")[1:] + ":"

    new = []
    for line in lines:
        if LABEL.match(line):
            new.append(LABEL.sub(relabelled, line))
        else:
            new.append(re.sub(LOCAL, renamed, line))
    return new


# ---- edits: (rng, lines of one function) -> new lines, or None ----


def constant(rng, lines):
    """Change a constant: 0 -> 1, 7 -> 8, 6, -7 or 14, true -> false, 2.5 -> 3.5."""
    index = _pick(rng, lines, _constants)
    if index is None:
        return None
    match = rng.choice(_constants(lines[index]))
    old = match[1]
    if old in ("true", "false"):
        new = {"true": "false", "false": "true"}[old]
    elif "e" in old:
        new = f"{float(old) + rng.choice([1.0, -1.0, 0.5]):.6e}"
    else:
        number = int(old)
        others = (number + 1, number - 1, -number, 2 * number)
        new = str(rng.choice([other for other in others if other != number]))
    return _exchange(lines, index, _replace(lines[index], match, new))


def _constants(line):
    """Matches of the constants of a line that an edit may change."""
    if re.match(r"\s*(call|br|switch)|.*= (?:tail )?call|.*alloca", line):
        return []
    found = CONSTANT.finditer(line)
    return [match for match in found if not line[: match.start()].endswith("align ")]


def predicate(rng, lines):
    """Another comparison of the same signedness: slt -> sle, sgt, eq ..."""
    index = _pick(rng, lines, COMPARISON.search)
    if index is None:
        return None
    kind, old = COMPARISON.search(lines[index]).groups()
    if kind == "i":
        others = [new for new in SIGNED if new != old and _fit_together(new, old)]
    else:
        ordered = old[0]  # or unordered: olt, ult
        possible = [ordered + name for name in ("eq", "ne", "lt", "le", "gt", "ge")]
        others = [new for new in possible if new != old]
    new = f"{kind}cmp {rng.choice(others)}"
    return _exchange(lines, index, COMPARISON.sub(new, lines[index]))


def _fit_together(new, old):
    signs = (SIGNED[new], SIGNED[old])
    return "i" in signs or signs[0] == signs[1]


def operand(rng, lines):
    """Read another value of the same type."""
    types = value_types(lines)

    def others(name):
        return [other for other in types if other != name and types[other] == types.get(name)]

    def changeable(line):
        return [match for match in uses(line) if others(match[0])]

    index = _pick(rng, lines, changeable)
    if index is None:
        return None
    match = rng.choice(changeable(lines[index]))
    new = rng.choice(others(match[0]))
    return _exchange(lines, index, _replace(lines[index], match, new))


def drop(rng, lines):
    """Leave an instruction out. Stores and calls of nothing just go.

    The readers of any other read one of its operands of the same type, or 0.
    """
    types = value_types(lines)

    def can_go(line):
        if re.match(r"\s*(store|(tail )?call void)", line):
            return True
        return _defined_type(line, types).startswith("i")

    index = _pick(rng, lines, can_go)
    if index is None:
        return None
    line, rest = lines[index], _exchange(lines, index)
    found = DEFINED.match(line)
    if not found:
        return rest

    name = found[1]
    same = [match[0] for match in uses(line) if types.get(match[0]) == types[name]]
    new = rng.choice(same) if same else _zero(types[name])
    return _substitute(rest, name, new)


def _zero(kind):
    if kind == "i1":
        return "false"
    return "null" if kind.endswith("*") else "0"


def swap(rng, lines):
    """Exchange two things whose order counts.

    The operands of a subtraction, division, shift or comparison, the arms of a select or branch, or
    one time in five two neighbouring lines.
    """
    if rng.random() < 0.2:
        index = _pick(rng, lines[:-2], _is_movable)
        if index is None:
            return None
        return [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]]

    index = _pick(rng, lines, _arms)
    if index is None:
        return None
    head, left, right = _arms(lines[index]).groups()
    comma = " " if BINARY.match(lines[index]) else ", "
    return _exchange(lines, index, f"{head}{comma}{right}, {left}")


def _is_movable(line):
    return line.startswith("  ") and not line.lstrip().startswith(("br", "ret", "switch"))


def _arms(line):
    return BINARY.match(line) or BRANCH.match(line) or SELECT.match(line)


def type_(rng, lines):
    """Treat signed as unsigned or the reverse: sext -> zext, sdiv -> udiv, slt -> ult."""
    index = _pick(rng, lines, TWIN.search)
    if index is None:
        return None
    twin = TWIN.sub(lambda found: TWINS[found[1]], lines[index])
    return _exchange(lines, index, twin)


def operation(rng, lines):
    """Another operation on the same operands: add -> sub, and -> or, fmul -> fdiv."""
    index = _pick(rng, lines, OPERATION.match)
    if index is None:
        return None
    head, old, rest = OPERATION.match(lines[index]).groups()
    others = [new for names in OPERATIONS if old in names for new in names if new != old]
    # No flag: what it promises of the old operation the new one may not keep.
    return _exchange(lines, index, f"{head}{rng.choice(others)} {rest}")


def cheap_drop_cast(rng, lines):
    """The paper's figure: leave a cast out and go on with its operand, of the wrong type."""
    index = _pick(rng, lines, CAST.match)
    if index is None:
        return None
    name, source = CAST.match(lines[index]).groups()
    return _substitute(_exchange(lines, index), name, source)


def cheap_dangling(rng, lines):
    """Leave an instruction out and its result undefined."""
    index = _pick(rng, lines, DEFINED.match)
    return None if index is None else _exchange(lines, index)


def cheap_operand(rng, lines):
    """Read any other value, whatever its type."""
    types = value_types(lines)
    if len(types) < 2:
        return None
    index = _pick(rng, lines, uses)
    if index is None:
        return None
    match = rng.choice(uses(lines[index]))
    others = [name for name in types if name != match[0]]
    return _exchange(lines, index, _replace(lines[index], match, rng.choice(others)))


KINDS = {
    "constant": constant,
    "predicate": predicate,
    "operand": operand,
    "drop": drop,
    "swap": swap,
    "type": type_,
    "operation": operation,
}
CHEAP = {
    "cheap_drop_cast": cheap_drop_cast,
    "cheap_dangling": cheap_dangling,
    "cheap_operand": cheap_operand,
}


# ---- edits that keep the meaning: more winners ----


def commute(rng, lines):
    """Exchange the operands of an addition, product, and, or, xor: add %1, %2 -> add %2, %1."""
    index = _pick(rng, lines, COMMUTES.match)
    if index is None:
        return None
    head, left, right = COMMUTES.match(lines[index]).groups()
    return _exchange(lines, index, f"{head} {right}, {left}")


def mirror(rng, lines):
    """Compare from the other side: slt %1, %2 -> sgt %2, %1."""
    index = _pick(rng, lines, COMPARED.match)
    if index is None:
        return None
    head, old, kind, left, right = COMPARED.match(lines[index]).groups()
    new = old[:-2] + MIRRORED.get(old[-2:], old[-2:])
    return _exchange(lines, index, f"{head}{new} {kind} {right}, {left}")


def turn_phi(rng, lines):
    """Name a phi's first two ways in the other order."""
    index = _pick(rng, lines, PHI.match)
    if index is None:
        return None
    head, first, second, rest = PHI.match(lines[index]).groups()
    return _exchange(lines, index, f"{head}{second}, {first}{rest}")


def reorder(rng, lines):
    """Exchange two neighbouring lines that neither read each other nor touch memory."""

    def is_free(line):
        return _is_movable(line) and DEFINED.match(line) and not TOUCHES.search(line)

    def pairs(line):
        return is_free(line[0]) and is_free(line[1]) and not _reads(line[1], line[0])

    neighbours = [index for index in range(1, len(lines) - 1) if pairs(lines[index : index + 2])]
    if not neighbours:
        return None
    index = rng.choice(neighbours)
    return [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]]


TOUCHES = re.compile(r"= (?:phi|alloca|load|(?:\w+ )?call|[su]div|[su]rem)\b")


def _reads(line, other):
    """Whether a line reads the value that another defines."""
    name = DEFINED.match(other)[1]
    return any(match[0] == name for match in uses(line))


def reorder_blocks(rng, lines):
    """Exchange two neighbouring blocks; the first stays first."""
    starts = [index for index, line in enumerate(lines) if LABEL.match(line)]
    if len(starts) < 2:
        return None
    turn = rng.randrange(len(starts) - 1)
    first, second = starts[turn], starts[turn + 1]
    end = starts[turn + 2] if turn + 2 < len(starts) else len(lines) - 1
    last, moved = lines[first:second], lines[second:end]
    if end == len(lines) - 1:  # an empty line stands before each label
        moved = [*moved, ""]
        last = last[:-1]
    return [*lines[:first], *moved, *last, *lines[end:]]


KEEPING = {
    "commute": commute,
    "mirror": mirror,
    "turn_phi": turn_phi,
    "reorder": reorder,
    "reorder_blocks": reorder_blocks,
}


# ---- what an edit has to know of the text ----


def value_types(lines):
    """{value: type} of one function's parameters and instructions, as far as the text shows it."""
    parameters = re.findall(rf"({TYPE})(?: [a-z][\w()]*)* ({LOCAL})", lines[0])
    types = {name: kind for kind, name in parameters}
    for line in lines[1:]:
        if found := DEFINED.match(line):
            kind = _result_type(line[found.end() :])
            if kind:
                types[found[1]] = kind
    return types


def _result_type(instruction):
    if cast := re.match(rf"\w+ .* to ({TYPE})$", instruction):
        return cast[1]
    if re.match("[if]cmp", instruction):
        return "i1"
    element = rf"getelementptr {FLAGS}({TYPE}), ({TYPE}) [^,]+, i64 [^,]+$"
    if pointer := re.match(element, instruction):
        return pointer[2]
    if select := re.match(rf"select {FLAGS}i1 [^,]+, ({TYPE})", instruction):
        return select[1]
    if plain := re.match(rf"{FLAGS}(?!getelementptr|alloca)\w+ {FLAGS}({TYPE})", instruction):
        return plain[1]
    return None


def uses(line):
    """Matches of the values that a line reads: not the one it defines, not block names."""
    defined = DEFINED.match(line)
    start = defined.end() if defined else 0
    blocks = {match.start(1) for match in re.finditer(rf"label ({LOCAL})", line)}
    if "= phi " in line:
        blocks |= {match.start(1) for match in re.finditer(rf", ({LOCAL}) \]", line)}
    found = re.finditer(LOCAL, line)
    return [match for match in found if match.start() >= start and match.start() not in blocks]


def _defined_type(line, types):
    """Type of the value that a line defines, "" where it is not known or defined by a phi."""
    found = DEFINED.match(line)
    if not found or "= phi" in line:
        return ""
    return types.get(found[1], "")


def _pick(rng, lines, fits):
    """Index of a random line below the first for which fits(line) is true; None without one."""
    found = [index for index, line in enumerate(lines) if index and fits(line)]
    return rng.choice(found) if found else None


def _exchange(lines, index, *new):
    """The lines with others (or none) in place of one."""
    return [*lines[:index], *new, *lines[index + 1 :]]


def _replace(line, match, text):
    return line[: match.start()] + text + line[match.end() :]


def _substitute(lines, name, text):
    return [re.sub(rf"{re.escape(name)}\b", text, line) for line in lines]
