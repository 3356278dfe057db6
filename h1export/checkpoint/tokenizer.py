"""Converts between text and token ids with the tokenizer of a checkpoint or an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as LibraryTokenizer

from h1export import forms
from h1export.checkpoint.tokenizer_growth import check_growth
from h1export.errors import H1ExportError, native_error
from h1export.model.falcon_h1.states import Ids

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MOST_BYTES = 64 << 20  # of the file; those of vocabularies of 262,144 tokens have 20 MB
AGAIN = "download it again"
COMPARE = "compare it with the published one"
CANNOT_ENCODE = "cannot encode this text"
CANNOT_DECODE = "cannot decode these tokens"
REPLACEMENT = "\ufffd"  # which decoders give in the place of bytes that are no character yet, or never
NEIGHBOURS = 8  # characters, or what a token has of them, that are decoded with a new one


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json in memory. Threads may share it.

    What the library cannot do with the file is an error that names the file: a file of somebody else may have steps
    that fail, or end in a panic of Rust, which is no Exception, with some texts only.

    Attributes:
        path: the file.
        library: the library's object, for what is not below.
    """

    path: Path
    library: LibraryTokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """Return ids and offsets of ``text``. Raises H1ExportError where the file cannot encode it."""
        with native_error(self.path, CANNOT_ENCODE, COMPARE):
            return self.library.encode(text, add_special_tokens=add_special_tokens)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens. Raises H1ExportError as ``encode``."""
        with native_error(self.path, CANNOT_ENCODE, COMPARE):
            found = self.library.encode_batch(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``. Raises H1ExportError where the file cannot decode them."""
        with native_error(self.path, CANNOT_DECODE, COMPARE):
            return str(self.library.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def vocabulary(self) -> dict[str, int]:
        """Return token -> id, with the added tokens."""
        return dict(self.library.get_vocab())

    def id_to_token(self, token: int) -> str | None:
        """Return the token with the id ``token``, or None."""
        return self.library.id_to_token(token)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of ``folder``, with truncation and padding switched off.

    Raises:
        H1ExportError: the folder has no tokenizer.json, it cannot be read, or it makes a text far longer.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise H1ExportError(folder, f"no {TOKENIZER}", "build from a checkpoint that has its tokenizer")
    content = forms.content(path, AGAIN, MOST_BYTES)
    with native_error(path, "not a tokenizer", AGAIN):
        tokenizer = LibraryTokenizer.from_str(content.decode("utf-8"))
        check_growth(path, tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(path, tokenizer)


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
    with native_error(folder, "transformers cannot load the tokenizer", COMPARE):
        found = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found.encode("a")  # uses what the files have set
        same = found.backend_tokenizer.get_vocab(False) == own.library.get_vocab(False)
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
        return self._tokenizer.decode(self._held, skip_special_tokens=self._skip)


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
