"""Groups of LLVM IR: what wins names no level, what loses differs in a real run."""

import json
import random
from types import SimpleNamespace

import pytest

from sandbox import Pool
from sandbox.languages import load_language
from tasks import c_functions, ir_groups, ir_mutations

needs_clang = pytest.mark.skipif(
    load_language("llvm-ir").missing() is not None, reason="clang and llvm are not installed"
)

LOOP = """
static int twice(int x) { return 2 * x; }
int total(int values[], int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) { if (values[i] > 3) sum += twice(values[i]); else sum -= i; }
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
    return ir_groups.winners(c_functions.Unit("loop", LOOP, "total", None))


@needs_clang
def test_winners_name_no_level(winners):
    assert len(winners) >= 2
    levels = [level for winner in winners for level in winner["level"].split(",")]
    assert sorted(levels) == ["O1", "O2", "O3", "Oz"]
    for winner in winners:
        assert not any(word in winner["ir"] for word in NAMES_A_LEVEL)
        assert ir_groups.verifies(winner["ir"])
        assert ir_mutations.renumber(winner["ir"]) == winner["ir"]


@needs_clang
@pytest.mark.parametrize("kind", ir_mutations.KINDS)
def test_edits_are_numbered_like_llvm(winners, kind):
    """A gap in the numbers would not verify, and no mark of the edit is left."""
    rng = random.Random(0)
    for winner in winners:
        texts = {ir_mutations.mutate(rng, winner["ir"], ir_mutations.KINDS[kind]) for _ in range(8)}
        texts.discard(None)
        assert texts
        assert winner["ir"] not in texts
        assert not any("%n" in text for text in texts if ir_groups.verifies(text))


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
    assert built.loop["id"].endswith("good.c:total")
    assert len(built.loop["winners"]) >= 2
    assert len(built.loop["losers"]) >= 4
    # x + 1 is the same at every level
    assert [winner["level"] for winner in built.single["winners"]] == ["Oz,O1,O2,O3"]

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
    unit = c_functions.Unit(row["id"], row["c"], row["entry"], None)
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
def test_a_killed_build_goes_on_and_does_nothing_twice(built):
    whole = built.out.read_text()
    built.out.write_text(whole + '{"id": "half')
    said = []
    ir_groups.build([str(built.folder)], built.out, workers=1, report=said.append)
    assert built.out.read_text() == whole
    assert "5 C functions, 5 done before" in said


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
