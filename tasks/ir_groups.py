"""Groups of LLVM IR for GEPO: winners and losers of one function.

    python gepo.py build --src ../shared/data/transcoder_gfg/gfg.jsonl.gz --out groups.jsonl

Winners are the function's optimisation levels and, where more are wanted, orders of passes and
edits that keep the meaning; losers are edits that a run shows to differ. A row:

    {"id", "family", "language", "source", "entry", "tests",
     "winners": [{"level", "ir"}],
     "losers":  [{"kind", "from", "ir", "differs", "tests"}],
     "cheap":   [{"kind", "from", "ir", "valid"}],
     "tried":   {kind: {outcome: count}}}

Every winner and loser is in canonical form: what an edit leaves behind (a dead value, something to
fold, a comparison that no compiler writes so) is cleaned up before the text is run, so that nothing
but its meaning gives it away. clang, rustc and opt run here, what they compile runs in the sandbox,
in LLVM's JIT (lli). A function that gives no group is a row of FILE.skipped with its reason. Both
files are appended to function by function, so that a killed build goes on where it was.
"""

import json
import random
import re
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sandbox import Job, Limits, Pool
from sandbox.languages import find_program, load_language
from tasks import ir_marks, ir_mutations
from tasks.c_functions import Skip, driver, read_units
from tasks.ir_exclusions import Exclusions

LEVELS = ("Oz", "Os", "O1", "O2", "O3")
# Orders of passes over what the front end writes, for more winners than there are levels.
ORDERS = {
    "mem2reg": "mem2reg",
    "gvn": "sroa,early-cse,gvn,simplifycfg",
    "licm": "sroa,simplifycfg,loop-mssa(loop-rotate,licm),instcombine,gvn",
    "newgvn": "sroa,loop(indvars),reassociate,newgvn",
    "threading": "sroa,jump-threading,correlated-propagation,sccp,adce",
}
# instsimplify for instcombine leaves `icmp sle i32 %1, 5`, where a compiler writes slt 6: of 144
# losers it leaves 12 with a mark and 33 in a form that no winner has (of 56 winners 2).
CANONICAL = "function(instcombine,dce,simplifycfg,instcombine,dce),globaldce,strip-dead-prototypes"
# Vectorised and unrolled loops are three to five times as long and say nothing new about what a
# function computes.
PLAIN_LOOPS = {
    "clang": ("-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"),
    "rustc": (
        *("-C", "no-vectorize-loops", "-C", "no-vectorize-slp"),
        *("-C", "llvm-args=-unroll-threshold=0"),
    ),
}
CHEAP_TRIES = 2  # edits of each cheap kind, which nobody runs
MOST_ROUNDS = 10  # of one edit of each kind
DRY_ROUNDS = 2  # without a new text, after which nothing new is expected
# A right one takes 0.03 s of processor time; an edit that loops for ever takes all of it.
LIMITS = Limits(cpu=0.15, wall=5.0)
TOOL_SECONDS = 60


@dataclass(frozen=True)
class Build:
    """How groups are made."""

    winners: int = 2  # no more are looked for; those of the levels are all kept
    losers: int = 8  # kept, spread over the kinds
    vectorize: bool = False
    seed: int = 0


# ---- the whole build ----


def build(
    sources, out, how=None, languages=("c",), workers=None, limit=None, data=None, report=print
):
    """Write the groups of all functions of `sources` to `out` -> totals, reported as sentences.

    how: a Build. languages: of c, cpp, rust. data: folder of the data sets, for what is left out
    (ir_exclusions.py).
    Functions that `out` or its .skipped file already has are not done again.
    """
    out = Path(out)
    skipped = out.with_name(out.name + ".skipped")
    tool("clang")  # its absence is known before anything is written
    languages = compilable(languages, report)
    units = read_units(sources, languages)[:limit]
    exclusions = Exclusions(data)
    if not exclusions.is_complete():
        report("MultiPL-E is not at hand: functions that overlap it stay in")
    done = {row["id"] for file in (out, skipped) for row in _whole_rows(file)}
    waiting = [unit for unit in units if unit.id not in done]
    report(f"{len(units)} functions, {len(units) - len(waiting)} done before")

    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        Pool(workers=workers) as pool,
        ThreadPoolExecutor((workers or 2) + 1) as threads,
        open(out, "a") as groups,
        open(skipped, "a") as reasons,
    ):
        rows = threads.map(lambda unit: _row(unit, exclusions, pool, how or Build()), waiting)
        for count, row in enumerate(rows, 1):
            file = reasons if "reason" in row else groups
            file.write(json.dumps(row) + "\n")
            file.flush()
            if count % 50 == 0:
                seconds = time.perf_counter() - started
                report(f"{count} of {len(waiting)} functions, {seconds:.0f} s")
    return _report_totals(out, skipped, time.perf_counter() - started, report)


def compilable(languages, report):
    """The languages whose compiler is here. rustc's LLVM must not be newer than opt's."""
    if "rust" not in languages:
        return languages
    problem = load_language("rust").missing()
    if problem is None:
        versions = {"rustc": _run_tool("rustc", ["-vV"]), "opt": _run_tool("opt", ["--version"])}
        found = {}
        for name, done in versions.items():
            found[name] = int(re.search(rb"LLVM version:? (\d+)", done.stdout)[1])
        if found["rustc"] > found["opt"]:
            problem = f"rustc writes LLVM {found['rustc']}, opt reads {found['opt']}"
    if problem is None:
        return languages
    report(f"rust is left out: {problem}")
    return tuple(name for name in languages if name != "rust")


def _row(unit, exclusions, pool, how):
    """A function's group, or the reason why there is none."""
    try:
        if reason := exclusions.reason(unit.family, unit.entry, unit.source):
            raise Skip(reason)
        return group(unit, pool, how)
    except Skip as reason:
        return {"id": unit.id, "reason": str(reason)}
    except subprocess.TimeoutExpired:
        return {"id": unit.id, "reason": f"a compiler took more than {TOOL_SECONDS} s"}


def _whole_rows(file):
    """Rows of a file that may end in half a line, which is cut off: a killed build leaves one."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _report_totals(out, skipped, seconds, report):
    """Count what both files hold."""
    groups = _whole_rows(out)
    reasons = Counter(row["reason"] for row in _whole_rows(skipped))
    sizes = Counter(len(row["winners"]) for row in groups)
    kept, cheap, valid, marked, tried = Counter(), Counter(), Counter(), Counter(), {}
    origins = Counter()  # of winners
    for row in groups:
        origins.update(winner["level"] for winner in row["winners"])
        marked.update(ir_marks.telling(row["winners"], row["losers"]))
        kept.update(loser["kind"] for loser in row["losers"])
        cheap.update(loser["kind"] for loser in row["cheap"])
        valid.update(loser["kind"] for loser in row["cheap"] if loser["valid"])
        for kind, outcomes in row["tried"].items():
            tried.setdefault(kind, Counter()).update(outcomes)

    functions = len(groups) + sum(reasons.values())
    report(
        f"{len(groups)} groups from {functions} functions in {seconds:.0f} s; "
        f"{sizes[1]} of them have one winner only, which serves n = 1 alone"
    )
    report("winners per group: " + ", ".join(f"{n}: {count}" for n, count in sorted(sizes.items())))
    losers = kept.total()
    report(
        f"{marked.total()} of {losers} losers have a mark that no winner of theirs has "
        "(ir_marks.py)"
    )
    for reason, count in reasons.most_common():
        report(f"skipped, {reason}: {count}")
    for kind in sorted(tried):
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in tried[kind].most_common())
        report(f"{kind}: kept {kept[kind] + origins[kind]}; tried {outcomes}")
    for kind in sorted(cheap):
        report(f"{kind}: {cheap[kind]}, of them {valid[kind]} valid IR")
    return {
        "groups": len(groups),
        "skipped": dict(reasons),
        "kept": dict(kept),
        "marked": marked.total(),
        "one_winner": sizes[1],
        "seconds": seconds,
    }


# ---- one group ----


def group(unit, pool, how):
    """One row of the groups file. Skip with the reason when there is no group in the function."""
    main_c, tests = driver(unit, how.seed)
    right = levels(unit, how.vectorize)
    runner = Runner(pool, main_c)
    outputs = runner.outputs([winner["ir"] for winner in right])
    if None in outputs:
        raise Skip("winner does not run")
    if len(set(outputs)) > 1:
        raise Skip("winners disagree")
    expected = outputs[0]

    rng = random.Random(f"{how.seed}/{unit.id}/edits")
    tried = {}
    right += more_winners(unit, right, expected, runner, rng, how.winners - len(right), tried)
    losers = verified_losers(right, expected, runner, rng, how.losers, tried)
    if not losers:
        raise Skip("no edit differs")
    return {
        "id": unit.id,
        "family": unit.family,
        "language": unit.language,
        "source": unit.source,
        "entry": unit.entry,
        "tests": tests,
        "winners": right,
        "losers": losers,
        "cheap": cheap_losers(right, rng),
        "tried": tried,
    }


def levels(unit, vectorize=False):
    """[{"level", "ir"}] of the optimisation levels, one for each distinct text.

    A text that several levels share carries all their names ("O2,O3").
    """
    names = {}
    written = {}  # as clang leaves it -> canonical: levels often agree
    for level in LEVELS:
        text = plain_text(unit.entry, compile_unit(unit, level, vectorize))
        if text not in written:
            written[text] = canonical(text)
        names.setdefault(written[text], []).append(level)
    if None in names:
        raise Skip("does not compile")
    return [{"level": ",".join(found), "ir": text} for text, found in names.items()]


def more_winners(unit, right, expected, runner, rng, wanted, tried):
    """At most `wanted` other texts of the same meaning: orders of passes, then edits that keep it.

    A run confirms each: it prints what the levels print (`expected`). The edits of one winner are
    edited on. tried: {kind: {outcome: count}}, which is added to.
    """
    if wanted <= 0:
        return []
    plain = compile_unit(unit, None)
    orders = []
    for name, passes in ORDERS.items():
        try:
            text = canonical(plain_text(unit.entry, plain, passes))
        except Skip:  # a pass that this LLVM does not have
            text = None
        orders.append({"level": name, "ir": text})
    seen = {winner["ir"] for winner in right}
    found = _confirmed(orders, seen, expected, runner, tried)[:wanted]

    dry = 0
    for _ in range(MOST_ROUNDS):
        if len(found) >= wanted or dry == DRY_ROUNDS:
            break
        known = len(seen)
        edited = []
        for edit in edits(right + found, ir_mutations.KEEPING, 1, rng):
            edited.append({"level": edit["kind"], "ir": canonical(edit["ir"])})
        found += _confirmed(edited, seen, expected, runner, tried)
        dry = dry + 1 if len(seen) == known else 0
    return found[:wanted]


def _confirmed(candidates, seen, expected, runner, tried):
    """Those that are new and print `expected`."""
    new = []
    for candidate in candidates:
        is_new = candidate["ir"] is not None and candidate["ir"] not in seen
        if is_new:
            seen.add(candidate["ir"])
            new.append(candidate)
        else:
            _count(tried, candidate["level"], "invalid" if candidate["ir"] is None else "known")

    confirmed = []
    for candidate, output in zip(new, runner.outputs([candidate["ir"] for candidate in new])):
        outcome = _outcome(output, expected)
        _count(tried, candidate["level"], outcome)
        if outcome == "same":
            confirmed.append(candidate)
    return confirmed


def verified_losers(right, expected, runner, rng, wanted, tried):
    """At most `wanted` edits whose runs show that they differ, about as many of each kind.

    They verify, run to their end, print something else than the winners (`expected`) on some input,
    and have no mark that no winner has. A round tries one edit of each kind.
    """
    lines = expected.splitlines()
    seen = {winner["ir"] for winner in right}
    usual = ir_marks.of_all(right)
    kept = []
    dry = 0
    for _ in range(MOST_ROUNDS):
        if len(kept) >= wanted or dry == DRY_ROUNDS:
            break
        candidates = []
        for loser in edits(right, ir_mutations.KINDS, 1, rng):
            loser["ir"] = canonical(loser["ir"])
            if loser["ir"] is None:
                _count(tried, loser["kind"], "invalid")
            elif loser["ir"] in seen:
                _count(tried, loser["kind"], "known")
            elif ir_marks.marks(loser["ir"]).keys() - usual:
                _count(tried, loser["kind"], "marked")
            else:
                seen.add(loser["ir"])
                candidates.append(loser)

        dry = 0 if candidates else dry + 1
        rng.shuffle(candidates)
        outputs = runner.outputs([loser["ir"] for loser in candidates])
        for loser, output in zip(candidates, outputs):
            outcome = _outcome(output, expected)
            _count(tried, loser["kind"], outcome)
            if outcome == "differs":
                pairs = zip(output.splitlines(), lines)
                differs = sum(line != right_line for line, right_line in pairs)
                kept.append(loser | {"differs": differs, "tests": len(lines)})
    return kept[:wanted]


def _outcome(output, expected):
    if output is None:
        return "does not run"
    return "same" if output == expected else "differs"


def _count(tried, kind, outcome):
    outcomes = tried.setdefault(kind, {})
    outcomes[outcome] = outcomes.get(outcome, 0) + 1


def cheap_losers(right, rng):
    """The paper's kind: edits that nobody has run. The row says which are valid IR at all."""
    found = edits(right, ir_mutations.CHEAP, CHEAP_TRIES, rng)
    return [loser | {"valid": verifies(loser["ir"])} for loser in found]


def edits(right, kinds, tries, rng):
    """Distinct edited texts of random winners: [{"kind", "from", "ir"}]."""
    seen = {winner["ir"] for winner in right}
    found = []
    for kind, edit in kinds.items():
        for _ in range(tries):
            winner = rng.choice(right)
            text = ir_mutations.mutate(rng, winner["ir"], edit)
            if text and text not in seen:
                seen.add(text)
                found.append({"kind": kind, "from": winner["level"], "ir": text})
    return found


# ---- running ----


class Runner:
    """Runs IR beside one driver, in the sandbox's LLVM language."""

    def __init__(self, pool, main_c):
        self.pool = pool
        done = _run_tool("clang", ["-x", "c", "-w", "-S", "-emit-llvm", "-o", "-", "-"], main_c)
        if done.returncode:
            raise Skip("does not compile")
        self.main = done.stdout.decode(errors="replace")
        # Taken off the groups' texts, but the two modules must agree.
        self.target = "".join(re.findall(r"^target .*\n", self.main, re.MULTILINE))

    def outputs(self, texts):
        """What each text printed, as bytes; None when it did not end well."""
        futures = [self.pool.submit(self._job(text)) for text in texts]
        results = [future.result() for future in futures]
        if any(result.status == "sandbox_error" for result in results):
            raise Skip("sandbox error")
        return [result.stdout if result.status == "ok" else None for result in results]

    def _job(self, text):
        files = {"main.ll": self.main, "unit.ll": self.target + text}
        run = ["lli", "-extra-module=unit.ll", "main.ll"]
        return Job("llvm-ir", files, run=run, limits=LIMITS)


# ---- clang, rustc and opt ----


def compile_unit(unit, level, vectorize=False):
    """A function's file as LLVM bitcode. Skip when it does not compile.

    level: of LEVELS; None: as the front end writes it, before any pass.
    """
    if unit.language == "rust":
        return _compile_rust(unit.source, level, vectorize)
    loops = () if vectorize else PLAIN_LOOPS["clang"]
    passes = [f"-{level}"] if level else ["-O1", "-Xclang", "-disable-llvm-passes"]
    language = "c++" if unit.language == "cpp" else "c"
    options = ["-x", language, "-w", *passes, "-c", "-emit-llvm", "-g0", *loops, "-o", "-", "-"]
    done = _run_tool("clang", options, unit.source)
    if done.returncode:
        raise Skip("does not compile")
    return done.stdout


def _compile_rust(source, level, vectorize):
    loops = () if vectorize else PLAIN_LOOPS["rustc"]
    passes = [f"opt-level={level[1:]}"] if level else ["opt-level=1", "-C", "no-prepopulate-passes"]
    # Overflow wraps, as the tests of C mean it.
    options = ["--crate-type=lib", "--emit=llvm-bc", "-A", "warnings", "-C", "debuginfo=0"]
    options += ["-C", "panic=abort", "-C", "overflow-checks=off", "-C", "codegen-units=1"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "unit.bc"
        options += ["-C", *passes, *loops, "-o", str(out), "-"]
        done = _run_tool("rustc", options, source)
        if done.returncode:
            raise Skip("does not compile")
        return out.read_bytes()


def plain_text(entry, bitcode, order=""):
    """The text of `entry` and what it needs; helpers that were inlined everywhere go.

    order: passes over each function, before.
    """
    passes = "internalize,globaldce"
    if order:
        passes = f"internalize,cgscc(inline),globaldce,function({order})"
    only = f"-internalize-public-api-list={entry}"
    done = _run_tool("opt", ["-S", "-discard-value-names", f"-passes={passes}", only], bitcode)
    text = done.stdout.decode(errors="replace")
    defined = re.search(rf"^define .*@{re.escape(entry)}\(", text, re.MULTILINE)
    if done.returncode or not defined:
        raise Skip("does not compile")
    return ir_mutations.strip(text)


def canonical(ir):
    """A text as the compiler would have left it, without dead, foldable or unusual code.

    None when it is no valid IR. `icmp sle i32 %1, 5` becomes slt 6, a value that nobody reads goes.
    """
    done = _run_tool("opt", ["-S", f"-passes={CANONICAL}"], ir)
    if done.returncode:
        return None
    text = ir_mutations.strip(done.stdout.decode(errors="replace"))
    return ir_mutations.renumber(ir_mutations.without_names(text))


def verifies(ir):
    """Whether a text is valid IR."""
    return _run_tool("opt", ["-passes=verify", "-disable-output"], ir).returncode == 0


def _run_tool(name, options, given=b""):
    """given: text or bytes of its standard input."""
    return subprocess.run(
        [tool(name), *options],
        input=given.encode() if isinstance(given, str) else given,
        capture_output=True,
        timeout=TOOL_SECONDS,
    )


def tool(name):
    """Path of clang, opt or rustc. ValueError says what to install."""
    language = load_language("rust" if name == "rustc" else "llvm-ir")
    if sentence := language.missing():
        raise ValueError(f"the IR groups need clang and LLVM's tools: {sentence}")
    return find_program(name, tuple(language.programs[name]))
