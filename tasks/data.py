"""Data files: where they are found, how they are read, and the one that is fetched when it is missing."""

import gzip
import hashlib
import json
import os
import random
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
    "/grade_school_math/data/{split}.jsonl"
)


GSM8K_SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


def in_passes(items, numbers, key):
    """The items that stand at these numbers 0, 1, 2, ... of endless passes over the data, each in a new order that depends on key and pass alone."""
    orders, picked = {}, []
    for number in numbers:
        turn = number // len(items)
        if turn not in orders:
            orders[turn] = list(range(len(items)))
            random.Random(f"{key}/{turn}").shuffle(orders[turn])
        picked.append(items[orders[turn][number % len(items)]])
    return picked


def find_data(name, data=None):
    """Path of a data file, plain or .gz: in `data` when that is given, else the first of RARECODE_DATA, ../shared/data, .data; or None."""
    named = [folder for folder in (data, os.environ.get("RARECODE_DATA")) if folder]
    for folder in named:
        if not Path(folder).is_dir():
            raise ValueError(f"data folder {folder} does not exist: check --data and RARECODE_DATA")
    for root in [data] if data else [*named, REPO.parent / "shared" / "data", REPO / ".data"]:
        for path in (Path(root) / name, Path(root) / (name + ".gz")):
            if path.is_file():
                return path
    if data:
        raise ValueError(
            f"{name} (or {name}.gz) is not in {data}: put it there, or leave out --data"
        )
    return None


def read_jsonl(path, read):
    """[read(line number from 0, object)] of a JSON-lines file, gzipped or not. ValueError names an empty file or the bad line."""
    rows = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(
            path, "rt", encoding="utf-8"
        ) as lines:
            for index, line in enumerate(lines):
                if line.strip():
                    rows.append(_read_row(path, index, line, read))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from None
    if not rows:
        raise ValueError(f"{path} is empty: fetch it again")
    return rows


def _read_row(path, index, line, read):
    try:
        return read(index, json.loads(line))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        SyntaxError,
        ZeroDivisionError,
    ) as error:
        raise ValueError(
            f"{path}, line {index + 1} is malformed ({type(error).__name__}: {error}): fix or remove it"
        ) from None


def download_gsm8k(task, split):
    if task != "gsm8k":
        raise ValueError(
            f"{task} needs {task}/{split}.jsonl: put it under --data, RARECODE_DATA or ../shared/data"
        )
    url, path = GSM8K_URL.format(split=split), REPO / ".data" / "gsm8k" / f"{split}.jsonl"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise ValueError(
            f"gsm8k/{split}.jsonl is not here and {url} cannot be reached ({error}): put the file under --data"
        ) from None
    if hashlib.sha256(content).hexdigest() != GSM8K_SHA256[split]:
        raise ValueError(
            f"{url} does not have the expected sha256 {GSM8K_SHA256[split]}: nothing was kept"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")  # several ranks may fetch at once
    partial.write_bytes(content)
    partial.replace(path)
    return path
