"""Figures of an evaluation: pass@k, intervals, and two sides of one or several runs compared."""

import json
import random
from types import SimpleNamespace

import pytest

import eval as evaluation
from sandbox.languages import load_language
from tasks.statistics import (
    changes,
    compare,
    figure_rows,
    interval,
    p_text,
    pass_at_k,
    rate_with_interval,
    side_by_side,
    sign_test,
    summary,
)

# ---- pass@k and its interval ----


def test_targets_have_their_own_rates():
    rows = []
    for id, target, correct in (("a", "lua", True), ("b", "lua", False), ("c", "racket", True)):
        row = {"id": id, "sample": 0, "correct": correct, "status": "ok", "target": target}
        flags = {"format_ok": True, "constant": False, "leaked": False, "program": "p"}
        rows.append(row | flags | {"tokens": 3, "finish_reason": "stop"})
    found = summary(rows)
    assert (found["pass@1/lua"], found["pass@1/racket"]) == (0.5, 1.0)
    assert found["pass@1"] == pytest.approx(2 / 3)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(5, 5, 3) == 1.0
    assert pass_at_k(5, 0, 3) == 0.0


def test_pass_at_k_is_unbiased():
    rng = random.Random(0)
    outcomes = [True] * 3 + [False] * 7
    draws = 20_000
    hits = sum(any(rng.sample(outcomes, 4)) for _ in range(draws))
    assert pass_at_k(10, 3, 4) == pytest.approx(hits / draws, abs=0.01)


def test_interval_is_wilsons():
    # p = 0.75, n = 4
    assert interval([1, 0, 1, 1]) == pytest.approx((0.301, 0.954), abs=1e-3)
    # No success in 10: the lower end is 0, the upper one is not.
    low, high = interval([0.0] * 10)
    assert low == 0.0
    assert high == pytest.approx(0.278, abs=1e-3)


def test_interval_holds_the_mean_of_problems_with_several_samples():
    """40 problems of 4 samples each with their own difficulty, whose mean is 0.5 / 2 = 0.25."""
    rng = random.Random(1)
    inside = 0
    for _ in range(300):
        difficulties = [rng.betavariate(0.5, 1.5) for _ in range(40)]
        rates = [sum(rng.random() < d for _ in range(4)) / 4 for d in difficulties]
        low, high = interval(rates)
        inside += low <= 0.25 <= high
    assert 0.90 <= inside / 300 <= 0.99  # of 95 %


def rows_of(outcomes):
    """samples.jsonl of {problem id: outcome of each sample}; None: the sandbox could not judge."""
    found = []
    for id, corrects in outcomes.items():
        for sample, correct in enumerate(corrects):
            row = {
                "id": id,
                "sample": sample,
                "correct": bool(correct),
                "status": "sandbox_error" if correct is None else "ok",
                "program": f"{id}{sample}",
                "tokens": 10,
                "finish_reason": "stop",
                "format_ok": True,
                "constant": False,
                "leaked": False,
            }
            found.append(row)
    return found


def test_summary_by_hand():
    outcomes = {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1], "d": [None] * 4}
    found = summary(rows_of(outcomes))
    assert found["pass@1"] == 0.5  # of a, b and c: (1/2 + 0 + 1) / 3
    assert found["pass@2"] == pytest.approx((1 - 1 / 6 + 0 + 1) / 3)
    assert found["pass@4"] == pytest.approx(2 / 3)
    assert found["any_of_n"] == pytest.approx(2 / 3)
    assert found["all_of_n"] == pytest.approx(1 / 3)
    assert found["sandbox/sandbox_error_frac"] == 0.25  # d


def names_of(outcomes):
    """The pass@k that a summary has, without their intervals."""
    return [
        name for name in summary(rows_of(outcomes)) if name.startswith("pass@") and "_" not in name
    ]


def test_pass_at_k_only_where_so_many_samples_were_judged():
    """No pass@4 of one sample, none of a problem of which one sample in four was not judged."""
    assert names_of({"a": [1], "b": [0]}) == ["pass@1"]
    assert names_of({"a": [1, 0, 0, 0], "b": [0, 1, 0, None]}) == ["pass@1", "pass@2"]
    assert "any_of_n" not in summary(rows_of({"a": [1, 0], "b": [None, 0]}))


def test_pass_at_k_of_powers_of_two_and_of_10_and_of_all_samples():
    sixteen = ["pass@1", "pass@2", "pass@4", "pass@8", "pass@10", "pass@16"]
    assert names_of({"a": [1] * 16}) == sixteen
    assert names_of({"a": [1] * 20}) == [*sixteen, "pass@20"]
    assert names_of({"a": [1] * 3}) == ["pass@1", "pass@2", "pass@3"]
    assert names_of({"a": [1] * 12}) == [*sixteen[:5], "pass@12"]


def test_pass_at_10_by_hand():
    # 3 of 12 right: 1 - C(9, 10) / C(12, 10) = 1; 1 of 12: 1 - C(11, 10) / C(12, 10) = 1 - 11/66.
    found = summary(rows_of({"a": [1] * 3 + [0] * 9, "b": [1] + [0] * 11}))
    assert found["pass@10"] == pytest.approx((1 + 5 / 6) / 2)


def test_evalplus_has_figures_of_its_base_tests():
    rows = rows_of({"a": [1], "b": [0], "c": [0]})
    for row, base in zip(rows, (True, True, False)):
        row["base"] = base
    found = summary(rows)
    assert found["pass@1"] == pytest.approx(1 / 3)
    assert found["base/pass@1"] == pytest.approx(2 / 3)


def test_nothing_judged_has_no_figures():
    with pytest.raises(ValueError, match="nothing could be judged"):
        summary(rows_of({"a": [None]}))


# ---- what was not judged is not wrong ----


def test_a_rate_leaves_out_what_was_not_judged():
    """Of four samples one is right, one could not be judged: (1/2 + 0) / 2 over problems."""
    rate, low, high = rate_with_interval(rows_of({"a": [1, 0], "b": [0, None]}))
    assert rate == 0.25
    assert low < 0.25 < high
    assert rate_with_interval(rows_of({"a": [None]})) is None


def test_pass_at_n_is_of_problems_whose_n_samples_were_all_judged():
    """Of a, b, c any of two: yes, no, not known."""
    found = figure_rows(rows_of({"a": [1, 0], "b": [0, 0], "c": [1, None]}))
    assert list(found) == ["pass@1", "pass@2"]
    assert {row["id"]: row["correct"] for row in found["pass@2"]} == {"a": True, "b": False}
    assert list(figure_rows(rows_of({"a": [1]}))) == ["pass@1"]


def test_gained_is_what_was_wrong_before(capsys):
    before = rows_of({"wrong": [0], "unknown": [None], "right": [1]})
    after = rows_of({"wrong": [1], "unknown": [1], "right": [1]})
    for row in before + after:
        row |= {"question": "?", "value": "1"}
    evaluation.print_gained(before, after)
    shown = capsys.readouterr().out
    assert "--- wrong" in shown
    assert "--- unknown" not in shown and "--- right" not in shown


def test_several_languages_have_their_mean(capsys):
    """MultiPL-E's average over languages, not over problems: (0.5 + 0.25) / 2."""
    cells = [SimpleNamespace(source="", language=load_language(name)) for name in ("lua", "racket")]
    means = evaluation.print_matrix("humaneval", cells, [{"pass@1": 0.5}, {"pass@1": 0.25}])
    assert means == {"all": 0.375}
    head, row = capsys.readouterr().out.split("\n")[1:3]
    assert head.split() == ["pass@1", "humaneval", "lua", "racket", "mean"]
    assert row.split() == ["all", "0.5000", "0.2500", "0.3750"]


def test_a_log_file_has_a_line_for_every_tenth_of_the_problems(tmp_path, capsys):
    with open(tmp_path / "partial.jsonl", "w") as file:
        bar = evaluation.Progress("gsm8k lua", file, 40, done={})
        for number in range(40):
            bar([{"correct": number % 4 == 0}])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert "40/40  first sample right 0.250" in lines[-1]


# ---- two sides ----


def write_run(folder, outcomes):
    """An evaluation's folder with rows_of(outcomes); its path."""
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in rows_of(outcomes)]
    (folder / "samples.jsonl").write_text("".join(lines))
    return str(folder)


def compared(capsys, side_a, side_b):
    """What --compare prints, and its last line as JSON."""
    evaluation.main(["--compare", side_a, side_b])
    text = capsys.readouterr().out
    return text, json.loads(text.strip().splitlines()[-1])


def test_comparison_is_paired(tmp_path, capsys):
    """Of 40 problems every other one is right in A; B is right on the first 10 as well."""
    a = {f"p{n}": [n % 2] for n in range(40)}
    b = a | {f"p{n}": [1] for n in range(10)} | {"only": [1]}
    sides = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    text, found = compared(capsys, *sides)
    assert (found["gained"], found["lost"], found["unchanged"], found["only_in_b"]) == (5, 0, 35, 1)
    assert found["difference"] == 0.125  # 5 of 40
    assert 0 < found["difference_low"] < 0.125 < found["difference_high"]
    assert found["p"] == pytest.approx(2 / 2**5, abs=0.01)  # five signs alike, up or down
    assert "run 1" not in text and "spread" not in text


def test_p_is_never_0(tmp_path, capsys):
    """All 40 of 40 gained: 2 / 2**40, of which 10,000 draws can only say that it is small."""
    none = {f"p{n}": [0] for n in range(40)}
    every = {f"p{n}": [1] for n in range(40)}
    sides = write_run(tmp_path / "a", none), write_run(tmp_path / "b", every)
    text, found = compared(capsys, *sides)
    assert "< 0.0002" in text
    assert 0 < found["p"] < 0.00021
    assert p_text(found["p"]) == "< 0.0002"
    assert p_text(0.0004) == "0.0004"


def test_few_problems_show_little():
    # Three gained, none lost: 2 / 2**3. However far apart, one problem alone says nothing.
    assert sign_test([1, 1, 1]) == pytest.approx(0.25, abs=0.02)
    assert sign_test([1]) == pytest.approx(1, abs=0.02)
    assert sign_test([0, 0]) == 1
    assert sign_test([0.5, -0.5]) == 1


def test_several_seeds_a_side(tmp_path, capsys):
    """Of 8 problems A's seeds pass 2, 4 and B's 5, 7: means 3/8 and 6/8, spread sqrt(2)/8 each."""
    passed = {"a0": 2, "a1": 4, "b0": 5, "b1": 7}
    paths = {}
    for name, count in passed.items():
        outcomes = {f"p{n}": [n < count] for n in range(8)}
        paths[name] = write_run(tmp_path / name, outcomes)
    text, found = compared(capsys, f"{paths['a0']},{paths['a1']}", f"{paths['b0']},{paths['b1']}")
    assert found["runs_a"] == [2 / 8, 4 / 8]
    assert found["runs_b"] == [5 / 8, 7 / 8]
    assert (found["pass@1_a"], found["pass@1_b"], found["difference"]) == (3 / 8, 6 / 8, 3 / 8)
    assert found["spread_a"] == pytest.approx(2**0.5 / 8)
    # p0, p1, p7 are alike; p2, p3 rise from 1/2 to 1, p4 from 0 to 1, p5, p6 from 0 to 1/2.
    assert (found["gained"], found["lost"], found["unchanged"]) == (5, 0, 3)
    assert "run 2" in text and "spread" in text


def test_sharpening_raises_pass_at_1_and_not_pass_at_n():
    """Two problems that are right once in four become right always; two stay wrong."""
    before = rows_of({"a": [1, 0, 0, 0], "b": [0, 1, 0, 0], "c": [0] * 4, "d": [0] * 4})
    after = rows_of({"a": [1] * 4, "b": [1] * 4, "c": [0] * 4, "d": [0] * 4})
    found = changes(before, after)
    assert found["pass@1"]["before"][0] == 0.125
    assert found["pass@1"]["after"][0] == 0.5
    assert found["pass@1"]["gain"][0] == 0.375
    assert (found["pass@1"]["gained"], found["pass@1"]["lost"]) == (2, 0)
    assert found["pass@4"]["before"][0] == found["pass@4"]["after"][0] == 0.5
    assert found["pass@4"]["gain"] == (0, 0, 0)
    assert changes(before, rows_of({"x": [1] * 4})) == {}
    assert list(changes(before, rows_of({"a": [1]}))) == ["pass@1"]  # no pass@4 after


def test_side_by_side_shows_samples_that_changed_as_the_problem_did():
    """a fell from 2/3 to 1/3: of its samples 0 and 2 rose or stayed, 1 is the first that fell."""
    before = rows_of({"a": [0, 1, 1], "b": [0], "c": [1], "only before": [1]})
    after = rows_of({"c": [None], "b": [0], "a": [1, 0, 0], "only after": [1]})
    a, b, c = side_by_side(before, after)
    assert (a.id, a.change, a.before["sample"], a.after["sample"]) == ("a", -1, 1, 1)
    assert (a.outcomes_before, a.outcomes_after) == ([False, True, True], [True, False, False])
    assert (b.change, b.before["id"], b.after["id"]) == (0, "b", "b")
    assert (c.change, c.outcomes_after) == (0, [])


def test_sides_may_have_different_numbers_of_runs():
    runs = [rows_of({"p": [1], "q": [1]}), rows_of({"p": [0], "q": [1]})]
    found = compare([rows_of({"p": [0], "q": [0]})], runs)
    assert found["difference"] == pytest.approx(0.75)  # p 1/2, q 1
    assert "spread_a" not in found
    assert found["spread_b"] == pytest.approx((0.5**2 / 2) ** 0.5)  # of 1 and 1/2


def test_compared_are_the_problems_that_all_runs_have_judged():
    runs_a = [rows_of({"p": [1], "q": [1]}), rows_of({"p": [1], "q": [None]})]
    found = compare(runs_a, [rows_of({"p": [0], "q": [0]})])
    assert (found["problems"], found["only_in_a"], found["only_in_b"]) == (1, 1, 1)


def test_the_interval_is_of_problems_not_of_samples():
    """The same run given as two seeds knows no more: the interval stays as wide."""
    a = rows_of({f"p{n}": [0] for n in range(20)})
    b = rows_of({f"p{n}": [n % 3 == 0] for n in range(20)})
    one, two = compare([a], [b]), compare([a, a], [b, b])
    for name in ("difference_low", "difference_high", "p"):
        assert one[name] == two[name]


def test_comparison_needs_evaluations_of_the_same_problems(tmp_path):
    with pytest.raises(ValueError, match="no problem in common"):
        compare([rows_of({"a": [1]})], [rows_of({"x": [1]})])
    with pytest.raises(ValueError, match="does not exist"):
        evaluation.main(["--compare", str(tmp_path), str(tmp_path / "nothing")])


def test_a_folder_counts_once_on_a_side(tmp_path):
    path = write_run(tmp_path / "a", {"p": [1]})
    with pytest.raises(ValueError, match="named twice"):
        evaluation.main(["--compare", f"{path},{path}/", path])
