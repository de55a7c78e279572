"""The chat tokenizer: transformers' tokens and stop ids, and one trained on the spot."""

import json
import re
from pathlib import Path

import pytest

from runtime.tokenizer import ChatTokenizer, train_bpe
from tasks.problems import load_problems, program_messages, worked_example
from tasks.render import solution

QWEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen_tokenizer"
needs_data = pytest.mark.skipif(not QWEN.is_dir(), reason="../shared/data is not here")


@needs_data
def test_chat_tokenizer_equals_golden_vectors():
    tokenizer = ChatTokenizer(QWEN)
    for vector in json.loads((QWEN / "golden.json").read_text("utf-8")):
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        without_marks = re.sub(r"<\|\w+\|>", "", vector["text"])
        assert tokenizer.decode(vector["ids"]) == without_marks
    assert tokenizer.stop_ids == (151645, 151643)  # <|im_end|>, <|endoftext|>


@needs_data
def test_chat_tokenizer_equals_transformers():
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(QWEN)
    tokenizer = ChatTokenizer(QWEN)
    problem = worked_example(2)
    chats = [
        program_messages(problem, "lisp", 5),
        program_messages(problem, "prolog", 0, system=False),
        program_messages(problem, "prolog", 1, system=False),
    ]
    for chat in chats:
        theirs = peer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(chat) == theirs


def test_stop_ids_come_from_every_config(tmp_path):
    train_bpe(["some text"], 300, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert ChatTokenizer(tmp_path).stop_ids == (2, 0, 7, 9)


def test_a_tokenizer_that_cannot_be_read_has_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        ChatTokenizer(tmp_path)


def test_train_bpe_is_deterministic_and_splits_digits(tmp_path):
    problems = load_problems("sums", "train", count=300)
    texts = [solution(problem, "prolog") + problem.question for problem in problems]
    tokenizer = train_bpe(texts, 512, tmp_path / "a")
    train_bpe(texts, 512, tmp_path / "b")
    first = (tmp_path / "a/tokenizer.json").read_bytes()
    assert first == (tmp_path / "b/tokenizer.json").read_bytes()

    assert tokenizer.vocab_size == 512
    assert tokenizer.stop_ids == (2, 0)
    unknown = texts[0] + " ½ 漢"  # goes through bytes
    assert tokenizer.decode(tokenizer.encode(unknown)) == unknown
    assert len(tokenizer.encode("1234")) == 4


def test_a_chat_closes_the_users_turn_and_opens_the_assistants(tmp_path):
    tokenizer = train_bpe(["some text"], 300, tmp_path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids[0] == 1
    assert ids.count(1) == 2  # <|im_start|>
    assert ids.count(2) == 1  # <|im_end|>
