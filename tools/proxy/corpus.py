"""Training and held-out text for tools/train_proxy.py: the sources and docs of installed packages, as token ids.

Packages are held out whole. Text is deduplicated by block: what stands between two blank lines in a row, so a top-level
class or function in most Python files. A block of MIN_BLOCK characters or more is kept once, and never where held-out
text has it, whoever copied it from whom.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from train_tiny import HELD_OUT, make_tokenizer
from transformers import PreTrainedTokenizerFast

from h1export.writing import write_file

# Under BSD, MIT, Apache, PSF or similar licences, most text first. What is not installed is left out, and the record
# of the cache says what was read.
PACKAGES = (
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "scipy",
    "scikit-learn",
    "numpy",
    "coremltools",
    "matplotlib",
    "mypy",
    "networkx",
    "nltk",
    "torchao",
    "fonttools",
    "pygments",
    "onnxruntime",
    "huggingface_hub",
    "cmake",
    "onnxscript",
    "peft",
    "pyarrow",
    "lm_eval",
    "onnx",
    "datasets",
    "narwhals",
    "mlx-lm",
    "mpmath",
    "pydantic",
    "accelerate",
    "pytest",
    "pillow",
    "aiohttp",
    "onnxruntime-genai",
    "triton",
    "protobuf",
    "joblib",
    "onnx-ir",
    "filelock",
    "gguf",
    "compressed-tensors",
    "optimum",
    "packaging",
    "absl-py",
    "pyparsing",
    "click",
    "typer",
    "rich",
    "jsonschema",
    "virtualenv",
    "urllib3",
    "cyclonedx-python-lib",
    "multiprocess",
    "cryptography",
    "distlib",
    "tokenizers",
    "safetensors",
    "setuptools",
)
HELD_OUT_PACKAGES = ("anyio", "fsspec", "jinja2")
SUFFIXES = (".py", ".pyi", ".md", ".rst")
STDLIB = "python"
PACKAGE_BYTES = 16_000_000
FILE_BYTES = (200, 1_000_000)
DIGITS = 0.15  # files with a larger share of digits are tables
MIN_BLOCK = 200
TOKENIZER_SHARE = 8  # one file in so many trains the tokenizer


def files_of(package: str) -> list[Path]:
    """Return the text files of an installed distribution or of the standard library, sorted; [] if not installed."""
    if package == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        inside = (path for path in root.rglob("*") if "site-packages" not in path.parts)
        return sorted(path for path in inside if path.suffix in SUFFIXES and not path.name.startswith("_sysconfig"))
    try:
        listed = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted(Path(str(path.locate())) for path in listed if path.suffix in SUFFIXES)


def readable(path: Path) -> str:
    """Return a file's text, or nothing where it is no UTF-8, too short, too long, or mostly digits."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return ""
    right = FILE_BYTES[0] <= len(text) <= FILE_BYTES[1]
    return text if right and sum(map(str.isdigit, text)) < DIGITS * len(text) else ""


def novel(text: str, seen: set[bytes]) -> str:
    """Return text without the long blocks that ``seen`` has, and add its own long blocks to ``seen``."""
    kept = []
    for block in text.split("\n\n\n"):
        words = " ".join(block.split())
        if len(words) >= MIN_BLOCK:
            mark = hashlib.sha256(words.encode()).digest()[:12]
            if mark in seen:
                continue
            seen.add(mark)
        kept.append(block)
    joined = "\n\n\n".join(kept)
    return joined if len(joined) >= FILE_BYTES[0] else ""


def texts_of(package: str, seen: set[bytes], seed: int) -> Iterator[str]:
    """Yield the text of a package's files in a seeded order, up to PACKAGE_BYTES."""
    files = files_of(package)
    random.Random(f"{seed} {package}").shuffle(files)
    size = 0
    for path in files:
        if size > PACKAGE_BYTES:
            return
        if text := novel(readable(path), seen):
            size += len(text.encode())
            yield text


def gather(seed: int) -> tuple[list[str], list[str], dict[str, int]]:
    """Return training texts in their fixed order, held-out texts, and the training bytes of each package."""
    seen: set[bytes] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    held = [novel((library / f"{name}.py").read_text(), seen) for name in HELD_OUT]
    for package in HELD_OUT_PACKAGES:
        found = list(texts_of(package, seen, seed))
        if not found:
            raise SystemExit(f"train_proxy: {package}: not installed; install it, because it is the held-out text")
        held += found
    train: list[str] = []
    sizes = {}
    for package in (STDLIB, *PACKAGES):
        texts = list(texts_of(package, seen, seed))
        train += texts
        if texts:
            sizes[package] = sum(len(text.encode()) for text in texts)
    random.Random(seed).shuffle(train)
    return train, held, sizes


def encode(tok: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return the uint16 ids of all texts, each closed by eos."""
    parts = []
    for start in range(0, len(texts), 500):
        some = tok.backend_tokenizer.encode_batch(texts[start : start + 500], add_special_tokens=False)
        parts += [np.array([*ids.ids, tok.eos_token_id], np.uint16) for ids in some]
    return np.concatenate(parts)


def prepare(folder: Path, vocab_size: int, seed: int) -> None:
    """Write the tokenizer, train.u16, heldout.u16, heldout.txt and text.json, which says what was read, to folder."""
    train, held, sizes = gather(seed)
    tok = make_tokenizer(train[::TOKENIZER_SHARE], vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save_pretrained(folder / "tokenizer")
    write_file(folder / "heldout.txt", "\n".join(held).encode())
    record = {
        "seed": seed,
        "packages": {name: [version(name), size] for name, size in sizes.items()},
        "held_out": {name: version(name) for name in HELD_OUT_PACKAGES},
        "bytes": sum(sizes.values()),
    }
    for name, texts in (("heldout", held), ("train", train)):
        ids = encode(tok, texts)
        write_file(folder / f"{name}.u16", ids.tobytes())
        record[name] = {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    write_file(folder / "text.json", json.dumps(record, indent=1).encode())


def version(package: str) -> str:
    """Return the version of a package, or of Python for the standard library."""
    return platform.python_version() if package == STDLIB else importlib.metadata.version(package)


def token_bytes(tok: PreTrainedTokenizerFast) -> np.ndarray:
    """Return how many bytes of text each id stands for; special tokens stand for none."""
    special = set(tok.all_special_ids)
    tokens = tok.convert_ids_to_tokens(range(len(tok)))  # byte-level: one character a byte
    return np.array([0 if i in special else len(token) for i, token in enumerate(tokens)])
