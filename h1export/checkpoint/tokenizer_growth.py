"""How many times longer a tokenizer.json can make a text, which decides over the memory of everything after it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from h1export.errors import H1ExportError

MOST_GROWTH = 1024  # times as many characters or tokens; a step for bytes makes four characters of one
MOST_STEPS = 64
BYTES = 4  # of one character in UTF-8, each of which ByteLevel makes a character
NESTED = ("normalizers", "pretokenizers", "processors", "decoders")
NEXT_STEP = "give the tokenizer that the model was trained with"


def check_growth(path: Path, tokenizer: Tokenizer) -> None:
    """Check that no chain of steps makes a text far longer: of normalizer and pre-tokenizer, post-processor, decoder.

    Args:
        path: the file, for the error.
        tokenizer: what it holds.

    Raises:
        H1ExportError: a chain has more than MOST_STEPS steps, or can make a text more than MOST_GROWTH times longer.
    """
    before = [*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer)]
    for name, steps in (
        ("normalizer and pre_tokenizer", before),
        ("post_processor", list(_steps(tokenizer.post_processor))),
        ("decoder", list(_steps(tokenizer.decoder))),
    ):
        if len(steps) > MOST_STEPS:
            raise H1ExportError(path, f"{name}: has {len(steps)} steps, more than {MOST_STEPS}", NEXT_STEP)
        growth = math.prod(map(_growth, steps))
        if growth > MOST_GROWTH:
            times = f"more than {MOST_GROWTH} times"
            raise H1ExportError(path, f"{name}: can make a text {times} longer", NEXT_STEP)


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of one of the library's objects, those inside sequences too; None has none."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()))


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in NESTED:
        if step["type"] == "Sequence" and key in step:
            for inner in step[key]:
                yield from _flat(inner)
            return
    yield step


def _growth(step: dict[str, Any]) -> int:
    """Return how many times longer ``step`` makes a text of one character, at most.

    Unicode's own forms make up to 18 characters of one, but not again when they are repeated, and count as none.
    """
    kind = step["type"]
    if kind == "ByteLevel":
        return BYTES
    if kind == "Replace":
        may_be_empty = "Regex" in step["pattern"] or not step["pattern"].get("String")
        return max(1, len(step["content"]) + may_be_empty)
    if kind == "Prepend":
        return 1 + len(step["prepend"])
    if kind == "Precompiled":
        parts = base64.b64decode(step["precompiled_charsmap"]).split(b"\0")
        return max(1, *map(len, parts))
    if kind == "TemplateProcessing":
        return max(1, sum(_ids(piece, step["special_tokens"]) for piece in step["single"]))
    return 1


def _ids(piece: dict[str, Any], special: dict[str, Any]) -> int:
    return 1 if "Sequence" in piece else len(special[piece["SpecialToken"]["id"]]["ids"])
