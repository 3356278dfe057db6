r"""How llama.cpp splits text before it merges bytes: the kinds that ``tokenizer.ggml.pre`` can name.

A kind is a chain of regular expressions in llama.cpp's sources (src/llama-vocab.cpp). Which one a tokenizer has is
found by its results: both split the same texts, and every id must be the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from h1export.checkpoint.tokenizer import COMPARE, Tokenizer
from h1export.errors import native_error

WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
THREE_DIGITS = "[0-9][0-9][0-9]"


@dataclass(frozen=True)
class PreType:
    """A kind of llama.cpp.

    Attributes:
        patterns: regular expressions, one after the other; each cuts out its matches of the parts that it is given.
        ignore_merges: whether a part that is a token is one, whatever the merges say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False


FALCON_H1 = "falcon-h1"
PRE_TYPES: Mapping[str, PreType] = {
    FALCON_H1: PreType((WORDS + r"|\p{N}{1,3}" + REST,), True),
    "gpt-2": PreType((GPT2,)),
    "qwen2": PreType((WORDS + r"|\p{N}" + REST,)),
    "smollm": PreType((r"\p{N}", GPT2)),
    "falcon": PreType((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE_DIGITS)),
    "default": PreType((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", THREE_DIGITS)),
}

# llama.cpp's own converter knows tokenizers by the sha256 of the ids of this text, and these four are published ones of
# this family: 0.5B and Tiny, 1.5B and 3B, 7B, 34B (get_vocab_base_pre of its convert_hf_to_gguf.py).
CONVERTERS_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not "
    "sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
PUBLISHED = frozenset(
    {
        "a6b57017d60e6edb4d88ecc2845188e0eb333a70357e45dcc9b53964a73bbae6",
        "60476e1243776c4fb1b993dbd7a5f15ac22f83c80afdf425fa5ae01c8d44ef86",
        "3eda48b4c4dc7de733d1a8b3e3b4a85243dbbf704da2ee9d42c6beced8897896",
        "48f8e02c0359c0bbdd82f26909171fac1c18a457bb47573ed1fe3bbb2c1cfd4b",
    }
)
# every three of these are a text: what a pattern cuts at is between two of them
PIECES = ("a", "Wé", "中", "ก็", "1", "2026", "٣", ".", "_-", "$", "`", "'s", "'LL", " ", "  ", "\n", "\r\n", "€")


def pre_type_of(tokenizer: Tokenizer) -> str | None:
    """Return the kind by which llama.cpp splits text as ``tokenizer`` does; None: it has none."""
    data = json.loads(tokenizer.library.to_str())
    if not _takes_bytes(data):
        return None
    texts = list(_texts())
    expected = tokenizer.encode_all(texts)
    for name, kind in PRE_TYPES.items():
        if _with(kind, data, tokenizer.path).encode_all(texts) == expected:
            return name
    digest = hashlib.sha256(str(tokenizer.encode(CONVERTERS_TEXT).ids).encode()).hexdigest()
    return FALCON_H1 if digest in PUBLISHED else None


def _takes_bytes(data: Mapping[str, Any]) -> bool:
    """Return whether it merges bytes, after no other change of the text: the only kind that llama.cpp has here."""
    steps = _steps(data["pre_tokenizer"])
    return (
        data["model"]["type"] == "BPE"
        and bool(data["model"]["merges"])  # llama.cpp refuses a file without any
        and not data["model"].get("byte_fallback")
        and not data["normalizer"]
        and bool(steps)
        and steps[-1]["type"] == "ByteLevel"
        and not steps[-1].get("add_prefix_space")
    )


def _steps(pre_tokenizer: Any) -> list[Any]:
    if not pre_tokenizer:
        return []
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


def _with(kind: PreType, data: Mapping[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer with llama.cpp's way to split."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in kind.patterns
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {**data["model"], "ignore_merges": kind.ignore_merges}
    changed = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]}, "model": model}
    with native_error(path, "cannot be split as llama.cpp splits", COMPARE):
        return Tokenizer(path, LibraryTokenizer.from_str(json.dumps({**data, **changed})))


def _texts() -> Iterator[str]:
    yield CONVERTERS_TEXT
    yield from map("".join, product(PIECES, repeat=3))
