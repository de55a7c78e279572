"""Groups of LLVM IR for GEPO: winners and losers of one C function.

    python gepo.py build --src ../shared/data/transcoder_gfg/gfg.jsonl.gz --out groups.jsonl

Winners are the function's optimisation levels, losers are edits that a run shows to differ. A row:

    {"id", "c", "entry", "tests",
     "winners": [{"level", "ir"}],
     "losers":  [{"kind", "from", "ir", "differs", "tests"}],
     "cheap":   [{"kind", "from", "ir", "valid"}],
     "tried":   {kind: {outcome: count}}}

clang and opt run here, what they compile runs in the sandbox, in LLVM's JIT (lli). A C function
that gives no group is a row of FILE.skipped with its reason. Both files are appended to function by
function, so that a killed build goes on where it was.
"""

import json
import random
import re
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox import Job, Limits, Pool
from sandbox.languages import find_program, load_language
from tasks import ir_mutations
from tasks.c_functions import Skip, driver, read_units

LEVELS = ("Oz", "O1", "O2", "O3")
# Vectorised and unrolled loops are three to five times as long and say nothing new about what a
# function computes.
PLAIN_LOOPS = ("-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops")
TRIES = 3  # edits of each kind that are run for one function
CHEAP_TRIES = 2  # edits of each cheap kind, which nobody runs
LOSERS = 8  # kept of those that were run, spread over the kinds
# A right one takes 0.03 s of processor time; an edit that loops for ever takes all of it.
LIMITS = Limits(cpu=0.15, wall=5.0)
TOOL_SECONDS = 60


# ---- the whole build ----


def build(sources, out, workers=None, limit=None, vectorize=False, seed=0, report=print):
    """Write the groups of all C functions of `sources` to `out` -> totals, reported as sentences.

    Functions that `out` or its .skipped file already has are not done again.
    """
    out = Path(out)
    skipped = out.with_name(out.name + ".skipped")
    tool("clang")  # its absence is known before anything is written
    units = read_units(sources)[:limit]
    done = {row["id"] for file in (out, skipped) for row in _whole_rows(file)}
    waiting = [unit for unit in units if unit.id not in done]
    report(f"{len(units)} C functions, {len(units) - len(waiting)} done before")

    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        Pool(workers=workers) as pool,
        ThreadPoolExecutor((workers or 2) + 1) as threads,
        open(out, "a") as groups,
        open(skipped, "a") as reasons,
    ):
        rows = threads.map(lambda unit: _row(unit, pool, vectorize, seed), waiting)
        for count, row in enumerate(rows, 1):
            file = reasons if "reason" in row else groups
            file.write(json.dumps(row) + "\n")
            file.flush()
            if count % 50 == 0:
                seconds = time.perf_counter() - started
                report(f"{count} of {len(waiting)} functions, {seconds:.0f} s")
    return _report_totals(out, skipped, time.perf_counter() - started, report)


def _row(unit, pool, vectorize, seed):
    """A function's group, or the reason why there is none."""
    try:
        return group(unit, pool, vectorize, seed)
    except Skip as reason:
        return {"id": unit.id, "reason": str(reason)}
    except subprocess.TimeoutExpired:
        return {"id": unit.id, "reason": f"clang or opt took more than {TOOL_SECONDS} s"}


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
    kept, cheap, valid, tried = Counter(), Counter(), Counter(), {}
    for row in groups:
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
    for reason, count in reasons.most_common():
        report(f"skipped, {reason}: {count}")
    for kind in sorted(tried):
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in tried[kind].most_common())
        report(f"{kind}: kept {kept[kind]}; tried {outcomes}")
    for kind in sorted(cheap):
        report(f"{kind}: {cheap[kind]}, of them {valid[kind]} valid IR")
    return {
        "groups": len(groups),
        "skipped": dict(reasons),
        "kept": dict(kept),
        "one_winner": sizes[1],
        "seconds": seconds,
    }


# ---- one group ----


def group(unit, pool, vectorize=False, seed=0):
    """One row of the groups file. Skip with the reason when there is no group in the function."""
    main_c, tests = driver(unit, seed)
    right = winners(unit, vectorize)
    runner = Runner(pool, main_c)
    outputs = runner.outputs([winner["ir"] for winner in right])
    if None in outputs:
        raise Skip("winner does not run")
    if len(set(outputs)) > 1:
        raise Skip("winners disagree")

    rng = random.Random(f"{seed}/{unit.id}/edits")
    losers, tried = verified_losers(right, outputs[0], runner, rng)
    if not losers:
        raise Skip("no edit differs")
    return {
        "id": unit.id,
        "c": unit.c,
        "entry": unit.entry,
        "tests": tests,
        "winners": right,
        "losers": losers,
        "cheap": cheap_losers(right, rng),
        "tried": tried,
    }


def winners(unit, vectorize=False):
    """[{"level", "ir"}], one for each distinct text.

    A text that several levels share carries all their names ("O2,O3").
    """
    levels = {}
    for level in LEVELS:
        module = keep_only(unit.entry, compile_c(unit.c, level, vectorize))
        text = ir_mutations.renumber(ir_mutations.strip(module))
        levels.setdefault(text, []).append(level)
    return [{"level": ",".join(names), "ir": text} for text, names in levels.items()]


def verified_losers(right, expected, runner, rng):
    """(losers, {kind: {outcome: count}}): edits whose runs show that they differ.

    They verify, run to their end and print something else than the winners (`expected`) on some
    input. At most LOSERS of them.
    """
    candidates = edits(right, ir_mutations.KINDS, TRIES, rng)
    outputs = runner.outputs([loser["ir"] for loser in candidates])
    wanted = expected.splitlines()
    tried, kept = {}, []
    for loser, output in zip(candidates, outputs):
        outcome = _outcome(loser, output, expected)
        tried.setdefault(loser["kind"], Counter())[outcome] += 1
        if outcome == "differs":
            pairs = zip(output.splitlines(), wanted)
            differs = sum(line != right_line for line, right_line in pairs)
            kept.append(loser | {"differs": differs, "tests": len(wanted)})
    rng.shuffle(kept)
    return _round_robin(kept)[:LOSERS], tried


def _outcome(loser, output, expected):
    if output is None:
        return "does not run"
    if output == expected:
        return "same"
    return "differs" if verifies(loser["ir"]) else "invalid"


def _round_robin(losers):
    """The first of each kind, then the second of each, and so on."""
    turns, seen = [], Counter()
    for loser in losers:
        turns.append(seen[loser["kind"]])
        seen[loser["kind"]] += 1
    order = sorted(range(len(losers)), key=turns.__getitem__)
    return [losers[index] for index in order]


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
        self.main = compile_c(main_c, "O0")
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


# ---- clang and opt ----


def compile_c(text, level, vectorize=False):
    """C text -> LLVM IR as clang prints it. Skip when it does not compile."""
    loops = () if vectorize else PLAIN_LOOPS
    options = ["-x", "c", "-w", f"-{level}", "-S", "-emit-llvm", "-g0", *loops, "-o", "-", "-"]
    done = _run_tool("clang", options, text)
    if done.returncode:
        raise Skip("does not compile")
    return done.stdout


def keep_only(entry, ir):
    """The module with `entry` and what it needs; helpers that were inlined everywhere go."""
    passes = ["-passes=internalize,globaldce", f"-internalize-public-api-list={entry}"]
    done = _run_tool("opt", ["-S", *passes], ir)
    defined = re.search(rf"^define .*@{re.escape(entry)}\(", done.stdout, re.MULTILINE)
    if done.returncode or not defined:
        raise Skip("does not compile")
    return done.stdout


def verifies(ir):
    """Whether a text is valid IR."""
    return _run_tool("opt", ["-passes=verify", "-disable-output"], ir).returncode == 0


def _run_tool(name, options, text):
    return subprocess.run(
        [tool(name), *options],
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TOOL_SECONDS,
    )


def tool(name):
    """Path of clang or opt. ValueError says what to install."""
    language = load_language("llvm-ir")
    if sentence := language.missing():
        raise ValueError(f"the IR groups need clang and LLVM's tools: {sentence}")
    return find_program(name, tuple(language.programs[name]))
