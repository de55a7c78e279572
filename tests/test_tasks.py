"""Problems with a numeric answer: sums, GSM8K, prompts and rendered solutions."""

import gzip
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from tasks import data, sums
from tasks.problems import load_problems, program_messages
from tasks.render import exact_steps, render_expression, solution

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


# ---- sums ----


def test_sums_hold_out_templates_and_numbers():
    """Nothing of a test problem occurs in training, also under other seeds."""
    train = [sums.make("train", seed, index) for seed in (0, 1) for index in range(3000)]
    test = [sums.make("test", 7, index) for index in range(1000)]
    templates = {story.template for story in train}
    test_templates = {story.template for story in test}
    assert not templates & test_templates
    assert not {story.numbers for story in train} & {story.numbers for story in test}

    assert len(templates) > 1000
    assert len(test_templates) > 200
    assert {len(story.steps) for story in train} == {1, 2, 3, 4}
    assert {len(story.steps) for story in test} == {1, 2, 3, 4}


def test_sums_depend_on_seed_and_index_alone():
    problems = load_problems("sums", "train", count=200, seed=3)
    assert problems == load_problems("sums", "train", count=200, seed=3)
    assert problems != load_problems("sums", "train", count=200, seed=4)
    assert problems[:10] == load_problems("sums", "train", count=10, seed=3)


def test_sums_are_right_and_small():
    problems = load_problems("sums", "train", count=2000, seed=3)
    lengths = [len(problem.question.split()) for problem in problems]
    assert max(lengths) < 60
    assert 20 < sum(lengths) / len(lengths) < 45

    for problem in problems:
        assert 0 < problem.answer < 1000
        assert 100 % problem.answer.denominator == 0
        assert "{" not in problem.question
        assert problem.steps[-1].value == problem.answer
        # Every number of the steps stands in the question, but for those that a word says (half,
        # twice, a third).
        told = re.findall(r"\d+(?:\.\d+)?", problem.question)
        expressions = " ".join(step.expr for step in problem.steps)
        used = re.findall(r"(?<![v\d.])\d+(?:\.\d+)?", expressions)
        assert all(number in told or number in "23" for number in used), problem


# ---- programs ----


def test_a_hand_checked_sum():
    steps = exact_steps([("v1", "12/60"), ("v2", "v1*50"), ("v3", "-(v2-1.5)*2")])
    # 1/5; 1/5 * 50 = 10; -(10 - 1.5) * 2 = -17
    assert [step.value for step in steps] == [Fraction(1, 5), Fraction(10), Fraction(-17)]


INFIX = {"notation": "infix", "variable": "V{}", "integer": "{}", "decimal": "{}"}
PREFIX = {**INFIX, "notation": "prefix", "variable": "v{}"}
FLOATS = {**INFIX, "integer": "{}.0", "operators": {"+": "+.", "*": "*."}}


@pytest.mark.parametrize(
    "expr,infix,prefix",
    [
        ("(1+v1)*2", "(1 + V1) * 2", "(* (+ 1 v1) 2)"),
        ("8-(3-2)", "8 - (3 - 2)", "(- 8 (- 3 2))"),
        ("8-3-2", "8 - 3 - 2", "(- (- 8 3) 2)"),
        ("6/(3*2)", "6 / (3 * 2)", "(/ 6 (* 3 2))"),
        ("-v1+0.5", "0 - V1 + 0.5", "(+ (- 0 v1) 0.5)"),
    ],
)
def test_expressions_keep_their_meaning(expr, infix, prefix):
    assert render_expression(expr, INFIX) == infix
    assert render_expression(expr, PREFIX) == prefix


def test_a_language_may_have_operators_of_its_own():
    assert render_expression("(1+v1)*0.5", FLOATS) == "(1.0 +. V1) *. 0.5"


def test_a_solution_has_the_three_parts():
    problem = load_problems("sums", "train", count=1)[0]
    form = (
        r"<reasoning>\n.+\n</reasoning>\n"
        r"<code>\n.+\n</code>\n"
        r"<query>\n.+\n</query>"
    )
    assert re.fullmatch(form, solution(problem, "prolog"), re.DOTALL)
    assert "<funcall>\n(solve)\n</funcall>" in solution(problem, "lisp")


# ---- prompts ----


@pytest.mark.parametrize("examples", [0, 1, 5])
def test_a_prompt_shows_its_worked_examples(examples):
    problem = load_problems("sums", "train", count=1)[0]
    system, user = program_messages(problem, "prolog", examples=examples)
    assert user["content"] == problem.question
    assert system["content"].count("## Example") == examples
    # The form and the sentence below it name the closing tag too.
    assert system["content"].count("</query>") == 2 + examples


def test_without_a_system_message_examples_are_turns():
    problem = load_problems("sums", "train", count=1)[0]
    question = {"role": "user", "content": problem.question}
    assert program_messages(problem, "lisp", examples=0, system=False) == [question]
    chat = program_messages(problem, "lisp", examples=1, system=False)
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]
    assert chat[-1] == question


def test_any_other_number_of_examples_is_refused():
    problem = load_problems("sums", "train", count=1)[0]
    with pytest.raises(ValueError, match="use 0, 1 or 5"):
        program_messages(problem, "lisp", examples=2)


# ---- data ----


@needs_data
def test_gsm8k_counts_and_golds():
    train, test = load_problems("gsm8k", "train"), load_problems("gsm8k", "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].answer == 72
    assert train[0].id == "gsm8k/train/0"

    # "1,200" is 1200, not an error.
    with gzip.open(DATA / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        golds = [json.loads(line)["answer"].split("####")[1] for line in lines]
    commas = [index for index, gold in enumerate(golds) if "," in gold]
    assert commas
    assert all(train[index].answer >= 1000 for index in commas)

    steps = load_problems("gsm8k_steps", "train")
    assert len(steps) == 6991
    for problem in steps:
        assert train[int(problem.id.split("/")[-1])].answer == problem.answer


@needs_data
def test_a_sample_is_drawn_by_the_seed():
    sample = load_problems("gsm8k", "test", count=50, seed=1)
    assert sample == load_problems("gsm8k", "test", count=50, seed=1)
    assert sample != load_problems("gsm8k", "test", count=50, seed=2)
    numbers = [int(problem.id.split("/")[-1]) for problem in sample]
    assert len(set(numbers)) == 50
    assert numbers == sorted(numbers)  # in file order


def refusal(task="gsm8k", split="train", data=None):
    """The one sentence with which loading fails."""
    with pytest.raises(ValueError) as error:
        load_problems(task, split, data=data)
    assert "\n" not in str(error.value)
    return str(error.value)


GOOD = json.dumps({"question": "q", "answer": "#### 1,200"})


def test_bad_data_has_one_clear_sentence(tmp_path):
    path = tmp_path / "gsm8k" / "train.jsonl"
    path.parent.mkdir()
    assert "is not in" in refusal(data=tmp_path)
    path.write_text("")
    assert "is empty" in refusal(data=tmp_path)
    path.write_text(f"{GOOD}\n\n{{not json\n")
    assert "line 3 is malformed" in refusal(data=tmp_path)
    path.write_text(f'{GOOD}\n{{"question": "q", "answer": "no gold"}}\n')
    assert "line 2 is malformed" in refusal(data=tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    assert "cannot be read" in refusal(split="test", data=tmp_path)
    path.write_text(GOOD)
    assert [p.answer for p in load_problems("gsm8k", "train", data=tmp_path)] == [1200]


@pytest.mark.parametrize(
    "gold", ["3,5", "12,34", "1,2345", "42 dollars", "$42", "", "forty-two", "1/2", "1e3", "4\n2"]
)
def test_a_gold_answer_that_is_no_number_is_named_not_guessed(tmp_path, gold):
    """3,5 would be 35 without its comma, and 3.5 to many who write it."""
    path = tmp_path / "gsm8k" / "train.jsonl"
    path.parent.mkdir()
    bad = json.dumps({"question": "q", "answer": f"#### {gold}"})
    path.write_text(f"{GOOD}\n{bad}\n")
    sentence = refusal(data=tmp_path)
    assert f"{path}, line 2" in sentence
    assert f"{gold!r} is not a number" in sentence


def test_what_does_not_exist_has_one_clear_sentence(tmp_path):
    assert "does not exist" in refusal(data=tmp_path / "nowhere")
    assert "unknown task 'sum'" in refusal(task="sum")
    assert "unknown split" in refusal(split="dev")
    assert "train split only" in refusal(task="gsm8k_steps", split="test")


def test_a_download_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "REPO", tmp_path / "repo" / "here")
    monkeypatch.delenv("RARECODE_DATA", raising=False)
    assert "put it under --data" in refusal(task="gsm8k_steps")  # is not fetched
    monkeypatch.setattr(data, "GSM8K_URL", "http://127.0.0.1:9/{split}.jsonl")
    assert "cannot be reached" in refusal()
    (tmp_path / "changed.jsonl").write_text(GOOD)
    monkeypatch.setattr(data, "GSM8K_URL", f"file://{tmp_path}/changed.jsonl")
    assert "does not have the expected sha256" in refusal()
    assert not list(tmp_path.glob("repo/**/*.jsonl"))
