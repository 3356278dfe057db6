"""Converts between text and token ids with the tokenizer of a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from h1export import forms
from h1export.errors import H1ExportError, reason
from h1export.model.config_reader import shown
from h1export.model.falcon_h1.states import Ids

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MOST_BYTES = 64 << 20  # of the file; those of vocabularies of 262,144 tokens have 20 MB
AGAIN = "download it again"
REPLACEMENT = "\ufffd"  # which decoders give in the place of bytes that are no character yet, or never
NEIGHBOURS = 8  # characters, or what a token has of them, that are decoded with a new one


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of ``folder``, with truncation and padding switched off. Threads may share it.

    Raises:
        H1ExportError: the folder has no tokenizer.json, or it cannot be read.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise H1ExportError(folder, f"no {TOKENIZER}", "build from a checkpoint that has its tokenizer")
    text = forms.content(path, AGAIN, MOST_BYTES)
    try:
        tokenizer = Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise H1ExportError(path, f"not a tokenizer ({reason(error)})", AGAIN) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def scoring_ids(folder: Path, text: str) -> tuple[Ids, int]:
    """Return the ids of ``text`` without special tokens, int64 [tokens], and the UTF-8 bytes after the first token.

    A model predicts every token but the first, so bits per byte are counted over these bytes.
    """
    tokenizer = load_tokenizer(folder)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    first = len(text[: encoding.offsets[0][1]].encode()) if encoding.ids else 0
    return np.array(encoding.ids, np.int64), len(text.encode()) - first


def plain_tokenizer(folder: Path) -> Any:
    """Return transformers' tokenizer over the tokenizer.json of ``folder``, for hosts that want one.

    Its class is always the same: AutoTokenizer would run the code that ``auto_map`` names, or ask whether to run it.

    Raises:
        H1ExportError: the folder has no tokenizer, transformers cannot load it, or would load another one.
    """
    from transformers import PreTrainedTokenizerFast

    own = load_tokenizer(folder)  # the clearer errors
    kind: Any = PreTrainedTokenizerFast
    try:
        found = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found.encode("a")  # uses what the files have set
        same = found.backend_tokenizer.get_vocab(False) == own.get_vocab(False)
    except Exception as error:  # of any library below transformers
        raise H1ExportError(
            folder, f"transformers cannot load the tokenizer ({shown(str(error))})", "compare it with the published one"
        ) from None
    if not same:
        what = f"names another tokenizer than {TOKENIZER}"
        raise H1ExportError(folder / TOKENIZER_CONFIG, what, "remove the key fast_tokenizer_files")
    return found


class TokenDecoder:
    """Text of tokens that come one by one; a character that consists of several is given with its last token.

    It belongs to one sequence, and so to one thread at a time.

    Bytes that never become a character are given as U+FFFD, at the latest when the tokens end. tokenizers' DecodeStream
    leaves them out, and raises for decoders that look at more than one token.

    Args:
        tokenizer: The tokenizer.
        skip_special_tokens: Whether special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._held: list[int] = []  # the last tokens, with some before them, because decoders look at neighbours
        self._given = ""  # the text of ``_held`` that was given
        self._ends: list[int] = []  # where in ``_held`` a character ended

    def step(self, token: int) -> str:
        """Return the text that is whole with ``token``, which may be none."""
        self._held.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        piece = _after(self._given, text)
        self._ends.append(len(self._held))
        if len(self._ends) > 2 * NEIGHBOURS:  # begin at a whole character
            start = self._ends[NEIGHBOURS]
            del self._held[:start]
            self._ends = [end - start for end in self._ends[NEIGHBOURS + 1 :]]
            text = self._text()
        self._given = text
        return piece

    def rest(self) -> str:
        """Return what is left after the last token: bytes that no other will make a character of."""
        return _after(self._given, self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._held, skip_special_tokens=self._skip))


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield text without special tokens as ids arrive, as TokenDecoder gives it."""
    decoder = TokenDecoder(tokenizer)
    for token in ids:
        if piece := decoder.step(token):
            yield piece
    if rest := decoder.rest():
        yield rest


def _after(given: str, text: str) -> str:
    """Return what ``text`` has after ``given``, which it begins with unless the decoder has changed its mind."""
    same = next((place for place, (old, new) in enumerate(zip(given, text, strict=False)) if old != new), len(given))
    return text[same:]
