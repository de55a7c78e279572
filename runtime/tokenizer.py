"""The chat tokenizer: messages to ids and ids to text, for any tokenizer.json.

And training the tiny model's own BPE.
"""

import json
from pathlib import Path

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


class ChatTokenizer:
    """tokenizer.json and chat template of a model folder or hub id.

    stop_ids: every id that ends a turn (generation_config.json, config.json, the tokenizer's own
    end marks), first the one that the chat template writes after the assistant's turn.
    Raises ValueError with one sentence when the folder has no tokenizer or no usable template.
    """

    def __init__(self, folder_or_hub_id):
        from tokenizers import Tokenizer

        files = _tokenizer_files(folder_or_hub_id)
        path = files["tokenizer.json"]
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({error})") from None
        config = _read_json(files, "tokenizer_config.json")
        self.vocab_size = self._tokenizer.get_vocab_size()
        self._template = self._compile_template(folder_or_hub_id, files, config)
        self.stop_ids = self._find_stop_ids(files, config)

    def encode(self, text):
        """Ids of a text as it stands: marks such as <|im_end|> become ids, nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages):
        """Ids of the chat up to and with the mark that starts the assistant's turn."""
        return self.encode(self.render_chat(messages))

    def render_chat(self, messages):
        """The text of the chat up to and with the mark that starts the assistant's turn."""
        # enable_thinking: Qwen3's switch, which other templates do not look at.
        return self._template.render(
            messages=messages, add_generation_prompt=True, enable_thinking=False
        )

    def decode(self, ids):
        """Text of ids without special marks."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _compile_template(self, name, files, config):
        # The template comes with the model: it must not run code.
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        source = config.get("chat_template")
        if "chat_template.jinja" in files:
            source = files["chat_template.jinja"].read_text("utf-8")
        elif isinstance(source, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        if source is None and self._tokenizer.token_to_id("<|im_end|>") is None:
            raise ValueError(
                f"{name} has no chat template and no <|im_end|> token: "
                "add chat_template.jinja to the folder"
            )

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        for key in ("bos_token", "eos_token"):
            environment.globals[key] = _token_text(config.get(key))
        return environment.from_string(source or CHATML)

    def _find_stop_ids(self, files, config):
        # What the template writes after the assistant's "b".
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = self._template.render(messages=chat, add_generation_prompt=False)
        ids = self.encode(text.rpartition("b")[2])[:1]

        for name in (_token_text(config.get("eos_token")), "<|im_end|>", "<|endoftext|>"):
            if name:
                ids.append(self._tokenizer.token_to_id(name))
        for file in ("generation_config.json", "config.json"):
            found = _read_json(files, file).get("eos_token_id")
            ids += found if isinstance(found, list) else [found]

        known = [id for id in ids if id is not None and id < self.vocab_size]
        return tuple(dict.fromkeys(known))


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
    return json.loads(files[name].read_text("utf-8")) if name in files else {}


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
