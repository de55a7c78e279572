"""The validation slice: never trained on, never reported, alone decides what is best."""

import json
from types import SimpleNamespace

import pytest

import build
import eval as evaluation
import sft
import train
from runs import SMALL, needs_prolog, rows, whole_run
from sandbox.languages import load_language
from selfplay import loop as selfplay
from selfplay import triples
from settings import Settings
from tasks import translate
from tasks.data import hold_out
from tasks.problems import load_problems, program_messages
from tasks.translate_data import Translation

# ---- which problems ----


def test_hold_out_by_hand():
    """Of 40 problems, two of each letter of 20, at most 4, and both of a letter or none."""
    problems = [f"{letter}{n}" for letter in "abcdefghijklmnopqrst" for n in (1, 2)]
    rest, chosen = hold_out(problems, 3, family=lambda problem: problem[0])
    assert len(chosen) == 3
    assert not {problem[0] for problem in chosen} & {problem[0] for problem in rest}
    assert len(rest) == 36  # two letters are gone, one of their problems is not needed
    assert hold_out(problems, 100, family=str)[1] == hold_out(problems, 4, family=str)[1]
    assert hold_out(problems, 0, family=str) == (problems, [])
    assert hold_out(problems[:9], 5, family=str) == (problems[:9], [])


def test_a_part_of_a_split_holds_out_what_the_whole_does():
    """So that a warm start on some rows has not seen the validation problems of the run."""
    whole = [str(n) for n in range(1000)]
    _, chosen = hold_out(whole, 50, family=str)
    part_rest, _ = hold_out(whole[::2], 50, family=str)
    assert not set(part_rest) & set(chosen)
    assert hold_out(whole[::-1], 50, family=str)[1] == chosen  # whatever the order


@pytest.mark.parametrize("task", ["gsm8k", "sums"])
def test_the_slice_is_of_the_training_split_and_not_trained_on(task):
    settings = Settings(task=task, problems=300, validation_problems=30)
    problems, validation, _ = build.load_splits(settings)
    assert (len(problems), len(validation)) == (300, 30)
    assert all("/train/" in problem.id for problem in validation)
    assert not {p.question for p in problems} & {p.question for p in validation}
    # Of GSM8K the same for every seed; sums makes other problems for another seed.
    if task == "gsm8k":
        other = Settings(task=task, problems=50, seed=7, validation_problems=30)
        assert build.load_splits(other)[1] == validation


def test_without_a_slice_the_training_problems_are_what_they_were():
    settings = Settings(task="sums", problems=20, validation_problems=0)
    problems, validation, _ = build.load_splits(settings)
    assert [problem.id for problem in problems] == [f"sums/train/0/{n}" for n in range(20)]
    assert validation == []


def test_a_function_is_held_out_in_every_source_language(tmp_path):
    """100 functions in Python and C++: no name is on two of the three sides."""
    lines = []
    for n in range(100):
        for language in ("python", "cpp"):
            row = {"id": f"f{n}", "source": f"f{n}", "source_language": language}
            row |= {"entry": "f", "tests": [{"args": [x], "expected": x + n + 1} for x in range(3)]}
            lines.append(json.dumps(row) + "\n")
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(lines))

    settings = Settings(task="translate", lang="lua", translate_data=str(path))
    sides = translate.load_splits(settings)
    names = [{problem.id.split("/")[1] for problem in side} for side in sides]
    assert len(names[0] | names[1] | names[2]) == 100
    assert sum(map(len, names)) == 100
    assert 0 < len(names[1]) <= len(names[0]) / 8  # at most a tenth of the training split


def test_variants_of_a_problem_are_held_out_together():
    """gfg/X_1 is another program for gfg/X; problem_17 and problem_18 are two problems."""
    names = [f"translate/gfg/N{n}" for n in range(99)]
    variants = [f"{name}{variant}/cpp" for name in names for variant in ("", "_1", "_2_1")]
    sides = [translate.is_held_out(Translation(id, *"cx", "", ())) for id in variants]
    assert sides[::3] == sides[1::3] == sides[2::3]
    assert 0 < sum(sides[::3]) < 30

    users = [f"mine/problem_{n}/cpp" for n in range(99)]
    assert len({translate.is_held_out(Translation(id, *"cx", "", ())) for id in users}) == 2


def test_self_plays_slice_has_none_of_the_reported_triples():
    settings = Settings(task="selfplay", eval_problems=90, validation_problems=45)
    language = load_language("lua")
    puzzles, _, ask = selfplay.load_validation(settings, language, None)
    reported = triples.held_out_triples(language, 90)
    known = {(puzzle.entry.program, puzzle.entry.inputs) for puzzle in reported}
    assert len(puzzles) == 45
    assert not any((puzzle.entry.program, puzzle.entry.inputs) in known for puzzle in puzzles)
    assert "Lua" in str(ask(puzzles[0]))


def test_held_out_problems_with_long_prompts_are_counted():
    """Of prompts of 3, 5 and 9 letters two are within 5; they used to go without a word."""
    said = []
    letters = SimpleNamespace(encode=list)
    kept = build.usable(["abc", "abcde", "abcdefghi"], letters, str, 5, said.append, "held-out ")
    assert kept == ["abc", "abcde"]
    assert said[0].startswith("1 of 3 held-out problems dropped: their prompt is longer than 5")


@needs_prolog
def test_as_many_held_out_problems_as_were_asked_for_are_drawn_from_those_that_fit(tmp_path):
    """Of twelve questions every third is short; three are asked for and three are evaluated.

    Where three were drawn before the long ones went, two were left.
    """
    for split in ("train", "test"):
        lines = []
        for n in range(12):
            question = f"What is {n} plus {n}?" + (n % 3 > 0) * " Take your time." * 20
            lines.append(json.dumps({"question": question, "answer": f"Easy.\n#### {2 * n}"}))
        path = tmp_path / f"gsm8k/{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines))

    language = load_language("prolog")
    problems = load_problems("sums", "train", count=200)
    sft.make_tiny(
        problems, language, lambda p: program_messages(p, language), tmp_path / "model", 0
    )
    asked = f"--task gsm8k --data {tmp_path} --model {tmp_path}/model --examples 0 --steps 0"
    asked += " --short_prompt true --max_prompt_tokens 60 --eval_problems 3 --max_new_tokens 4"
    folder = whole_run(tmp_path / "work", *asked.split(), "--wandb", "off", name="short")
    shown = rows(folder, "eval/step_0.jsonl")
    assert len({row["id"] for row in shown}) == 3
    assert not any("Take your time" in row["question"] for row in shown)


# ---- what it decides ----


def run_with(validation, **settings):
    """What finish_step reads of a run; its problems say which side they are of."""
    return SimpleNamespace(
        settings=Settings(eval_samples=1, **settings),
        sampler=None,
        tokenizer=None,
        held_out="test",
        judge=None,
        ask=None,
        validation=validation,
        best=(-1.0, 0),
    )


def test_the_best_checkpoint_is_the_validation_problems_choice(monkeypatch):
    """Test pass@1 0.1, 0.9, 0.2; validation 0.3, 0.2, 0.3: the first step of the best is best."""
    rates = {"test": [0.1, 0.9, 0.2], "validation": [0.3, 0.2, 0.3]}
    logged = []

    def evaluate(sampler, tokenizer, judge, problems, **how):
        return {"pass@1": rates[problems].pop(0)}, [{"id": problems}]

    class Log:
        def evaluation(self, step, rows, name="eval"):
            logged.append((step, name, rows[0]["id"]))

        def step(self, step, metrics, times):
            logged.append((step, metrics["eval/pass@1"], metrics["validation/pass@1"]))

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "progress", lambda *_: "")
    run = run_with(build.Validation("validation", None, None))
    for step in (10, 20, 30):
        train.finish_step(run, Log(), step, {}, {}, print)
    assert run.best == (0.3, 10)
    assert logged[3:6] == [(20, "eval", "test"), (20, "validation", "validation"), (20, 0.9, 0.2)]


def test_a_greedy_sample_is_taken_beside_those_at_a_temperature(monkeypatch):
    """Not where evaluation is greedy already. Its rows are written first, to their own folder."""
    asked = []

    def evaluate(sampler, tokenizer, judge, problems, n, temperature, **how):
        asked.append((n, temperature))
        return {"pass@1": temperature / 4}, []

    class Log:
        def evaluation(self, step, rows, name="eval"):
            asked.append(name)

    monkeypatch.setattr(train, "evaluate", evaluate)
    both = run_with(None, eval_greedy=True, eval_temperature=1.0)
    metrics, _ = train.evaluate_and_log(both, 0, Log())
    assert metrics == {"pass@1": 0.25, "greedy/pass@1": 0.0}
    assert asked == [(1, 0.0), "greedy", (1, 1.0), "eval"]

    asked.clear()
    metrics, _ = train.evaluate_and_log(run_with(None, eval_greedy=True), 0, Log())
    assert metrics == {"pass@1": 0.0}
    assert asked == [(1, 0.0), "eval"]


@needs_prolog
@pytest.mark.slow
def test_a_run_with_validation_problems(tmp_path):
    """Evaluated every step, on problems that no step draws; the config says how many."""
    every_step = "--eval_every 1 --validation_problems 5 --eval_problems 3 --steps 3".split()
    folder = whole_run(tmp_path, *SMALL, *every_step, name="run")
    metrics = rows(folder)
    assert all({"eval/pass@1", "validation/pass@1"} <= set(row) for row in metrics)

    chosen = {row["id"] for row in rows(folder, "validation/step_1.jsonl")}
    reported = {row["id"] for row in rows(folder, "eval/step_1.jsonl")}
    drawn = {row["problem"] for row in rows(folder, "samples.jsonl")}
    assert (len(chosen), len(reported)) == (5, 3)
    assert all(id.startswith("sums/train/") for id in chosen)
    assert not chosen & (drawn | reported)
    assert json.loads((folder / "config.json").read_text())["validation_problems"] == 5
    # The evaluation before training is of the test split alone.
    assert [path.name for path in (folder / "validation").glob("step_0*")] == []

    state = json.loads((folder / "checkpoints/step_3/state.json").read_text())
    rates = [row["validation/pass@1"] for row in metrics]
    assert state["best"] in ([max(rates), 1 + rates.index(max(rates))], [max(rates[:2]), 1])


# ---- the table at the end ----


def test_the_table_has_no_figure_that_nobody_measured(capsys):
    """One sample a problem: no pass@4. A status that no program ended in is 0."""
    before = {"pass@1": 0.25, "mean_tokens": 9.0, "sandbox/error_frac": 0.5}
    after = {"pass@1": 0.5, "mean_tokens": 8.0}
    evaluation.before_and_after((before, []), (after, []))
    table = capsys.readouterr().out
    assert "pass@1" in table and "pass@4" not in table
    assert "sandbox/error_frac        0.500      0.000" in table
    evaluation.before_and_after((before | {"pass@4": 0.75}, []), (after, []))
    assert "pass@4" not in capsys.readouterr().out
