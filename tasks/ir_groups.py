"""Groups of LLVM IR for GEPO: one C function, its optimisation levels as winners, edits that a run shows to differ as losers.

    python gepo.py build --src ../shared/data/transcoder_gfg/gfg.jsonl.gz --out .data/gepo/groups.jsonl

A row: {"id", "c", "entry", "winners": [{"level", "ir"}], "losers": [{"kind", "from", "ir", "differs", "tests"}], "cheap": [{"kind", "from",
"ir", "valid"}]}. clang and opt run here, what they compile runs in the sandbox, in LLVM's JIT (lli). A C function that gives no group is a row
of FILE.skipped with its reason. Both files are appended to function by function, so that a killed build goes on where it was.
"""

import json
import random
import re
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sandbox import Job, Limits, Pool
from sandbox.languages import find_program, load_language
from tasks import ir_mutations
from tasks.data import read_jsonl

LEVELS = ("Oz", "O1", "O2", "O3")
# Vectorised and unrolled loops are three to five times as long and say nothing new about what a function computes.
PLAIN_LOOPS = ["-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"]
TRIES = 3  # edits of each kind that are run for one function
LOSERS = 8  # kept of them, spread over the kinds
TESTS = 12
LIMITS = Limits(
    cpu=0.15, wall=5.0
)  # a right one takes 0.03 s of processor time; an edit that loops for ever takes all of it

INTEGERS = {
    "char": 8, "signed char": 8, "unsigned char": 8, "short": 16, "unsigned short": 16, "int": 32, "signed": 32, "signed int": 32, "unsigned": 32, "unsigned int": 32,
    "long": 64, "long int": 64, "unsigned long": 64, "long long": 64, "long long int": 64, "unsigned long long": 64, "size_t": 64, "bool": 1, "_Bool": 1,
    "int8_t": 8, "uint8_t": 8, "int16_t": 16, "uint16_t": 16, "int32_t": 32, "uint32_t": 32, "int64_t": 64, "uint64_t": 64, "unsigned long int": 64,
}  # fmt: skip
FLOATS = ("float", "double")


@dataclass
class Unit:
    """One C function: id, its self-contained file, its name, and arguments to call it with (None: they are made up from its types)."""

    id: str
    c: str
    entry: str
    tests: list | None


class Skip(Exception):
    """Why a function gives no group: one of the reasons that the report counts."""


# ---- C functions ----


def read_units(sources):
    """list[Unit] from transcoder_gfg's or Exercism's JSON lines, .c files and folders of them. ValueError names a source that is none."""
    units = []
    for source in map(Path, sources):
        if source.is_dir() or source.suffix == ".c":
            files = sorted(source.rglob("*.c")) if source.is_dir() else [source]
            for file in files:
                if not file.is_file():
                    raise ValueError(
                        f"{file} does not exist: give C files, folders of them, or JSON lines with c_unit or example"
                    )
                units += _functions(
                    str(file),
                    _inline_headers(
                        file.read_text(errors="replace"),
                        {p.name: p.read_text(errors="replace") for p in file.parent.glob("*.h")},
                    ),
                )
        else:
            units += [u for row in read_jsonl(source, lambda _, row: _row_units(row)) for u in row]
    if not units:
        raise ValueError(
            f"no C function in {', '.join(map(str, sources))}: give C files, folders of them, or JSON lines with c_unit or example"
        )
    return units


def _row_units(row):
    if row.get("c_unit"):
        return [
            Unit(
                f"gfg/{row['name']}",
                row["c_unit"],
                "f_gold",
                [t["args"] for t in row["io_tests"] or []] or None,
            )
        ]
    if "example" in row:
        text = lambda name: name.rpartition("/")[2]
        headers = {
            text(n): t
            for n, t in {**row.get("stub", {}), **row["example"]}.items()
            if n.endswith(".h")
        }
        headers |= {
            f"{row['slug'].replace('-', '_')}.h": t
            for n, t in row["example"].items()
            if n.endswith("example.h")
        }
        return [
            u
            for n, t in row["example"].items()
            if n.endswith(".c")
            for u in _functions(f"exercism/{row['slug']}", _inline_headers(t, headers))
        ]
    if "functions" not in row and "c_unit" not in row:
        raise ValueError(
            "a row needs c_unit (a C file that defines f_gold), or example ({path: C text})"
        )
    return []


def _inline_headers(text, headers):
    """The C file with its own headers in place: #include "x.h" -> its text, guards and all."""
    for _ in range(3):
        text = re.sub(
            r'^\s*#\s*include\s+"([^"]+)".*$',
            lambda m: headers.get(m[1].rpartition("/")[2], m[0]),
            text,
            flags=re.MULTILINE,
        )
    return text


def _functions(name, text):
    """One Unit for each function that a C file makes visible, but main."""
    found = re.findall(
        r"^(?!static)[A-Za-z_][\w \t]*[ \t*]+(\w+)\s*\([^();{}]*\)\s*\{", text, re.MULTILINE
    )
    return [
        Unit(f"{name}:{entry}", text, entry, None)
        for entry in dict.fromkeys(found)
        if entry not in ("main", "if", "while", "for", "switch")
    ]


def signature(unit):
    """(return type, [(type, is array)]) of the entry function. Skip when it has types that a driver cannot make up."""
    found = re.search(rf"^([\w \t]+?[\s*]+){unit.entry}\s*\(([^()]*)\)\s*\{{", unit.c, re.MULTILINE)
    if not found:
        raise Skip("unsupported signature")
    parameters = (
        [] if found[2].strip() in ("", "void") else [_parameter(p) for p in found[2].split(",")]
    )
    result = _words(found[1])
    if not (
        result in INTEGERS
        or result in FLOATS
        or (result == "void" and any(array for _, array in parameters))
    ):
        raise Skip("unsupported signature")
    return result, parameters


def _words(text):
    return " ".join(
        w for w in text.split() if w not in ("const", "inline", "register", "extern", "restrict")
    )


def _parameter(text):
    array = text.count("[") + text.count("*")
    words = re.findall(r"\w+", re.sub(r"\[[^\]]*\]", "", text))
    kind = _words(" ".join(words[:-1]))
    if array > 1 or not (kind in INTEGERS or kind in FLOATS):
        raise Skip("unsupported signature")
    return kind, bool(array)


# ---- a driver that calls it ----


def made_up(parameters, draw):
    """Arguments for a function nobody has tests for: arrays of 24, integers small enough to be their lengths."""
    scalar = lambda kind: (
        round(draw.uniform(-9, 9), 2)
        if kind in FLOATS
        else draw.randint(0, 1 if INTEGERS[kind] == 1 else 20)
    )
    word = lambda: "".join(draw.choice("abcdeABz 019") for _ in range(draw.randint(3, 12)))
    array = lambda kind: (
        word()
        if kind == "char"
        else [scalar(kind) - draw.randint(0, 9) * (kind == "int") for _ in range(24)]
    )
    return [array(kind) if is_array else scalar(kind) for kind, is_array in parameters]


def _scalar(kind, value):
    """C text of a value. Skip when it does not fit the type."""
    if isinstance(value, str) and len(value) == 1 and kind == "char":
        value = ord(value)
    if kind in FLOATS and isinstance(value, (int, float)):
        return repr(float(value))
    if not isinstance(value, int) or not -(1 << 63) <= value < 1 << (
        INTEGERS[kind] if kind.startswith(("u", "size")) else max(INTEGERS[kind] - 1, 1)
    ):
        raise Skip("no usable test input")
    return f"({kind}){value}LL" if value > -(1 << 63) else "(-9223372036854775807LL - 1)"


def _call(unit, number, result, parameters, values):
    """C statements that call the function once and print its result and its arrays."""
    lines, names, shown = [], [], []
    if len(values) != len(parameters):
        raise Skip("no usable test input")
    for i, ((kind, array), value) in enumerate(zip(parameters, values)):
        if array != isinstance(value, (list, str)) and not (
            kind == "char" and isinstance(value, str)
        ):
            raise Skip("no usable test input")
        if array:
            # Zeros on both sides: a function that looks one element too far should see the same at every level.
            text = ", ".join(_scalar(kind, v) for v in value)
            lines.append(
                f"static {kind} a{number}_{i}[{len(value) + 80}] = {{{', '.join(['0'] * 16)}{', ' if text else ''}{text}}};"
            )
            shown.append(
                f"for (int i = 0; i < {len(value)}; i++) show((double)a{number}_{i}[16 + i]);"
            )
        names.append(f"a{number}_{i} + 16" if array else _scalar(kind, value))
    call = f"{unit.entry}({', '.join(names)})"
    before = (
        f"{call};"
        if result == "void"
        else f"show_exact((long long){call});"
        if result in INTEGERS
        else f"show((double){call});"
    )
    return "\n".join([*lines, before, *shown, 'puts("");', "fflush(stdout);"])


def driver(unit, seed=0):
    """C text of a main that calls the unit's function on its test inputs, at most TESTS of those that fit -> (text, how many)."""
    result, parameters = signature(unit)
    draw = random.Random(f"{seed}/{unit.id}")
    calls = []
    for values in unit.tests or [made_up(parameters, draw) for _ in range(TESTS)]:
        try:
            calls.append(_call(unit, len(calls), result, parameters, values))
        except Skip:
            continue
        if len(calls) == TESTS:
            break
    if len(calls) < 2:
        raise Skip("no usable test input")
    head = [
        "#include <stdio.h>",
        "#include <stdbool.h>",
        "#include <stdint.h>",
        "#include <stddef.h>",
    ]
    declared = ", ".join(kind + " *" * array for kind, array in parameters) or "void"
    show = [
        'static void show(double x) { printf("%.9g ", x); }',
        'static void show_exact(long long x) { printf("%lld ", x); }',
    ]
    main = ["int main(void) {", *calls, "return 0;", "}"]
    return "\n".join([*head, f"{result} {unit.entry}({declared});", *show, *main]), len(calls)


# ---- compiling ----


def tool(name):
    language = load_language("llvm-ir")
    if sentence := language.missing():
        raise ValueError(f"the IR groups need clang and LLVM's tools: {sentence}")
    return find_program(name, tuple(language.programs[name]))


def _run_tool(command, text):
    return subprocess.run(
        command, input=text, capture_output=True, text=True, errors="replace", timeout=60
    )


def compile_c(text, level, vectorize=False):
    """C text -> LLVM IR as clang prints it. Skip when it does not compile."""
    loops = [] if vectorize else PLAIN_LOOPS
    done = _run_tool(
        [
            tool("clang"),
            "-x",
            "c",
            "-w",
            f"-{level}",
            "-S",
            "-emit-llvm",
            "-g0",
            *loops,
            "-o",
            "-",
            "-",
        ],
        text,
    )
    if done.returncode:
        raise Skip("does not compile")
    return done.stdout


def only(ir, entry):
    """The module with `entry` and what it needs; helpers that were inlined everywhere go."""
    done = _run_tool(
        [
            tool("opt"),
            "-S",
            "-passes=internalize,globaldce",
            f"-internalize-public-api-list={entry}",
        ],
        ir,
    )
    if done.returncode or not re.search(
        rf"^define .*@{re.escape(entry)}\(", done.stdout, re.MULTILINE
    ):
        raise Skip("does not compile")
    return done.stdout


def verifies(ir):
    return _run_tool([tool("opt"), "-passes=verify", "-disable-output"], ir).returncode == 0


def winners(unit, vectorize=False):
    """[{"level", "ir"}], one for each distinct text; a text that several levels share carries all their names ("O2,O3")."""
    levels = {}
    for level in LEVELS:
        text = ir_mutations.renumber(
            ir_mutations.strip(only(compile_c(unit.c, level, vectorize), unit.entry))
        )
        levels.setdefault(text, []).append(level)
    return [{"level": ",".join(names), "ir": text} for text, names in levels.items()]


# ---- running ----


class Runner:
    """Runs IR beside one driver in the sandbox's LLVM language and gives what it printed, None when it did not end well."""

    def __init__(self, pool, main_c):
        self.pool = pool
        self.main = compile_c(main_c, "O0")
        self.target = "".join(
            re.findall(r"^target .*\n", self.main, re.MULTILINE)
        )  # taken off the groups' texts; the two modules must agree

    def __call__(self, texts):
        run = ["lli", "-extra-module=unit.ll", "main.ll"]
        futures = [
            self.pool.submit(
                Job(
                    "llvm-ir",
                    {"main.ll": self.main, "unit.ll": self.target + t},
                    run=run,
                    limits=LIMITS,
                )
            )
            for t in texts
        ]
        results = [future.result() for future in futures]
        if any(r.status == "sandbox_error" for r in results):
            raise Skip("sandbox error")
        return [r.stdout if r.status == "ok" else None for r in results]


def group(unit, pool, vectorize=False, seed=0):
    """One row of the groups file. Skip with the reason when there is no group in the function."""
    main_c, tests = driver(unit, seed)
    right, run = winners(unit, vectorize), Runner(pool, main_c)
    outputs = run([w["ir"] for w in right])
    if None in outputs:
        raise Skip("winner does not run")
    if len(set(outputs)) > 1:
        raise Skip("winners disagree")
    draw = random.Random(f"{seed}/{unit.id}/edits")
    losers, tried = verified_losers(right, outputs[0], run, draw)
    if not losers:
        raise Skip("no edit differs")
    row = {
        "id": unit.id,
        "c": unit.c,
        "entry": unit.entry,
        "tests": tests,
        "winners": right,
        "losers": losers,
        "cheap": cheap_losers(right, draw),
    }
    return row | {"tried": tried}


def edits(right, kinds, tries, draw):
    """Distinct edited texts of random winners: [{"kind", "from", "ir"}]."""
    seen, found = {w["ir"] for w in right}, []
    for kind, edit in kinds.items():
        for _ in range(tries):
            winner = draw.choice(right)
            text = ir_mutations.mutate(draw, winner["ir"], edit)
            if text and text not in seen:
                seen.add(text)
                found.append({"kind": kind, "from": winner["level"], "ir": text})
    return found


def verified_losers(right, expected, run, draw):
    """Edits that verify, run to their end and differ from the winners on some input -> (at most LOSERS of them, {kind: {outcome: count}})."""
    candidates = edits(right, ir_mutations.KINDS, TRIES, draw)
    outcomes, kept = {}, []
    for loser, output in zip(candidates, run([c["ir"] for c in candidates])):
        outcome = (
            "does not run"
            if output is None
            else "same"
            if output == expected
            else "differs"
            if verifies(loser["ir"])
            else "invalid"
        )
        if outcome == "differs":
            lines = zip(output.splitlines(), expected.splitlines())
            kept.append(
                loser
                | {"differs": sum(a != b for a, b in lines), "tests": len(expected.splitlines())}
            )
        outcomes.setdefault(loser["kind"], Counter())[outcome] += 1
    draw.shuffle(kept)
    rank = Counter()
    for loser in kept:  # round robin over the kinds
        loser["turn"] = rank[loser["kind"]]
        rank[loser["kind"]] += 1
    kept.sort(key=lambda loser: loser.pop("turn"))
    return kept[:LOSERS], outcomes


def cheap_losers(right, draw):
    """The paper's kind: edits that nobody has run; many are not even valid IR, and the row says which."""
    return [
        loser | {"valid": verifies(loser["ir"])}
        for loser in edits(right, ir_mutations.CHEAP, 2, draw)
    ]


# ---- the whole build ----


def build(sources, out, workers=None, limit=None, vectorize=False, seed=0, report=print):
    """Write the groups of all C functions of `sources` to `out` and print a report; functions that either file already has are not done again."""
    out = Path(out)
    skipped = out.with_name(out.name + ".skipped")
    tool("clang")
    units = read_units(sources)[:limit]
    done = {row["id"] for file in (out, skipped) for row in _whole_rows(file)}
    waiting = [u for u in units if u.id not in done]
    report(f"{len(units)} C functions, {len(units) - len(waiting)} done before")
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        Pool(workers=workers) as pool,
        ThreadPoolExecutor((workers or 2) + 1) as threads,
        open(out, "a") as good,
        open(skipped, "a") as bad,
    ):

        def one(unit):
            try:
                return group(unit, pool, vectorize, seed)
            except Skip as reason:
                return {"id": unit.id, "reason": str(reason)}
            except subprocess.TimeoutExpired:
                return {"id": unit.id, "reason": "clang or opt took more than 60 s"}

        for n, row in enumerate(threads.map(one, waiting), 1):
            file = bad if "reason" in row else good
            file.write(json.dumps(row) + "\n")
            file.flush()
            if n % 50 == 0:
                report(f"{n} of {len(waiting)} functions, {time.perf_counter() - started:.0f} s")
    return summary(out, skipped, time.perf_counter() - started, report)


def _whole_rows(file):
    """Rows of a file that may end in half a line, which is cut off: a killed build leaves one."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def summary(out, skipped, seconds, report=print):
    """Count what both files hold -> dict, printed as sentences."""
    groups, reasons = _whole_rows(out), Counter(row["reason"] for row in _whole_rows(skipped))
    outcomes = {}
    for row in groups:
        for kind, counts in row["tried"].items():
            outcomes.setdefault(kind, Counter()).update(counts)
    kept = Counter(loser["kind"] for row in groups for loser in row["losers"])
    cheap = Counter((loser["kind"], loser["valid"]) for row in groups for loser in row["cheap"])
    sizes = Counter(len(row["winners"]) for row in groups)
    report(
        f"{len(groups)} groups from {len(groups) + sum(reasons.values())} functions in {seconds:.0f} s; {sizes[1]} of them have one winner only, which serves n = 1 alone"
    )
    report("winners per group: " + ", ".join(f"{n}: {count}" for n, count in sorted(sizes.items())))
    for reason, count in reasons.most_common():
        report(f"skipped, {reason}: {count}")
    for kind in sorted(outcomes):
        report(
            f"{kind}: kept {kept[kind]}; tried "
            + ", ".join(f"{o} {c}" for o, c in outcomes[kind].most_common())
        )
    for kind in sorted({k for k, _ in cheap}):
        report(
            f"{kind}: {cheap[kind, True] + cheap[kind, False]}, of them {cheap[kind, True]} valid IR"
        )
    return {
        "groups": len(groups),
        "skipped": dict(reasons),
        "kept": dict(kept),
        "one_winner": sizes[1],
        "seconds": seconds,
    }
