"""What supervised training learns from: right answers of samples, GSM8K's own words."""

import json
import sys

import pytest

import sft
from sandbox.languages import load_language
from tasks.problems import load_problems, with_worked_text
from tasks.render import completion

PROLOG = load_language("prolog")
PROBLEMS = load_problems("sums", "train", count=3)
HELD_OUT = load_problems("sums", "train", count=4)[3]


def answer(code):
    return completion("words", code, "solve(X)", PROLOG)


def row(problem, text, correct=True, name="id"):
    return json.dumps({name: problem.id, "correct": correct, "text": text})


@pytest.fixture
def samples(tmp_path):
    """An evaluation's samples: of the first problem three programs, two of them alike."""
    first, second, third = PROBLEMS
    path = tmp_path / "samples.jsonl"
    lines = [
        row(first, answer("solve(X) :- X is 1.")),
        row(first, answer("solve(X)  :-\n  X is 1.")),
        row(first, answer("solve(X) :- X is 3 - 2.")),
        row(first, answer("solve(X) :- X is 2 - 1.")),
        row(second, answer("solve(X) :- X is 5."), correct=False),
        row(second, "solve(X) :- X is 6."),  # right, but not in the form
        row(HELD_OUT, answer("solve(X) :- X is 7.")),
        row(third, answer("solve(X) :- X is 8."), name="problem"),  # a run's row
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_right_answers_are_distinct_in_form_and_of_the_problems_at_hand(samples):
    found = sft.right_answers(str(samples), PROBLEMS, PROLOG, most=2)
    assert [problem.id for problem, _ in found] == [PROBLEMS[i].id for i in (0, 0, 2)]
    codes = [sft.parse(text, PROLOG).code for _, text in found]
    assert codes == ["solve(X) :- X is 1.", "solve(X) :- X is 3 - 2.", "solve(X) :- X is 8."]


def test_no_right_answer_is_one_sentence(samples):
    with pytest.raises(ValueError, match="no right answer.*--split train"):
        sft.right_answers(str(samples), [PROBLEMS[1]], PROLOG, most=4)


def test_the_command_learns_from_right_answers(samples, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = f"sft.py --task sums --problems 3 --answers {samples} --out {out} --steps 1 --batch 2"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--validation_problems", "0"])
    sft.main()
    assert "4 answers to 2 problems" in capsys.readouterr().out
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "words,sentence",
    [
        ("--reasoning prose", "unknown reasoning 'prose'"),
        ("--answers_each 0", "at least 1"),
        ("--task selfplay --reasoning text", "makes its own texts"),
    ],
)
def test_a_value_that_would_be_ignored_is_refused(words, sentence, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", *words.split()])
    with pytest.raises(SystemExit, match=sentence):
        sft.main()


def test_the_words_of_an_answer_are_gsm8ks_own(tmp_path, monkeypatch):
    for name in ("gsm8k", "gsm8k_steps"):
        (tmp_path / name).mkdir()
    answers = ["He has 2+3 = <<2+3=5>>5 eggs.\n#### 5", "Half is 8/2 = <<8/2=4>>4.\n#### 4"]
    rows = [{"question": "?", "answer": text} for text in answers]
    steps = [{"var": "v1", "expr": "8/2"}]
    known = {"id": "train-1", "question": "?", "steps": steps, "answer": 4}
    (tmp_path / "gsm8k/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "gsm8k_steps/train.jsonl").write_text(json.dumps(known))

    problems = load_problems("gsm8k_steps", "train", tmp_path)
    (problem,) = with_worked_text(problems, tmp_path)
    assert problem.reasoning == "Half is 8/2 = 4."
    ((_, text),) = sft.rendered([problem], PROLOG, mistakes=0.0, seed=0)
    assert text.startswith("<reasoning>\nHalf is 8/2 = 4.\n</reasoning>")
    with pytest.raises(ValueError, match="only gsm8k_steps"):
        with_worked_text(PROBLEMS)

    learnt = []
    monkeypatch.setattr(sft, "run", lambda settings, problems, *_: learnt.extend(problems))
    words = f"sft.py --task gsm8k_steps --data {tmp_path} --reasoning text --out {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--validation_problems", "0"])
    sft.main()
    assert learnt == [problem]
