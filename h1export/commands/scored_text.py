"""The text that judges score an artifact on."""

from __future__ import annotations

from pathlib import Path

from h1export.checkpoint.resolve import embedded_model
from h1export.checkpoint.text_file import read_text
from h1export.checkpoint.tokenizer import TOKENIZER, scoring_ids
from h1export.validate.accuracy.text_rows import Text, no_text

HELDOUT = "heldout.txt"  # in the embedded model's folder


def scored_text(out: Path, path: Path | None, nbytes: int) -> Text:
    """Return the first ``nbytes`` of a text, or all of it for 0, in the tokens of the artifact ``out``.

    ``path`` None means the held-out text that ships with the embedded model. An artifact without a tokenizer scores
    nothing.

    Raises:
        H1ExportError: the text or the tokenizer cannot be read.
    """
    if not (out / TOKENIZER).is_file():
        return no_text(f"the artifact has no {TOKENIZER}")
    return Text(*scoring_ids(out, read_text(path or embedded_model() / HELDOUT, "--text", nbytes)))
