"""The only functions with which commands print.

Names, paths and messages come from the command line and from files of others. They are printed as they are: nothing in
them is markup, and what would control a terminal is escaped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from h1export.errors import printable, printable_text


@dataclass(frozen=True)
class Sheet:
    """A table with lines above and below it, which are never wrapped.

    Attributes:
        table: its cells are texts that ``cell`` has made.
        title: the line above it, if any.
        notes: the lines below it.
    """

    table: Table
    title: str = ""
    notes: tuple[str, ...] = ()


def cell(value: object, style: str = "") -> Text:
    """Return a table's cell that shows ``value`` as it is, on one line."""
    return Text(printable(str(value)), style=style)


def cell_lines(values: Iterable[object]) -> Text:
    """Return a table's cell with a line for each of the ``values``, texts of ``cell`` or others."""
    return Text("\n").join(value if isinstance(value, Text) else cell(value) for value in values)


def say(message: str | Sheet, quiet: bool = False) -> None:
    """Print a line or a table to standard error, unless ``quiet``."""
    if not quiet:
        _print(message, sys.stderr)


def say_text(text: str, quiet: bool = False) -> None:
    """Print a text of several lines to standard error, unless ``quiet``."""
    if not quiet:
        sys.stderr.write(f"{printable_text(text)}\n")
        sys.stderr.flush()


def show(message: str | Sheet) -> None:
    """Print a line or a table that is the command's result to standard output."""
    _print(message, sys.stdout)


def show_text(text: str, end: str = "\n") -> None:
    """Print a text that is the command's result, or a piece of it, to standard output.

    Newlines and tabs stay; other control characters are escaped.
    """
    sys.stdout.write(printable_text(text) + end)
    sys.stdout.flush()


def answer(data: Any) -> None:
    """Print JSON to standard output, in ASCII."""
    sys.stdout.write(f"{json.dumps(data, indent=1)}\n")
    sys.stdout.flush()


def _print(message: str | Sheet, stream: TextIO) -> None:
    if isinstance(message, str):
        stream.write(f"{printable(message)}\n")
    else:
        lines = [message.title] if message.title else []
        stream.writelines(f"{printable(line)}\n" for line in lines)
        console = Console(file=stream, markup=False, emoji=False, highlight=False)
        console.print(message.table, width=_width(console, message.table), crop=False)
        stream.writelines(f"  {printable(line)}\n" for line in message.notes)
    stream.flush()


def _width(console: Console, table: Table) -> int:
    """Return the columns that ``table`` gets: in a terminal its width, but never so few that a word is broken.

    Elsewhere no cell is wrapped, so that every row is a line, and a path in it can be found and copied.
    """
    unbounded = console.options.update(max_width=sys.maxsize)
    needed = console.measure(table, options=unbounded)
    return max(console.width, needed.minimum) if console.is_terminal else needed.maximum
