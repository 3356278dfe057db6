"""The only functions with which commands print.

Names, paths and messages come from the command line and from files of others. They are printed as they are: nothing in
them is markup, and what would control a terminal is escaped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from h1export.cli.streams import Stream, guarded
from h1export.errors import printable, printable_text

UNBOUNDED = 1 << 24  # columns, more than any cell has


@dataclass(frozen=True)
class Sheet:
    """A table with lines above and below it, which are never wrapped.

    Attributes:
        table: its cells are texts that ``cell`` has made.
        title: the line above it, if any.
        notes: the lines below it.
        prose: whether a terminal may wrap the cells at spaces.
    """

    table: Table
    title: str = ""
    notes: tuple[str, ...] = ()
    prose: bool = False


def cell(value: object, style: str = "") -> Text:
    """Return a table's cell that shows ``value`` as it is, on one line."""
    return Text(printable(str(value)), style=style)


def cell_lines(values: Iterable[object]) -> Text:
    """Return a table's cell with a line for each of the ``values``, texts of ``cell`` or others."""
    return Text("\n").join(value if isinstance(value, Text) else cell(value) for value in values)


def say(message: str | Sheet, quiet: bool = False) -> None:
    """Print a line or a table to standard error, unless ``quiet``."""
    if not quiet:
        _print(message, _messages())


def say_text(text: str, quiet: bool = False) -> None:
    """Print a text of several lines to standard error, unless ``quiet``."""
    if not quiet:
        _write(f"{printable_text(text)}\n", _messages())


def show(message: str | Sheet) -> None:
    """Print a line or a table that is the command's result to standard output."""
    _print(message, _output())


def show_text(text: str, end: str = "\n") -> None:
    """Print a text that is the command's result, or a piece of it, to standard output.

    Newlines and tabs stay; other control characters are escaped.
    """
    _write(printable_text(text) + end, _output())


def answer(data: Any) -> None:
    """Print JSON to standard output, in ASCII."""
    _write(f"{json.dumps(data, indent=1)}\n", _output())


def _output() -> Stream:
    return guarded(sys.stdout)


def _messages() -> Stream:
    return guarded(sys.stderr, False, "standard error")


def _write(text: str, stream: Stream) -> None:
    stream.write(text)
    stream.flush()


def _print(message: str | Sheet, stream: Stream) -> None:
    if isinstance(message, str):
        _write(f"{printable(message)}\n", stream)
        return
    if message.title:
        stream.write(f"{printable(message.title)}\n")
    console = Console(file=cast("TextIO", stream), markup=False, emoji=False, highlight=False)
    console.width = _width(console, message)
    console.print(message.table)
    _write("".join(f"  {printable(note)}\n" for note in message.notes), stream)


def _width(console: Console, sheet: Sheet) -> int:
    """Return the columns that a table gets: all it needs, so that every row is a line, and a path can be copied.

    For prose they are those of the terminal, but never so few that a word is broken.
    """
    table = sheet.table
    if not table.rows:
        return console.width
    if sheet.prose:
        for column in table.columns:  # rich would shrink the widest one below its longest word
            words = " ".join(map(str, (column.header, *column.cells))).split()
            column.min_width = max(map(cell_len, words), default=0)
    needed = console.measure(table, options=console.options.update(max_width=UNBOUNDED))
    return max(console.width, needed.minimum) if sheet.prose and console.is_terminal else needed.maximum
