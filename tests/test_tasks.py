"""Problems, prompts, rendered solutions and the chat tokenizer."""

import gzip
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from runtime.tokenizer import ChatTokenizer, train_bpe
from tasks import data, sums
from tasks.problems import load_problems, program_messages, worked_example
from tasks.render import exact_steps, render_expression, solution

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


def test_sums_hold_out_templates_and_numbers():
    """No template and no combination of numbers of a test problem occurs in training, also under other seeds."""
    train = [sums.make("train", seed, index) for seed in (0, 1) for index in range(3000)]
    test = [sums.make("test", 7, index) for index in range(1000)]
    assert not {t[0] for t in train} & {t[0] for t in test}
    assert not {t[1] for t in train} & {t[1] for t in test}
    assert len({t[0] for t in train}) > 1000 and len({t[0] for t in test}) > 200
    assert {len(t[3]) for t in train} == {len(t[3]) for t in test} == {1, 2, 3, 4}


def test_sums_are_right_deterministic_and_small():
    problems = load_problems("sums", "train", count=2000, seed=3)
    assert (
        problems
        == load_problems("sums", "train", count=2000, seed=3)
        != load_problems("sums", "train", count=2000, seed=4)
    )
    assert problems[:10] == load_problems("sums", "train", count=10, seed=3)
    words = [len(p.question.split()) for p in problems]
    assert max(words) < 60 and 20 < sum(words) / len(words) < 45
    for p in problems:
        assert 0 < p.answer < 1000 and 100 % p.answer.denominator == 0
        assert "{" not in p.question and p.steps[-1].value == p.answer
        # every number of the steps stands in the question, but for those that a word says (half, twice, a third)
        told = re.findall(r"\d+(?:\.\d+)?", p.question)
        used = [
            number for s in p.steps for number in re.findall(r"(?<![v\d.])\d+(?:\.\d+)?", s.expr)
        ]
        assert all(number in told or number in "23" for number in used), p


def test_a_hand_checked_sum():
    steps = exact_steps([("v1", "12/60"), ("v2", "v1*50"), ("v3", "-(v2-1.5)*2")])
    assert [s.value for s in steps] == [Fraction(1, 5), Fraction(10), Fraction(-17)]


def test_expressions_keep_their_meaning_in_infix_and_prefix():
    infix = {"notation": "infix", "variable": "V{}", "integer": "{}", "decimal": "{}"}
    prefix = {**infix, "notation": "prefix", "variable": "v{}"}
    cases = {
        "(1+v1)*2": ("(1 + V1) * 2", "(* (+ 1 v1) 2)"),
        "8-(3-2)": ("8 - (3 - 2)", "(- 8 (- 3 2))"),
        "8-3-2": ("8 - 3 - 2", "(- (- 8 3) 2)"),
        "6/(3*2)": ("6 / (3 * 2)", "(/ 6 (* 3 2))"),
        "-v1+0.5": ("0 - V1 + 0.5", "(+ (- 0 v1) 0.5)"),
    }
    for expr, expected in cases.items():
        assert (
            render_expression(expr, infix),
            render_expression(expr, prefix),
        ) == expected
    floats = {**infix, "integer": "{}.0", "operators": {"+": "+.", "*": "*."}}
    assert render_expression("(1+v1)*0.5", floats) == "(1.0 +. V1) *. 0.5"


def test_solution_and_messages_read_as_the_format_says():
    problem = load_problems("sums", "train", count=1)[0]
    text = solution(problem, "prolog")
    assert re.fullmatch(
        r"<reasoning>\n.+\n</reasoning>\n<code>\n.+\n</code>\n<query>\n.+\n</query>",
        text,
        re.DOTALL,
    )
    assert "<funcall>\n(solve)\n</funcall>" in solution(problem, "lisp")
    for examples in (0, 1, 5):
        system, user = program_messages(problem, "prolog", examples=examples)
        assert (
            user["content"] == problem.question
            and system["content"].count("## Example") == examples
        )
        assert system["content"].count("</query>") == 2 + examples
    assert program_messages(problem, "lisp", examples=0, system=False) == [
        {"role": "user", "content": problem.question}
    ]
    assert [m["role"] for m in program_messages(problem, "lisp", examples=1, system=False)] == [
        "user",
        "assistant",
        "user",
    ]
    with pytest.raises(ValueError, match="use 0, 1 or 5"):
        program_messages(problem, "lisp", examples=2)


@needs_data
def test_gsm8k_counts_and_golds():
    train, test = load_problems("gsm8k", "train"), load_problems("gsm8k", "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].answer == 72 and train[0].id == "gsm8k/train/0"
    raw = [
        json.loads(line)["answer"]
        for line in gzip.open(DATA / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8")
    ]
    commas = [i for i, answer in enumerate(raw) if "," in answer.split("####")[1]]
    assert commas and all(train[i].answer >= 1000 for i in commas)  # "1,200" is 1200, not an error
    steps = load_problems("gsm8k_steps", "train")
    assert len(steps) == 6991
    assert all(train[int(p.id.split("/")[-1])].answer == p.answer for p in steps)
    sample = load_problems("gsm8k", "test", count=50, seed=1)
    assert (
        sample == load_problems("gsm8k", "test", count=50, seed=1)
        and len({p.id for p in sample}) == 50
    )


def test_bad_data_has_one_clear_sentence(tmp_path, monkeypatch):
    def message(task="gsm8k", split="train", data=tmp_path):
        with pytest.raises(ValueError) as error:
            load_problems(task, split, data=data)
        assert "\n" not in str(error.value)
        return str(error.value)

    good = json.dumps({"question": "q", "answer": "#### 1,200"})
    path = tmp_path / "gsm8k" / "train.jsonl"
    path.parent.mkdir()
    assert "is not in" in message()
    path.write_text("")
    assert "is empty" in message()
    path.write_text(f"{good}\n\n{{not json\n")
    assert "line 3 is malformed" in message()
    path.write_text(f'{good}\n{{"question": "q", "answer": "no gold"}}\n')
    assert "line 2 is malformed" in message()
    (tmp_path / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(good.encode())[:-9])
    assert "cannot be read" in message(split="test")
    path.write_text(good)
    assert [p.answer for p in load_problems("gsm8k", "train", data=tmp_path)] == [1200]
    assert "does not exist" in message(data=tmp_path / "nowhere")
    assert "unknown task 'sum'" in message(task="sum")
    assert "unknown split" in message(split="dev")
    # a publisher that cannot be reached: one sentence, and nothing left behind
    monkeypatch.setattr(data, "REPO", tmp_path / "repo" / "here")
    monkeypatch.delenv("RARECODE_DATA", raising=False)
    monkeypatch.setattr(data, "GSM8K_URL", "http://127.0.0.1:9/{split}.jsonl")
    assert "cannot be reached" in message(data=None)
    (tmp_path / "changed.jsonl").write_text(good)
    monkeypatch.setattr(data, "GSM8K_URL", f"file://{tmp_path}/changed.jsonl")
    assert "does not have the expected sha256" in message(data=None)
    assert not list(tmp_path.glob("repo/**/*.jsonl"))


@needs_data
def test_chat_tokenizer_equals_transformers_and_golden_vectors():
    tokenizer = ChatTokenizer(DATA / "qwen_tokenizer")
    for vector in json.loads((DATA / "qwen_tokenizer/golden.json").read_text("utf-8")):
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        assert tokenizer.decode(vector["ids"]) == re.sub(r"<\|\w+\|>", "", vector["text"])
    assert tokenizer.stop_ids == (151645, 151643)  # <|im_end|>, <|endoftext|>
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(DATA / "qwen_tokenizer")
    problem = worked_example(2)
    for chat in (
        program_messages(problem, "lisp", 5),
        program_messages(problem, "prolog", 0, system=False),
        program_messages(problem, "prolog", 1, system=False),
    ):
        assert tokenizer.encode_chat(chat) == peer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )


def test_stop_ids_come_from_every_config(tmp_path):
    train_bpe(["some text"], 300, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert ChatTokenizer(tmp_path).stop_ids == (2, 0, 7, 9)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        ChatTokenizer(tmp_path)


def test_train_bpe_is_deterministic_and_splits_digits(tmp_path):
    texts = [solution(p, "prolog") + p.question for p in load_problems("sums", "train", count=300)]
    tokenizer = train_bpe(texts, 512, tmp_path / "a")
    train_bpe(texts, 512, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()
    assert tokenizer.vocab_size == 512 and tokenizer.stop_ids == (2, 0)
    assert tokenizer.decode(tokenizer.encode(texts[0] + " ½ 漢")) == texts[0] + " ½ 漢"
    assert len(tokenizer.encode("1234")) == 4
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert (
        ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1
    )  # user turn closed, assistant turn open
