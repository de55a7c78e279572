"""Data files: where they are found, how they are read, which rows are taken, and one download."""

import gzip
import hashlib
import json
import os
import random
import re
import urllib.request
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# The one data set that is fetched when it is missing, at a fixed commit.
GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/{split}.jsonl"
)
GSM8K_SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}

# What a reader of a row may raise when the row is not what it should be.
_MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SyntaxError,
    ZeroDivisionError,
)


# ---- files ----


def find_data(name, data=None):
    """Path of a data file, plain or .gz, or None.

    data: the folder to look in. Without it, the first that has the file of RARECODE_DATA,
    ../shared/data and .data. ValueError where a folder that was named does not exist, or where
    `data` was given and does not hold the file.
    """
    named = [folder for folder in (data, os.environ.get("RARECODE_DATA")) if folder]
    for folder in named:
        if not Path(folder).is_dir():
            raise ValueError(f"data folder {folder} does not exist: check --data and RARECODE_DATA")

    roots = [data] if data else [*named, REPO.parent / "shared" / "data", REPO / ".data"]
    for root in roots:
        for path in (Path(root) / name, Path(root) / f"{name}.gz"):
            if path.is_file():
                return path
    if data:
        raise ValueError(
            f"{name} (or {name}.gz) is not in {data}: put it there, or leave out --data"
        )
    return None


def read_jsonl(path, read):
    """[read(line number from 0, object)] of a JSON-lines file, gzipped or not.

    ValueError names a file that is empty or cannot be read, or the line that is malformed.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    rows = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
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
    except _MALFORMED as error:
        raise ValueError(
            f"{path}, line {index + 1} is malformed ({type(error).__name__}: {error}): "
            "fix or remove it"
        ) from None


def read_if_here(name, read, data=None):
    """read_jsonl of a data file that may be missing, without the rows for which read gives None."""
    path = find_data(name, data)
    if path is None:
        return []
    return [row for row in read_jsonl(path, read) if row is not None]


def download_gsm8k(split):
    """Fetch GSM8K into .data -> path. ValueError when it cannot be reached or is not the same."""
    url = GSM8K_URL.format(split=split)
    path = REPO / ".data" / "gsm8k" / f"{split}.jsonl"
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise ValueError(
            f"gsm8k/{split}.jsonl is not here and {url} cannot be reached ({error}): "
            "put the file under --data"
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


# ---- which rows ----


def take(items, count, seed):
    """`count` of the items, drawn by seed, in their own order; all when count is None or more."""
    if count is None or count >= len(items):
        return items
    drawn = random.Random(seed).sample(range(len(items)), count)
    return [items[index] for index in sorted(drawn)]


def without_variant(name):
    """A name of GeeksforGeeks without the number of its variant; any other as it is.

    gfg/X, gfg/X_1 and gfg/X_2 are programs for one problem: 22 of 188 held-out functions had one of
    them on the training side. Other sets number their problems so.
    """
    return re.sub(r"(_\d+)+$", "", name) if "gfg/" in name else name


def hold_out(problems, count, family):
    """(problems to train on, validation problems) of a training split.

    count: how many to hold out, at most a tenth of the split.
    family(problem): text that problems share which must not be on both sides.
    Which they are depends on the families alone: neither on a run's seed nor on the other problems,
    so that a part of the split holds out what the whole does.
    """

    def place(name):
        return random.Random(f"validation/{name}").random()

    count = min(count, len(problems) // 10)
    names = sorted({family(problem) for problem in problems}, key=place)
    members = {name: [] for name in names}
    for problem in problems:
        members[family(problem)].append(problem)

    chosen = []
    held_out = set()
    for name in names:
        if len(chosen) >= count:
            break
        chosen += members[name]
        held_out.add(name)
    return [p for p in problems if family(p) not in held_out], chosen[:count]


def in_passes(items, numbers, key):
    """The items at these numbers 0, 1, 2, ... of endless passes over the data.

    Each pass has a new order, which depends on key and on the pass alone.
    """
    orders, picked = {}, []
    for number in numbers:
        turn, place = divmod(number, len(items))
        if turn not in orders:
            orders[turn] = list(range(len(items)))
            random.Random(f"{key}/{turn}").shuffle(orders[turn])
        picked.append(items[orders[turn][place]])
    return picked
