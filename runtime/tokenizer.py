"""The chat tokenizer: messages to ids and ids to text, for any tokenizer.json.

And training the tiny model's own BPE.
"""

import json
import sys
from pathlib import Path

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime import distributed
from runtime.folder_check import read_json

# Qwen2.5's turns without its default system message, for models that bring no template but know
# the marks.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The files of a model folder that say how its text becomes ids.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


# Tokens that a template may name.
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTokenizer:
    """tokenizer.json and chat template of a model folder or hub id.

    stop_ids: every id that ends a turn (generation_config.json, config.json, the tokenizer's own
    end marks), first the one that the chat template writes after the assistant's turn.
    vocab_size: the largest id and one.
    Raises ValueError with one sentence when the folder has no tokenizer or no usable template, or
    when its tokenizer is not the model's.
    """

    def __init__(self, folder_or_hub_id):
        from tokenizers import Tokenizer

        self._name = folder_or_hub_id
        files = _tokenizer_files(folder_or_hub_id)
        path = files["tokenizer.json"]
        try:
            raw = json.loads(path.read_text("utf-8"))
            left_in = keep_prompts_whole(raw)
            self._tokenizer = Tokenizer.from_str(json.dumps(raw))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({error})") from None
        if left_in and distributed.rank() == 0:
            print(
                f"{path} has {' and '.join(left_in)} left in: ignored, prompts stay whole",
                file=sys.stderr,
            )

        config = _read_json(files, "tokenizer_config.json")
        self.vocab_size = self._check_vocabulary(files, raw, config)
        self._template = self._compile_template(files, config)
        self.stop_ids = self._find_stop_ids(files, config)

    def tokens(self):
        """{text: id} of all tokens, the added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text):
        """Ids of a text as it stands: marks such as <|im_end|> become ids, nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages):
        """Ids of the chat up to and with the mark that starts the assistant's turn.

        Where the last message is the assistant's, its text follows the mark: it goes on from there.
        """
        *before, last = messages
        if last["role"] == "assistant":
            return self.encode(self.render_chat(before) + last["content"])
        return self.encode(self.render_chat(messages))

    def render_chat(self, messages):
        """The text of the chat up to and with the mark that starts the assistant's turn.

        ValueError with the template's own sentence when it refuses the messages.
        """
        # enable_thinking: Qwen3's switch, which other templates do not look at.
        return self._render(messages, add_generation_prompt=True, enable_thinking=False)

    def decode(self, ids):
        """Text of ids without special marks."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _check_vocabulary(self, files, raw, config):
        """The largest id and one, when every id has a row in the embedding and its own name.

        An id without a row would end a run at the first prompt that holds it, on a GPU with an
        assertion of the device. An added token whose id is not the next one gets another id from
        the library, with no word.
        """
        path = files["tokenizer.json"]
        vocabulary = self._tokenizer.get_vocab()
        last = max(vocabulary, key=vocabulary.get)
        size = vocabulary[last] + 1
        rows = _read_json(files, "config.json").get("vocab_size") or size
        if size > rows:
            raise ValueError(
                f"{path} has ids up to {size - 1} ({last}), but the embedding has {rows} rows "
                "(config.json): it is another model's tokenizer, or tokens were added without "
                "making the embedding larger"
            )

        said = [(path.name, token["id"], token) for token in raw.get("added_tokens", [])]
        for id, token in config.get("added_tokens_decoder", {}).items():
            said.append(("tokenizer_config.json", int(id), token))
        for name, id, token in said:
            text = _token_text(token)
            if vocabulary.get(text) != id:
                raise ValueError(
                    f"{path.parent}: {name} says that {text} is id {id}, but it becomes "
                    f"{self.encode(text)}: copy both files from the model that they belong to"
                )
        return size

    def _compile_template(self, files, config):
        """The template of the folder; ChatML where it brings none but knows the marks."""
        source = config.get("chat_template")
        if "chat_template.jinja" in files:
            source = files["chat_template.jinja"].read_text("utf-8")
        elif isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source}
        if isinstance(source, dict):  # several named templates
            if not source.get("default"):
                raise ValueError(
                    f"{files['tokenizer_config.json']} has chat templates named "
                    f"{', '.join(map(str, source))}, but none named default: write the one that is "
                    "meant to chat_template.jinja"
                )
            source = source["default"]
        if not source and self._tokenizer.token_to_id("<|im_end|>") is None:
            raise ValueError(
                f"{self._name} has no chat template and no <|im_end|> token: "
                "add chat_template.jinja to the folder"
            )

        # The template comes with the model: it must not run code.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        for key in NAMED_TOKENS:
            if config.get(key):
                environment.globals[key] = _token_text(config[key])
        try:
            return environment.from_string(source or CHATML)
        except Exception as problem:
            raise ValueError(
                f"the chat template of {self._name} cannot be read: {_one_line(problem)}"
            ) from None

    def _render(self, messages, **options):
        """The template's text; what goes wrong in it as one sentence."""
        try:
            return self._template.render(messages=messages, tools=None, documents=None, **options)
        except Exception as problem:  # the template's own, or whatever its code runs into
            raise ValueError(
                f"the chat template of {self._name} refuses the messages: {_one_line(problem)}"
            ) from None

    def _find_stop_ids(self, files, config):
        # The mark that the template writes after the assistant's answer.
        answer = "rarecode"
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        text = self._render(chat, add_generation_prompt=False)
        marks = self._tokenizer.get_added_tokens_decoder()
        ids = [id for id in self.encode(text.rpartition(answer)[2])[:1] if id in marks]

        for name in (_token_text(config.get("eos_token")), "<|im_end|>", "<|endoftext|>"):
            if name:
                ids.append(self._tokenizer.token_to_id(name))
        for file in ("generation_config.json", "config.json"):
            found = _read_json(files, file).get("eos_token_id")
            ids += found if isinstance(found, list) else [found]

        known = [id for id in ids if id is not None and self._tokenizer.id_to_token(id)]
        if not known:
            raise ValueError(
                f"{self._name} has no mark that ends a turn: add eos_token to tokenizer_config.json"
            )
        return tuple(dict.fromkeys(known))


def keep_prompts_whole(raw):
    """Take out of a tokenizer.json's content what changes a prompt's ids -> names of what was in.

    Some tools save the truncation and padding of their last call, and a BPE trained with dropout
    splits the same words differently every time. transformers ignores the first two as well, so
    the ids are those of the model's other users.
    """
    left_in = [name for name in ("truncation", "padding") if raw.get(name)]
    for name in left_in:
        raw[name] = None
    if raw["model"].get("dropout"):
        left_in.append("dropout")
        raw["model"]["dropout"] = None
    return left_in


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}, trl's mark of the assistant's words: the words."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _to_json(value, indent=None):
    """transformers' tojson: characters as they are (jinja's own is for HTML)."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message):
    """What a template calls when it cannot render the messages."""
    raise ValueError(message)


def _one_line(problem):
    return " ".join(str(problem).split())


def _tokenizer_files(name):
    """{file name: path} of the tokenizer's files.

    In a folder or, through huggingface_hub, of a hub id.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), allow_patterns=list(FILES)))
        except Exception as error:  # not found, offline, gated: all one to the user
            raise ValueError(
                f"{name} is not a folder here, and the hub gave no such model "
                f"({type(error).__name__})"
            ) from None
    files = {file: folder / file for file in FILES if (folder / file).is_file()}
    if "tokenizer.json" not in files:
        raise ValueError(
            f"{name} has no tokenizer.json: copy it from the model this one was trained from"
        )
    return files


def _read_json(files, name):
    return read_json(files[name]) if name in files else {}


def _token_text(token):
    """A token of tokenizer_config.json: a string, a dict with its content, or None."""
    if isinstance(token, dict):
        return token["content"]
    return token or ""


def train_bpe(texts, vocab_size, folder):
    """Train the tiny model's byte-level BPE on texts -> its ChatTokenizer.

    Writes tokenizer.json and tokenizer_config.json into folder. Ids 0-2 are <|endoftext|>,
    <|im_start|>, <|im_end|>, then 256 bytes, then merges; every digit is a token of its own, as in
    Qwen2.5. The same texts give the same file.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return ChatTokenizer(folder)
