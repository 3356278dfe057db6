"""Where a prompt comes from: the command line, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from h1export.errors import H1ExportError, as_utf8

STANDARD_INPUT = "-"
STDIN = "standard input"


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt that a command line asks for.

    A prompt "-" or a file "-" is standard input, and so is no prompt at all where standard input is not a terminal.
    One line end at the end of a file or of standard input is left out, because editors and `echo` write it; the rest is
    as it is.

    Raises:
        click.UsageError: there is no prompt, or there are two.
        H1ExportError: the file cannot be read, or is not UTF-8 text.
    """
    from h1export.checkpoint.text_file import decode, read_text

    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, and not both")
    if prompt is None and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("Missing argument 'PROMPT': give one, or --file, or a text on standard input")
        prompt = STANDARD_INPUT
    if file is not None and str(file) != STANDARD_INPUT:
        return _without_line_end(read_text(file, "--file"))
    if prompt is None or prompt == STANDARD_INPUT:
        return _without_line_end(decode(_standard_input(), STDIN))
    return as_utf8(prompt)


def _standard_input() -> bytes:
    try:
        data: Any = getattr(sys.stdin, "buffer", sys.stdin).read()
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise H1ExportError(STDIN, what, "give the prompt as an argument, or by --file") from None
    return data if isinstance(data, bytes) else str(data).encode()


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
