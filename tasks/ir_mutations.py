"""Small edits of LLVM IR text that should change what a function computes: the losers of GEPO's groups.

strip() takes out what names the optimisation level; renumber() gives values and blocks the numbers LLVM itself would, so that an edit leaves no
gap that gives it away. KINDS are edits meant to stay valid (a run decides whether they differ); CHEAP are the paper's kind, which may be invalid.
"""

import re

LOCAL = r"%(?:\d+|n\d+)\b"  # a numbered value or block; %n1 is one that an edit added
DEFINED = re.compile(rf"\s*({LOCAL}) = ")
LABEL = re.compile(r"(\d+|n\d+):")
TYPE = r"(?:\[[^\]]*\]|<[^>]*>|[a-z]\w*|%[\w.]+)\**"
FLAGS = r"(?:(?:nsw|nuw|exact|inbounds|fast|nnan|ninf|nsz|arcp|contract|afn|reassoc|tail|notail|musttail)\s+)*"
BINARY = re.compile(
    rf"(\s*{LOCAL} = (?:sub|sdiv|udiv|srem|urem|shl|lshr|ashr|fsub|fdiv|icmp \w+|fcmp \w+) {FLAGS}{TYPE}) ([^,]+), ([^,]+)$"
)
CONSTANT = re.compile(r"(?<=[ (])(-?\d+(?:\.\d+e[-+]\d+)?|true|false)(?=[,)\]]|$| \])")
SIGNED = {
    "eq": "i",
    "ne": "i",
    "slt": "s",
    "sle": "s",
    "sgt": "s",
    "sge": "s",
    "ult": "u",
    "ule": "u",
    "ugt": "u",
    "uge": "u",
}
UNSIGNED_TWINS = {
    "sext": "zext", "zext": "sext", "sdiv": "udiv", "udiv": "sdiv", "srem": "urem", "urem": "srem", "ashr": "lshr", "lshr": "ashr",
    "sitofp": "uitofp", "uitofp": "sitofp", "fptosi": "fptoui", "fptoui": "fptosi",
    "icmp slt": "icmp ult", "icmp sle": "icmp ule", "icmp sgt": "icmp ugt", "icmp sge": "icmp uge",
    "icmp ult": "icmp slt", "icmp ule": "icmp sle", "icmp ugt": "icmp sgt", "icmp uge": "icmp sge",
}  # fmt: skip


def strip(ir):
    """IR text without comments, target, attributes (minsize, optsize ...), metadata and linkage marks: nothing names the level."""
    kept = []
    for line in ir.splitlines():
        if re.match(r"(;|source_filename|target |attributes #|!|\s*;)", line):
            continue
        line = re.sub(r"\s*;[^\"]*$", "", line)
        line = re.sub(r",? ![\w.]+(?: ![\w.]+)?(?=,|$| \{)", "", line)
        line = re.sub(
            r" (?:#\d+|dso_local|local_unnamed_addr|unnamed_addr|mustprogress)\b", "", line
        )
        kept.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def renumber(ir):
    """Number parameters, entry block, blocks and values of every function in order of appearance, as LLVM prints them.

    What is used but defined nowhere (a cheap loser may do that) gets the next free number.
    """
    out, body = [], []
    for line in ir.splitlines():
        body.append(line)
        if line == "}" or not (body[0].startswith("define")):
            out += (
                _renumber_function(body) if line == "}" and body[0].startswith("define") else body
            )
            body = []
    return "\n".join(out + body) + "\n"


def _renumber_function(lines):
    parameters = re.findall(LOCAL, lines[0])
    names = [*parameters, f"%{len(parameters)}"]  # then the entry block, which has no label line
    for line in lines[1:]:
        found = LABEL.match(line) or DEFINED.match(line)
        if found:
            names.append("%" + found[1].lstrip("%"))
    numbers = {name: f"%{i}" for i, name in enumerate(dict.fromkeys(names))}
    new = lambda found: numbers.setdefault(found[0], f"%{len(numbers)}")
    label = lambda found: new([f"%{found[1]}"])[1:] + ":"
    return [
        LABEL.sub(label, line) if LABEL.match(line) else re.sub(LOCAL, new, line) for line in lines
    ]


# ---- what an edit has to know of the text ----


def value_types(lines):
    """{value: type} of one function's parameters and instructions, as far as the text shows it."""
    types = {
        name: kind for kind, name in re.findall(rf"({TYPE})(?: [a-z][\w()]*)* ({LOCAL})", lines[0])
    }
    for line in lines[1:]:
        if not (found := DEFINED.match(line)):
            continue
        rest = line[found.end() :]
        if cast := re.match(rf"\w+ .* to ({TYPE})$", rest):
            types[found[1]] = cast[1]
        elif re.match("[if]cmp", rest):
            types[found[1]] = "i1"
        elif pointer := re.match(
            rf"getelementptr {FLAGS}({TYPE}), ({TYPE}) [^,]+, i64 [^,]+$", rest
        ):
            types[found[1]] = pointer[2]
        elif select := re.match(rf"select {FLAGS}i1 [^,]+, ({TYPE})", rest):
            types[found[1]] = select[1]
        elif plain := re.match(rf"{FLAGS}(?!getelementptr|alloca)\w+ {FLAGS}({TYPE})", rest):
            types[found[1]] = plain[1]
    return types


def uses(line):
    """Matches of the values that a line reads: not the one it defines, not block names."""
    start = found.end() if (found := DEFINED.match(line)) else 0
    blocks = {
        m.start(1)
        for m in re.finditer(rf"label ({LOCAL})|, ({LOCAL}) \]", line)
        for _ in "1"
        if m[1]
    }
    blocks |= (
        {m.start(1) for m in re.finditer(rf", ({LOCAL}) \]", line)}
        if re.search(r"= phi ", line)
        else set()
    )
    return [m for m in re.finditer(LOCAL, line) if m.start() >= start and m.start() not in blocks]


def _replace(line, match, text):
    return line[: match.start()] + text + line[match.end() :]


def _pick(random, lines, fits):
    """A random body line for which fits(line) is true, as its index; None when there is none."""
    found = [i for i, line in enumerate(lines) if i and fits(line)]
    return random.choice(found) if found else None


# ---- edits: (random, lines of one function) -> new lines or None ----


def constant(random, lines):
    """Change a constant: 0 -> 1, 7 -> 8, 6, -7 or 14, true -> false, 2.5 -> 3.5."""
    found = lambda line: (
        []
        if re.match(r"\s*(call|br|switch)|.*= (?:tail )?call|.*alloca", line)
        else [m for m in CONSTANT.finditer(line) if not line[: m.start()].endswith("align ")]
    )
    if (i := _pick(random, lines, found)) is None:
        return None
    match = random.choice(found(lines[i]))
    old = match[1]
    if old in ("true", "false"):
        new = {"true": "false", "false": "true"}[old]
    elif "e" in old:
        new = f"{float(old) + random.choice([1.0, -1.0, 0.5]):.6e}"
    else:
        new = str(
            random.choice(
                [n for n in (int(old) + 1, int(old) - 1, -int(old), 2 * int(old)) if n != int(old)]
            )
        )
    return [*lines[:i], _replace(lines[i], match, new), *lines[i + 1 :]]


def predicate(random, lines):
    """Another comparison of the same signedness: slt -> sle, sgt, eq ..."""
    form = re.compile(r"(?<== )([if])cmp (\w+)")
    if (i := _pick(random, lines, form.search)) is None:
        return None
    kind, old = form.search(lines[i]).groups()
    if kind == "i":
        others = [
            p
            for p, sign in SIGNED.items()
            if p != old and "i" in (sign, SIGNED[old]) or sign == SIGNED[old] and p != old
        ]
    else:
        others = [old[0] + p for p in ("eq", "ne", "lt", "le", "gt", "ge") if old[0] + p != old]
    return [*lines[:i], form.sub(f"{kind}cmp {random.choice(others)}", lines[i]), *lines[i + 1 :]]


def operand(random, lines):
    """Read another value of the same type."""
    types = value_types(lines)
    others = lambda name: [v for v in types if v != name and types[v] == types.get(name)]
    if (i := _pick(random, lines, lambda line: any(others(m[0]) for m in uses(line)))) is None:
        return None
    match = random.choice([m for m in uses(lines[i]) if others(m[0])])
    return [*lines[:i], _replace(lines[i], match, random.choice(others(match[0]))), *lines[i + 1 :]]


def drop(random, lines):
    """Leave an instruction out; its readers read one of its operands of the same type, or 0. Stores and calls of nothing just go."""
    types = value_types(lines)
    gone = lambda line: (
        re.match(r"\s*(store|(tail )?call void)", line)
        or (
            (found := DEFINED.match(line))
            and types.get(found[1], "").startswith("i")
            and not re.search("= phi", line)
        )
    )
    if (i := _pick(random, lines, gone)) is None:
        return None
    if not (found := DEFINED.match(lines[i])):
        return lines[:i] + lines[i + 1 :]
    same = [m[0] for m in uses(lines[i]) if types.get(m[0]) == types[found[1]]]
    return _substitute(
        lines[:i] + lines[i + 1 :],
        found[1],
        random.choice(same) if same else _zero(types[found[1]]),
    )


def _zero(kind):
    return "false" if kind == "i1" else "null" if kind.endswith("*") else "0"


def _substitute(lines, name, text):
    return [re.sub(rf"{re.escape(name)}\b", text, line) for line in lines]


def swap(random, lines):
    """Exchange the operands of a subtraction, division, shift or comparison, the arms of a select or branch, or two neighbouring lines."""
    branch = re.compile(rf"(\s*br i1 [^,]+), (label {LOCAL}), (label {LOCAL})$")
    select = re.compile(rf"(\s*{LOCAL} = select {FLAGS}i1 [^,]+), ([^,]+), ([^,]+)$")
    fits = lambda line: BINARY.match(line) or branch.match(line) or select.match(line)
    if random.random() < 0.2:
        i = _pick(
            random,
            lines[:-2],
            lambda line: (
                line.startswith("  ") and not line.lstrip().startswith(("br", "ret", "switch"))
            ),
        )
        return None if i is None else [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]
    if (i := _pick(random, lines, fits)) is None:
        return None
    head, left, right = fits(lines[i]).groups()
    comma = " " if BINARY.match(lines[i]) else ", "
    return [*lines[:i], f"{head}{comma}{right}, {left}", *lines[i + 1 :]]


def type_(random, lines):
    """Treat signed as unsigned or the reverse (sext -> zext, sdiv -> udiv, slt -> ult), or cut an integer to eight bits and widen it again."""
    types = value_types(lines)
    form = re.compile("(?<== )(" + "|".join(UNSIGNED_TWINS) + r")\b")
    wide = lambda line: (
        (found := DEFINED.match(line))
        and types.get(found[1]) in ("i16", "i32", "i64")
        and not re.search("= phi", line)
    )
    if random.random() < 0.5 and (i := _pick(random, lines, form.search)) is not None:
        return [*lines[:i], form.sub(lambda m: UNSIGNED_TWINS[m[1]], lines[i]), *lines[i + 1 :]]
    if (i := _pick(random, lines, wide)) is None:
        return None
    name = DEFINED.match(lines[i])[1]
    cut = [
        f"  %n1 = trunc {types[name]} {name} to i8",
        f"  %n2 = {random.choice(['sext', 'zext'])} i8 %n1 to {types[name]}",
    ]
    return [*lines[: i + 1], *cut, *_substitute(lines[i + 1 :], name, "%n2")]


def cheap_drop_cast(random, lines):
    """The paper's figure: leave a trunc, zext or sext out and go on with its operand, of the wrong type."""
    form = re.compile(rf"\s*({LOCAL}) = (?:trunc|[sz]ext) {TYPE} ({LOCAL}) to")
    if (i := _pick(random, lines, form.match)) is None:
        return None
    name, source = form.match(lines[i]).groups()
    return _substitute(lines[:i] + lines[i + 1 :], name, source)


def cheap_dangling(random, lines):
    """Leave an instruction out and its result undefined."""
    i = _pick(random, lines, DEFINED.match)
    return None if i is None else lines[:i] + lines[i + 1 :]


def cheap_operand(random, lines):
    """Read any other value, whatever its type."""
    types = value_types(lines)
    if len(types) < 2 or (i := _pick(random, lines, uses)) is None:
        return None
    match = random.choice(uses(lines[i]))
    return [
        *lines[:i],
        _replace(lines[i], match, random.choice([v for v in types if v != match[0]] or [match[0]])),
        *lines[i + 1 :],
    ]


KINDS = {
    "constant": constant,
    "predicate": predicate,
    "operand": operand,
    "drop": drop,
    "swap": swap,
    "type": type_,
}
CHEAP = {
    "cheap_drop_cast": cheap_drop_cast,
    "cheap_dangling": cheap_dangling,
    "cheap_operand": cheap_operand,
}


def mutate(random, ir, edit):
    """One edit in a random function of the module -> IR text, or None when the edit finds nothing to change."""
    lines = ir.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("define")]
    start = random.choice(starts)
    end = lines.index("}", start)
    changed = edit(random, lines[start : end + 1])
    if changed is None:
        return None
    text = renumber("\n".join([*lines[:start], *changed, *lines[end + 1 :]]))
    return None if text == ir else text
