"""Forms: typed readers of small JSON, TOML and YAML files, which may come from a stranger.

A form is a dataclass; its annotations say what a file may hold, with msgspec's constraints where a type is not enough.
A value of another type, a key that is missing, unknown or given twice, and a number out of range are refused with one
short line that names the place and never the value.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from h1export.errors import MOST_REASON, H1ExportError, reason, shortened

FormT = TypeVar("FormT")

MOST_BYTES = 8 << 20  # of a file that is a form; far above the manifest of the largest published model
ENUM_VALUE = re.compile(r"(?<=^Invalid enum value) .*?(?= - at |$)")  # msgspec quotes it
DEEPEST = 32  # levels of a YAML document
LARGEST = 1 << 53  # JSON's whole numbers are exact up to here

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Meta(max_length=1024)]


class FormError(ValueError):
    """A text is not what its form says; the message is one line of at most ``MOST_REASON`` characters and a place."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes; a pipe or a device is never waited for.

    Raises:
        FormError: ``path`` is no regular file, or is larger.
        OSError: it cannot be read.
    """
    if "\0" in str(path):
        raise FormError("its name has a NUL")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as stream:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise FormError("it is no regular file")
        if found.st_size > most:
            raise FormError(f"it has {found.st_size} bytes, and at most {most} are read")
        return stream.read(most)


def from_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        FormError: it is not UTF-8 or not JSON, holds NaN or an infinity, or gives a key twice.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=without_duplicates, parse_constant=_refused, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise FormError(f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise FormError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise FormError("it is nested too deeply") from None
    except ValueError as error:  # a number of too many digits
        raise FormError(reason(error)) from None


def from_toml(text: str | bytes) -> Any:
    """Return the value of a TOML text.

    Raises:
        FormError: it is not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise FormError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise FormError("it is nested too deeply") from None
    except ValueError as error:
        raise FormError(reason(error)) from None


def from_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text of mappings, lists and plain values, at most ``DEEPEST`` levels deep.

    Raises:
        FormError: it is not YAML, has anchors, aliases or tags, which can make much of a short text, or gives a key
            twice.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise FormError("it is nested too deeply")
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise FormError(f"an anchor, an alias or a tag at line {event.start_mark.line + 1}")
        node = yaml.compose(text, Loader=loader)
        _check_keys(node)
        return yaml.load(text, Loader=loader)
    except FormError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormError(reason(error)) from None


def _check_keys(node: Any) -> None:
    """Check that the mappings of a YAML document have each key once, and texts as keys."""
    if node is None or isinstance(node.value, str):
        return
    pairs = node.value if node.id == "mapping" else [(None, item) for item in node.value]
    keys = [key.value for key, _ in pairs if key is not None]
    if any(not isinstance(key, str) for key in keys):
        raise FormError(f"a key at line {node.start_mark.line + 1} is no text")
    if len(set(keys)) != len(keys):
        raise FormError(f"a key is given twice below line {node.start_mark.line + 1}")
    for _, item in pairs:
        _check_keys(item)


def fill(form: type[FormT], value: object) -> FormT:
    """Return ``value``, of JSON or TOML, as ``form``.

    Raises:
        FormError: it is of another type, out of range, or has a key that the form lacks.
    """
    try:
        filled = msgspec.convert(value, form, strict=True)
        if odd := _unknown(value, msgspec.to_builtins(filled), "$"):
            raise FormError(f"unknown key at {odd}")
    except FormError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:
        raise FormError(ENUM_VALUE.sub("", reason(error))) from None
    return filled


def parse(
    text: str | bytes,
    form: type[FormT],
    *,
    where: object,
    what: str,
    next_step: str,
    language: Callable[[bytes | str], Any] = from_json,
) -> FormT:
    """Return a text as ``form``.

    Args:
        text: the content of a file.
        form: a dataclass.
        where: the file, for the error.
        what: what the text is not where it is not of this form, such as "a report of this h1export".
        next_step: what the user can do then.
        language: what turns the text into values: ``from_json`` or ``from_toml``.

    Raises:
        H1ExportError: the text is not of this form.
    """
    try:
        return fill(form, language(text))
    except FormError as error:
        raise H1ExportError(where, f"is not {what} ({error})", next_step) from None


def read(path: Path, form: type[FormT], *, what: str, next_step: str) -> FormT:
    """Return the JSON file at ``path`` as ``form``; the arguments are those of ``parse``.

    Raises:
        H1ExportError: the file cannot be read, is not regular, is too large, or is not of this form.
    """
    return parse(content(path, next_step), form, where=path, what=what, next_step=next_step)


def content(path: Path, next_step: str, most: int = MOST_BYTES) -> bytes:
    """Return what ``read_bytes`` returns.

    Raises:
        H1ExportError: the file cannot be read, is not regular, or is too large.
    """
    try:
        return read_bytes(path, most)
    except FormError as error:
        raise H1ExportError(path, f"cannot be read ({error})", next_step) from None
    except OSError as error:
        raise H1ExportError(path, f"cannot be read ({error.strerror})", next_step) from None


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; this is json's object_pairs_hook.

    Raises:
        FormError: a key is given twice: readers would differ on which one counts.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormError("a key is given twice")
    return found


def _refused(name: str) -> float:
    raise FormError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused("a number beyond every float")


def _unknown(value: object, known: object, place: str) -> str:
    """Return the place of a key in ``value`` that ``known``, the same as a form has read it, lacks; empty: none."""
    if isinstance(value, Mapping) and isinstance(known, Mapping):
        for name, item in value.items():
            if name not in known:
                return f"{place}.{shortened(name, MOST_REASON)}"
            if odd := _unknown(item, known[name], f"{place}.{shortened(name, MOST_REASON)}"):
                return odd
    elif isinstance(value, list | tuple) and isinstance(known, list | tuple):
        for index, (item, same) in enumerate(zip(value, known, strict=True)):
            if odd := _unknown(item, same, f"{place}[{index}]"):
                return odd
    return ""
