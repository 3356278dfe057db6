"""Text and token ids, by the tokenizer that a checkpoint or an artifact carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from h1export.errors import H1ExportError
from h1export.runtime.runner import Ids

TOKENIZER = "tokenizer.json"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, with truncation and padding off.

    Raises:
        H1ExportError: there is none, or it cannot be read.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise H1ExportError(folder, f"no {TOKENIZER}", "build from a checkpoint that has its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise H1ExportError(path, f"not a tokenizer ({error})", "download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def scoring_ids(folder: Path, text: str) -> tuple[Ids, int]:
    """Ids of ``text`` without special tokens, and the UTF-8 bytes that all but the first id stand for."""
    tokenizer = load_tokenizer(folder)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    first = len(text[: encoding.offsets[0][1]].encode()) if encoding.ids else 0
    return np.array(encoding.ids, np.int64), len(text.encode()) - first


def chat_prompt(folder: Path, message: str) -> str:
    """``message`` as a user's turn, by the checkpoint's chat template."""
    from transformers import AutoTokenizer

    if not ((folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(folder)):
        raise H1ExportError(folder, "no chat template", "leave out --chat, or build from an instruct checkpoint")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    turns = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is whole: a character of several tokens comes with its last one."""
    decoder = DecodeStream(skip_special_tokens=True)
    for token in ids:
        subgraph = decoder.step(tokenizer, token)
        if subgraph:
            yield subgraph
