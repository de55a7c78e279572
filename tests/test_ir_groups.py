"""Groups of LLVM IR: what wins names no level, what loses differs in a real run."""

import json
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sandbox import Pool
from sandbox.languages import load_language
from tasks import c_functions, ir_groups, ir_marks, ir_mutations
from tasks.data import find_data
from tasks.ir_exclusions import BENCHMARK, HELD_OUT, Exclusions

needs_clang = pytest.mark.skipif(
    load_language("llvm-ir").missing() is not None, reason="clang and llvm are not installed"
)

# The loop is worded unlike translation's held-out problems: 13 words in a row would leave it out.
LOOP = """
static int twice(int x) { return 2 * x; }
int total(int values[], int length) {
    int sum = 0;
    for (int place = 0; place < length; place++) {
        if (values[place] > 3) sum += twice(values[place]); else sum -= place;
    }
    return sum;
}
"""
PLAIN = """
int same(int x) { return x + 1; }
void nothing(int values[], int n) { }
"""
BAD = """
int broken(int x) { return y; }
struct s { int x; };
int odd(struct s *x) { return x->x; }
"""
NAMES_A_LEVEL = ("optsize", "minsize", "optnone", "!", "#0", "target", "attributes", ";")


@pytest.fixture(scope="module")
def winners():
    return ir_groups.levels(c_functions.Unit("loop", LOOP, "total"))


@needs_clang
def test_winners_name_no_level(winners):
    assert len(winners) >= 2
    levels = [level for winner in winners for level in winner["level"].split(",")]
    assert sorted(levels) == ["O1", "O2", "O3", "Os", "Oz"]
    for winner in winners:
        assert not any(word in winner["ir"] for word in NAMES_A_LEVEL)
        assert ir_groups.verifies(winner["ir"])
        assert ir_mutations.renumber(winner["ir"]) == winner["ir"]


@needs_clang
@pytest.mark.parametrize("kind", ir_mutations.KINDS)
def test_edits_are_numbered_like_llvm(winners, kind):
    """A gap in the numbers would not verify."""
    rng = random.Random(0)
    for winner in winners:
        texts = {ir_mutations.mutate(rng, winner["ir"], ir_mutations.KINDS[kind]) for _ in range(8)}
        texts.discard(None)
        assert texts
        assert winner["ir"] not in texts
        assert not any("%n" in text for text in texts if ir_groups.verifies(text))


@needs_clang
@pytest.mark.parametrize("kind", ir_mutations.KEEPING)
def test_edits_that_keep_the_meaning_verify(winners, kind):
    rng = random.Random(0)
    edit = ir_mutations.KEEPING[kind]
    texts = {ir_mutations.mutate(rng, w["ir"], edit) for w in winners for _ in range(4)}
    texts.discard(None)
    assert texts
    assert all(ir_groups.verifies(text) for text in texts)


# ---- nothing but the meaning tells a loser ----

MARKED = {
    "dead": "  %2 = mul i32 %0, 3\n  ret i32 %0",
    "named": "  %.not = mul i32 %0, 3\n  ret i32 %.not",
    "cast_back": "  %2 = trunc i32 %0 to i8\n  %3 = sext i8 %2 to i32\n  ret i32 %3",
    "foldable": "  %2 = add i32 %0, 0\n  ret i32 %2",
}


def function(body, name="f"):
    return f"define i32 @{name}(i32 %0) {{\n{body}\n}}\n"


@pytest.mark.parametrize("mark", MARKED)
def test_a_mark_is_told(mark):
    assert ir_marks.marks(function(MARKED[mark])) == {mark: 1}
    assert ir_marks.marks(function("  %2 = mul i32 %0, 3\n  ret i32 %2")) == {}


@pytest.mark.parametrize(
    "line",
    [
        "%2 = add i32 2, 3",
        "%2 = mul i32 %0, 1",
        "%2 = sub nsw i32 %0, %0",
        "%2 = shl i32 %0, 0",
        "%2 = icmp slt i32 2, 3",
        "%2 = icmp eq i32 %0, %0",
        "%2 = and i32 %0, 0",
        "%2 = select i1 true, i32 %0, i32 3",
    ],
)
def test_what_is_left_to_fold_is_a_mark(line):
    kind = "i1" if "icmp" in line else "i32"
    assert ir_marks.marks(function(f"  {line}\n  ret {kind} %2"))["foldable"] == 1


def test_a_declaration_that_nobody_calls_is_a_mark():
    """A dropped call leaves it behind."""
    declared = "declare i32 @abs(i32)\n\n"
    called = function("  %2 = call i32 @abs(i32 %0)\n  ret i32 %2")
    assert ir_marks.marks(declared + called) == {}
    assert ir_marks.marks(declared + function("  ret i32 %0")) == {"unused": 1}


def test_a_mark_that_a_winner_has_tells_nothing():
    cut = {"kind": "drop", "ir": function(MARKED["cast_back"])}
    plain = {"ir": function("  ret i32 %0")}
    assert ir_marks.telling([plain], [cut]) == ["drop"]
    assert ir_marks.telling([plain, cut], [cut]) == []


@needs_clang
def test_the_canonical_form_has_no_mark_and_is_written_as_a_compiler_writes():
    """x <= 5 is x < 6; a dead value, a name and an uncalled declaration go."""
    text = """declare void @g(i32)
define i1 @f(i32 %0) {
  %.dead = mul i32 %0, 7
  %2 = icmp sle i32 %0, 5
  ret i1 %2
}
"""
    assert ir_groups.canonical(text) == (
        "define i1 @f(i32 %0) {\n  %2 = icmp slt i32 %0, 6\n  ret i1 %2\n}\n"
    )
    assert ir_groups.canonical("define i32 @f() { ret i64 0 }") is None


def test_names_become_numbers():
    text = function("  br label %._end\n\n._end:\n  %.not = add i32 %0, 1\n  ret i32 %.not")
    assert ir_mutations.renumber(ir_mutations.without_names(text)) == function(
        "  br label %2\n\n2:\n  %3 = add i32 %0, 1\n  ret i32 %3"
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The groups of three C files with five functions."""
    folder = tmp_path_factory.mktemp("c")
    (folder / "bad.c").write_text(BAD)
    (folder / "good.c").write_text(LOOP)
    (folder / "plain.c").write_text(PLAIN)
    out, said = folder / "groups.jsonl", []
    totals = ir_groups.build([str(folder)], out, workers=1, report=said.append)
    loop, single = map(json.loads, out.read_text().splitlines())
    return SimpleNamespace(
        folder=folder, out=out, said=said, totals=totals, loop=loop, single=single
    )


@needs_clang
def test_a_build_counts_groups_and_reasons(built):
    assert built.loop["id"].endswith("good.c:total:c")
    assert len(built.loop["winners"]) >= 2
    assert len(built.loop["losers"]) >= 4
    # x + 1 is the same at every level
    assert [winner["level"] for winner in built.single["winners"]] == ["Oz,Os,O1,O2,O3"]

    assert built.totals["groups"] == 2
    assert built.totals["one_winner"] == 1
    assert built.totals["skipped"] == {
        "does not compile": 1,  # broken
        "unsupported signature": 1,  # odd
        "no edit differs": 1,  # nothing
    }
    assert "skipped, does not compile: 1" in built.said
    assert any("1 of them have one winner only" in sentence for sentence in built.said)


@needs_clang
def test_losers_verify_and_differ_in_a_run(built):
    row = built.loop
    unit = c_functions.Unit(row["family"], row["source"], row["entry"])
    main_c, tests = c_functions.driver(unit)
    with Pool(workers=1) as pool:
        runner = ir_groups.Runner(pool, main_c)
        expected = runner.outputs([winner["ir"] for winner in row["winners"]])
        outputs = runner.outputs([loser["ir"] for loser in row["losers"]])

    assert len(set(expected)) == 1
    right = expected[0].splitlines()
    assert len(right) == tests
    for loser, output in zip(row["losers"], outputs):
        different = sum(line != wanted for line, wanted in zip(output.splitlines(), right))
        assert different == loser["differs"] > 0
        assert ir_groups.verifies(loser["ir"])
    for loser in row["cheap"]:
        assert loser["valid"] is ir_groups.verifies(loser["ir"])


@needs_clang
def test_real_losers_have_no_mark_of_their_own(built):
    """Before, 150 of 671 losers of 94 GeeksforGeeks groups had one (22 %): 53 of 86 `operand`."""
    for row in (built.loop, built.single):
        assert ir_marks.telling(row["winners"], row["losers"]) == []
        for member in row["winners"] + row["losers"]:
            assert ir_groups.canonical(member["ir"]) == member["ir"]
    assert built.totals["marked"] == 0


@needs_clang
def test_a_loser_with_a_mark_of_its_own_is_dropped(monkeypatch):
    """Without the canonical form edits leave dead values and the like behind."""
    monkeypatch.setattr(ir_groups, "canonical", str)
    with Pool(workers=1) as pool:
        unit = c_functions.Unit("loop", LOOP, "total")
        row = ir_groups.group(unit, pool, ir_groups.Build())
    assert sum(outcomes.get("marked", 0) for outcomes in row["tried"].values()) > 0
    assert ir_marks.telling(row["winners"], row["losers"]) == []


@needs_clang
def test_a_build_finds_groups_of_ten_and_twenty(tmp_path):
    """Levels, orders of passes, edits that keep the meaning: all print what the levels print."""
    unit = c_functions.Unit("loop", LOOP, "total")
    with Pool(workers=1) as pool:
        row = ir_groups.group(unit, pool, ir_groups.Build(winners=10, losers=20))
        outputs = ir_groups.Runner(pool, c_functions.driver(unit)[0]).outputs(
            [winner["ir"] for winner in row["winners"]]
        )
    assert len(row["winners"]) == len({winner["ir"] for winner in row["winners"]}) == 10
    assert len(set(outputs)) == 1 and outputs[0] is not None
    assert len(row["losers"]) == 20
    sources = {winner["level"] for winner in row["winners"]}
    assert sources & ir_groups.ORDERS.keys() and sources & ir_mutations.KEEPING.keys()


def test_a_build_says_which_passes_and_edits_gave_winners(tmp_path):
    """Two of the three winners are of passes and edits; a loser is of a swap."""
    winners = [{"level": level, "ir": level} for level in ("O1,O2", "mem2reg", "commute")]
    row = {"id": "f", "winners": winners, "losers": [{"kind": "swap", "ir": "x"}], "cheap": []}
    row["tried"] = {"mem2reg": {"same": 1}, "commute": {"same": 2}, "swap": {"differs": 1}}
    (tmp_path / "groups.jsonl").write_text(json.dumps(row) + "\n")
    said = []
    ir_groups._report_totals(tmp_path / "groups.jsonl", tmp_path / "none", 1.0, said.append)
    assert {"mem2reg: kept 1; tried same 1", "commute: kept 1; tried same 2"} <= set(said)
    assert "swap: kept 1; tried differs 1" in said


ROW = {
    "name": "TIMES",
    "c_unit": "int f_gold ( int a [ ], int n ) { int s = 0; while (n--) s += a[n]; return s; }",
    "functions": {
        "cpp": "int f_gold ( int a [ ], int n ) { int s = 0; while (n--) s += a[n]; return s; }",
        "rust": "fn f_gold() {}",
    },
    "files": {
        "rust": "#![feature(main)]\n// tests\npub unsafe fn f_gold(mut a: *mut i32, mut n: i32)\n"
        " -> i32 {\n let mut s = 0;\n while n > 0 { n -= 1; s += *a.offset(n as isize) }\n"
        " return s;\n}\n//TOFILL\nfn main() {}\n"
    },
    "io_tests": [{"args": [[3, 4, 5], 3]}, {"args": [[2, 9], 2]}, {"args": [[1], 0]}],
}
needs_rust = pytest.mark.skipif(
    load_language("rust").missing() is not None, reason="rustc is not installed"
)


@pytest.fixture
def three_languages(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


def test_one_function_in_three_languages_has_one_signature_and_one_family(three_languages):
    units = c_functions.read_units([three_languages], ("c", "cpp", "rust"))
    assert [unit.language for unit in units] == ["c", "cpp", "rust"]
    assert {unit.family for unit in units} == {"gfg/TIMES"}
    assert len({unit.id for unit in units}) == 3
    forms = [c_functions.signature(unit) for unit in units]
    assert forms[0] == forms[1] == forms[2]
    assert forms[0].result == "int"
    assert [unit.language for unit in c_functions.read_units([three_languages])] == ["c"]


@needs_clang
@pytest.mark.parametrize("language", ["c", "cpp", pytest.param("rust", marks=needs_rust)])
def test_groups_come_from_c_cpp_and_rust(three_languages, language):
    (unit,) = c_functions.read_units([three_languages], (language,))
    with Pool(workers=1) as pool:
        row = ir_groups.group(unit, pool, ir_groups.Build(winners=3, losers=4))
    assert row["language"] == language
    assert len(row["winners"]) >= 2 and len(row["losers"]) == 4
    for winner in row["winners"]:
        assert "@f_gold(" in winner["ir"]  # no mangled name
        assert not any(word in winner["ir"] for word in NAMES_A_LEVEL)


@needs_clang
@pytest.mark.parametrize(
    "script,sentence",
    [
        (None, "rust is left out: RARECODE_RUSTC="),
        ("#!/bin/sh\necho LLVM version: 99.1.0\n", "rust is left out: rustc writes LLVM 99, opt"),
    ],
)
def test_rust_is_left_out_by_name_where_its_compiler_does_not_serve(monkeypatch, script, sentence):
    said = []
    # Not under /root or /tmp/pytest-of-*: the sandbox's user must be able to start it.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        rustc = Path(folder) / "rustc"
        if script:
            rustc.write_text(script)
            rustc.chmod(0o755)
        monkeypatch.setenv("RARECODE_RUSTC", str(rustc))
        ir_groups.find_program.cache_clear()
        try:
            assert ir_groups.compilable(("c", "rust"), said.append) == ("c",)
        finally:
            monkeypatch.undo()
            ir_groups.find_program.cache_clear()
    assert said[0].startswith(sentence)


@needs_clang
def test_an_order_of_passes_that_llvm_does_not_know_costs_no_group(monkeypatch):
    monkeypatch.setitem(ir_groups.ORDERS, "mem2reg", "no-such-pass")
    unit = c_functions.Unit("loop", LOOP, "total")
    tried = {}
    with Pool(workers=1) as pool:
        right = ir_groups.levels(unit)
        runner = ir_groups.Runner(pool, c_functions.driver(unit)[0])
        (expected,) = runner.outputs([right[0]["ir"]])
        ir_groups.more_winners(unit, right, expected, runner, random.Random(0), 1, tried)
    assert tried["mem2reg"] == {"invalid": 1}


needs_data = pytest.mark.skipif(
    find_data("transcoder_gfg/gfg.jsonl") is None, reason="no data folder: set RARECODE_DATA"
)


@needs_clang
@needs_data
@pytest.mark.slow
def test_a_build_leaves_out_what_translation_holds_out(tmp_path):
    """One of the first six GeeksforGeeks functions."""
    source = find_data("transcoder_gfg/gfg.jsonl")
    out = tmp_path / "groups.jsonl"
    totals = ir_groups.build([source], out, workers=1, limit=6, report=str)
    exclusions = Exclusions()
    for row in map(json.loads, out.read_text().splitlines()):
        assert not exclusions.reason(row["family"], row["entry"], row["source"])
    assert totals["skipped"][HELD_OUT] + totals["skipped"].get(BENCHMARK, 0) >= 1
    assert totals["marked"] == 0


@needs_clang
def test_a_killed_build_goes_on_and_does_nothing_twice(built):
    whole = built.out.read_text()
    built.out.write_text(whole + '{"id": "half')
    said = []
    ir_groups.build([str(built.folder)], built.out, workers=1, report=said.append)
    assert built.out.read_text() == whole
    assert "5 functions, 5 done before" in said


def test_bad_sources_have_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no C function in"):
        c_functions.read_units([tmp_path])
    with pytest.raises(ValueError, match="does not exist"):
        c_functions.read_units([tmp_path / "gone.c"])


def test_a_missing_compiler_has_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("RARECODE_CLANG", str(tmp_path / "clang"))
    ir_groups.find_program.cache_clear()
    try:
        with pytest.raises(ValueError, match="need clang and LLVM's tools: RARECODE_CLANG"):
            ir_groups.build([tmp_path], tmp_path / "out.jsonl")
    finally:
        monkeypatch.undo()
        ir_groups.find_program.cache_clear()
