"""A real model: its ids, chats, end marks, logits and greedy text are transformers'.

RARECODE_MODEL=DIR pytest tests/test_real_model.py, with any Qwen2 folder; 6 GB and some minutes for
a 0.5B. Without the variable every test here is skipped.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import make_segments
from runtime import hugging_face
from runtime.tokenizer import ChatTokenizer
from test_model import greedy

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: it is the peer of these tests"
)
GIVEN = os.environ.get("RARECODE_MODEL", "")
pytestmark = [
    pytest.mark.slow,  # a model of 135 million parameters or more, twice
    pytest.mark.skipif(
        not GIVEN, reason="no real model: set RARECODE_MODEL to the folder of a Qwen2 model"
    ),
]
# Two logits this close are equal but for rounding: fp32 sums of some thousand terms in another
# order. Measured, largest of all logits of the prompts below: 4e-5 (0.5B), 7e-5 (135M).
ROUNDING = 2e-4
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder():
    if not (Path(GIVEN) / "model.safetensors").exists():
        pytest.fail(f"RARECODE_MODEL is {GIVEN}, which has no model.safetensors")
    return Path(GIVEN)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def peer_tokenizer(folder):
    """transformers' tokenizer.

    A Qwen2 config.json makes AutoTokenizer cut every text by Qwen2's rules. Where the model's
    tokenizer is another, that is not what it was trained with: the class that reads
    tokenizer.json as it stands is the peer there.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if config.get("tokenizer_class", "").startswith("Qwen2"):
        return transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def models(folder):
    """(transformers' model, ours), both fp32."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return peer, hugging_face.load_model(folder)


# ---- text and ids ----

TEXTS = {
    "prolog": "solve(X) :-\n    Y is 2 * 21,\n\tX = Y. % Kommentar\n",
    "lisp": '(defun f (x)\n  "doc"\n  (if (< x 2) 1 (* x (f (1- x)))))',
    "python": "def f(a, *, b=1):\n    return {**a, 'b': f\"{b!r:>10}\"}\n\n\n",
    "c": '#include <stdio.h>\nint main(void) { return printf("%d\\n", 1 << 3), 0; }\n',
    "julia": "f(x::Float64)::Vector{ComplexF64} = x .+ [1im, π] |> collect; # ∑ᵢ αᵢ²",
    "perl": 'my @a = map { $_ =~ s/^\\s+|\\s+$//gr } @{$x->{y}}; print "@a\\n";',
    "chinese and japanese": "这是一个测试。漢字とカタカナ、ｶﾀｶﾅ「한국어」",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ✅️ a😀b",
    "not normalised": "e\u0301 é ﬁ ﬁne Å Å ½ ²",
    "windows line ends": "a\r\nb\r\n\r\n  c\r\rd\n\r",
    "digits": "0 1234567 3.14159 1e-10 ١٢٣ ４２ 2⁶⁴ 1,000,000 0x1F",
    "leading blanks": "   a\n        b\n\t\tc\n \n  \n\n   ",
    "trailing blanks": "a   \nb\t \n",
    "only blanks": "     ",
    "empty": "",
    "other blanks": "a\u00a0b\u3000c\u200bd\u2028e\ufefff",
    "marks": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x <|im_end|>",
    "no marks": "<|im_start |> < |im_end|> <|unknown|> <im_end>",
    "contractions": "it's I'LL we've they'Re don't 'tis",
    "right to left": "שלום عَرَبِيّ",
    "control characters": "a\x00b\x1bc\x7f",
    "long word": "a" * 300 + "_" * 100 + "-" * 50,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_has_transformers_ids_and_back(tokenizer, peer_tokenizer, name):
    ids = peer_tokenizer.encode(TEXTS[name], add_special_tokens=False)
    assert tokenizer.encode(TEXTS[name]) == ids
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids) == peer_tokenizer.decode(ids, **options)


@pytest.mark.parametrize("file", ["train.py", "kernels/native.c", "README.md"])
def test_a_file_has_transformers_ids(tokenizer, peer_tokenizer, file):
    text = (ROOT / file).read_text("utf-8")
    assert tokenizer.encode(text) == peer_tokenizer.encode(text, add_special_tokens=False)


USER = {"role": "user", "content": "Write `solve/1`.\n\n```prolog\nsolve(X) :-\n```  "}
SYSTEM = {"role": "system", "content": "You know Prolog. Antworte kurz. 简短"}
ANSWER = {"role": "assistant", "content": " solve(42).\n"}
CHATS = {
    "user": [USER],
    "system and user": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "And <|im_end|> 👍?"}],
    "two questions": [USER, USER],
    "empty": [{"role": "user", "content": ""}],
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_has_transformers_text_and_ids(tokenizer, peer_tokenizer, name):
    options = dict(add_generation_prompt=True, return_dict=False)
    text = peer_tokenizer.apply_chat_template(CHATS[name], tokenize=False, **options)
    assert tokenizer.render_chat(CHATS[name]) == text
    ids = peer_tokenizer.apply_chat_template(CHATS[name], **options)
    assert tokenizer.encode_chat(CHATS[name]) == ids


def test_stop_ids_are_those_of_transformers(tokenizer, peer_tokenizer, folder):
    """Of generate(); a base model's lack the end of a turn, which ours always have."""
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    theirs = {*(ends if isinstance(ends, list) else [ends]), peer_tokenizer.eos_token_id}
    assert theirs <= set(tokenizer.stop_ids)
    marks = {tokenizer.encode(mark)[0] for mark in ("<|im_end|>", "<|endoftext|>")}
    assert set(tokenizer.stop_ids) <= theirs | marks

    # The first is what ends the assistant's turn in the template.
    turn = peer_tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
    after = turn.rpartition(ANSWER["content"].strip())[2].strip()
    assert tokenizer.encode(after)[0] == tokenizer.stop_ids[0]


# ---- numbers ----

QUESTIONS = (
    "What is the capital of France?",
    "Write a Prolog predicate solve(X) that adds the numbers from 1 to 10.",
    "Name three primary colours, and say which two of them make green.",
    "写一个计算阶乘的 Lua 函数。",
    "Reply with the word yes.",
)
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Chats, and code to continue."""
    chats = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    return [*chats, tokenizer.encode('(defun factorial (n)\n  "n!"\n')]


@torch.no_grad()
def logits_of_peer(peer, ids):
    """[tokens, vocabulary]"""
    return peer(torch.tensor([ids])).logits[0]


def test_logits_are_those_of_transformers(models, prompts):
    """Ours of all prompts packed into one forward."""
    peer, ours = models
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        hidden = ours.hidden(tokens, positions, make_segments(lengths)).split(lengths)
        for prompt, rows in zip(prompts, hidden):
            gap = (rows @ ours.head_weight.T - logits_of_peer(peer, prompt)).abs().max()
            print(f"largest difference {gap:.1e}")
            assert gap < ROUNDING


@pytest.fixture(scope="module")
def sampled(models, prompts, tokenizer):
    """The sampler's greedy tokens of all prompts, decoded together."""
    return greedy(models[1], prompts, max_new_tokens=NEW_TOKENS, stop_ids=tokenizer.stop_ids)


def test_every_greedy_token_is_the_likeliest_for_transformers(models, prompts, sampled):
    """Given the same tokens before it: a token whose logit is less by rounding is as likely.

    All positions count, also those behind such a tie.
    """
    for prompt, tokens in zip(prompts, sampled):
        logits = logits_of_peer(models[0], prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < ROUNDING


def test_greedy_text_is_that_of_generate(models, prompts, sampled, tokenizer):
    """Token by token to the same end, unless two logits were equal but for rounding.

    Behind such a tie both texts are right and nothing is compared. One prompt of all may have one.
    """
    peer = models[0]
    ties = 0
    for prompt, ours in zip(prompts, sampled):
        whole = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,  # some published folders have another
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.stop_ids[0],
        )
        theirs = whole[0, len(prompt) :].tolist()
        if ours == theirs:
            continue
        ties += 1
        pairs = zip(ours, theirs)
        place = next(number for number, (a, b) in enumerate(pairs) if a != b)
        best = logits_of_peer(peer, prompt + theirs[:place])[-1].topk(2)
        assert best.indices.tolist() in ([ours[place], theirs[place]], [theirs[place], ours[place]])
        assert best.values[0] - best.values[1] < ROUNDING
    print(f"{ties} of {len(prompts)} texts part at a tie")
    assert ties <= 1


# ---- saved again ----


def test_a_base_model_is_saved_with_the_end_that_was_trained(tmp_path, models, folder, tokenizer):
    """A base model names <|endoftext|> alone; its template ends a turn with <|im_end|>.

    transformers goes on behind the turn; saved by us it stops where our sampler stops.
    """
    end_of_text = tokenizer.encode("<|endoftext|>")[0]
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    for file in ("config.json", "generation_config.json"):
        raw = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps(raw | {"eos_token_id": end_of_text}))

    ours = models[1]
    saved = tmp_path / "saved"
    hugging_face.save_model(ours.state_dict(), ours.config, saved, tokenizer_from=base)
    before = load_file(folder / "model.safetensors")
    after = load_file(saved / "model.safetensors")
    before.pop("lm_head.weight", None)  # a tied head that some folders hold twice
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    ids = tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[0]}])
    (sampled,) = greedy(ours, [ids], max_new_tokens=NEW_TOKENS, stop_ids=tokenizer.stop_ids)
    assert sampled[-1] == tokenizer.stop_ids[0]
    assert "Paris" in tokenizer.decode(sampled)
    assert generate(saved, ids) == sampled
    assert len(generate(base, ids)) > len(sampled)


def generate(folder, ids):
    """transformers' greedy tokens, as the folder's own files say when to stop."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
    whole = peer.generate(torch.tensor([ids]), **options)
    return whole[0, len(ids) :].tolist()
