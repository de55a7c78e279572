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


@needs_data
def test_a_begun_answer_stands_behind_the_assistants_mark():
    tokenizer = ChatTokenizer(QWEN)
    asked = [{"role": "user", "content": "Twice 2?"}]
    begun = [*asked, {"role": "assistant", "content": "It is\n```\n"}]
    ids = tokenizer.encode_chat(begun)
    assert ids[: len(tokenizer.encode_chat(asked))] == tokenizer.encode_chat(asked)
    assert tokenizer.decode(ids).endswith("assistant\nIt is\n```\n")


def test_transformers_asks_the_built_in_model_with_the_same_ids(tmp_path):
    """Beside a config.json of Qwen2, where transformers 5 cuts words by Qwen2.5's rules.

    They differ from the file's own in line breaks before blanks, which questions do not have.
    """
    transformers = pytest.importorskip("transformers")
    problems = load_problems("sums", "train", count=300)
    texts = [solution(p, "prolog") + p.question for p in problems]
    ours = train_bpe(texts, 512, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 512}')
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for problem in problems[:20]:
        chat = [{"role": "user", "content": problem.question}]
        ids = peer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat) == ids
        answer = ours.encode(solution(problem, "prolog"))
        assert peer.decode(answer) == ours.decode(answer)


def harm_tokenizer(folder, harm):
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    harm(tokenizer)
    tokenizer.save(str(path))


def truncate(tokenizer):
    tokenizer.enable_truncation(5)


def truncate_at_the_start(tokenizer):
    tokenizer.enable_truncation(5, direction="left")


def pad(tokenizer):
    tokenizer.enable_padding(length=128)


def pad_to_eights(tokenizer):
    tokenizer.enable_padding(direction="left", pad_to_multiple_of=8)


def drop_merges(tokenizer):
    tokenizer.model.dropout = 0.9


@pytest.mark.parametrize(
    "harm,name",
    [
        (truncate, "truncation"),
        (truncate_at_the_start, "truncation"),
        (pad, "padding"),
        (pad_to_eights, "padding"),
        (drop_merges, "dropout"),
    ],
)
def test_prompts_stay_whole_whatever_a_tool_has_left_in_the_tokenizer(tmp_path, capsys, harm, name):
    """Ids and end marks of the sound tokenizer, one sentence, and the same as transformers."""
    chat = [{"role": "user", "content": "what is 17 times 3, said as words of one syllable"}]
    sound = train_bpe(["words of one syllable"] * 9, 300, tmp_path)
    harm_tokenizer(tmp_path, harm)
    harmed = ChatTokenizer(tmp_path)
    assert f"{name} left in: ignored" in capsys.readouterr().err
    assert harmed.encode_chat(chat) == sound.encode_chat(chat)
    assert harmed.stop_ids == sound.stop_ids


@pytest.mark.parametrize("harm", [truncate, truncate_at_the_start, pad, pad_to_eights])
def test_what_is_left_in_a_tokenizer_is_ignored_as_transformers_ignores_it(tmp_path, harm):
    transformers = pytest.importorskip("transformers")
    chat = [{"role": "user", "content": "what is 17 times 3, said as words of one syllable"}]
    train_bpe(["words of one syllable"] * 9, 300, tmp_path)
    harm_tokenizer(tmp_path, harm)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = peer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ChatTokenizer(tmp_path).encode_chat(chat) == ids


def with_template(folder, template):
    """A tokenizer whose tokenizer_config.json has this chat template."""
    train_bpe(["some text"], 300, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(config))
    return ChatTokenizer(folder)


HI = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


def test_several_templates_need_a_default(tmp_path):
    named = [{"name": "tool_use", "template": "-"}, {"name": "default", "template": PLAIN}]
    assert with_template(tmp_path, named).render_chat(HI) == "user: hi<|im_end|>"
    mapping = {"tool_use": "-", "default": PLAIN}
    assert with_template(tmp_path, mapping).render_chat(HI) == "user: hi<|im_end|>"
    with pytest.raises(ValueError, match="named tool_use, but none named default"):
        with_template(tmp_path, named[:1])


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}" + PLAIN
)


def test_a_template_that_refuses_messages_is_quoted(tmp_path):
    tokenizer = with_template(tmp_path, NO_SYSTEM)
    assert tokenizer.encode_chat(HI)
    with pytest.raises(ValueError, match="refuses the messages: System role not supported"):
        tokenizer.encode_chat([{"role": "system", "content": "be brief"}, *HI])


@pytest.mark.parametrize(
    "template,match",
    [
        ("{% for m in messages %}", "cannot be read"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
        ("{{ strftime_now('%d') }}", "refuses the messages: 'strftime_now' is undefined"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "refuses the messages.*unsafe"),
    ],
)
def test_a_template_that_cannot_work_is_one_sentence(tmp_path, template, match):
    with pytest.raises(ValueError, match=match) as raised:
        with_template(tmp_path, template)
    assert "\n" not in str(raised.value)


# trl's generation block, characters as they are in tojson, tools that are None.
RICH = (
    "{% if tools is not none %}{{ tools[0] }}{% endif %}"
    "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    "{{ eos_token }}{{ unk_token }}"
)
RICH_CHAT = [{"role": "user", "content": "½ <b>"}]
RICH_TEXT = '{"role": "user", "content": "½ <b>"}<|im_end|>'


def test_templates_have_what_transformers_gives_them(tmp_path):
    assert with_template(tmp_path, RICH).render_chat(RICH_CHAT) == RICH_TEXT


def test_transformers_gives_templates_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    with_template(tmp_path, RICH)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer.apply_chat_template(RICH_CHAT, tokenize=False) == RICH_TEXT


def test_a_line_break_after_the_answer_is_no_end_mark(tmp_path):
    """Stopping at a line break would cut every program: the end is the tokenizer's own."""
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert with_template(tmp_path, template).stop_ids == (2, 0)


def test_a_tokenizer_without_any_end_mark_is_refused(tmp_path):
    with_template(tmp_path, "{{ messages[0].content }}")
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<a>").replace("<|endoftext|>", "<b>"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "-"}')
    with pytest.raises(ValueError, match="no mark that ends a turn"):
        ChatTokenizer(tmp_path)
