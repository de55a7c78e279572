"""Digests of what decides an evaluation's numbers: same digests, same numbers.

A path says nothing about what lies there: a run writes new weights where old ones were. Every byte
is read, which for the 1 GB of a 0.5B model took 2 s on a busy machine (SHA-256).
"""

import hashlib
import json
from pathlib import Path

from runtime.tokenizer import FILES

REPO = Path(__file__).resolve().parent.parent
# What samples and judges. train.py, build.py and the losses change no evaluation of given weights.
CODE = (
    *("eval.py", "sampler.py", "decode.py", "pages.py", "model.py", "rewards.py"),
    *("kernels", "runtime", "sandbox", "selfplay", "tasks"),
)


def weights(folder):
    """Digest of a checkpoint's weights: the files that its index names, else model.safetensors."""
    folder = Path(folder)
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    return of_files([folder / name for name in names], folder)


def tokenizer(folder):
    """Digest of the files that say how text becomes ids, chat template and end marks included."""
    folder = Path(folder)
    return of_files([folder / name for name in FILES if (folder / name).is_file()], folder)


def code():
    """Digest of the code of this repository that samples and judges, languages included."""
    paths = []
    for name in CODE:
        place = REPO / name
        paths += [place] if place.is_file() else place.rglob("*")
    sources = [path for path in paths if path.suffix in (".py", ".toml", ".c")]
    return of_files(sorted(sources), REPO)


def of_files(paths, folder):
    """Digest of the files' names below folder and of their content."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder)} {digest}\n".encode())
    return whole.hexdigest()


def of_texts(texts):
    """Digest of a sequence of texts."""
    whole = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        whole.update(f"{len(encoded)} ".encode() + encoded)
    return whole.hexdigest()
