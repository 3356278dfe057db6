"""Text that people bring in files and pipes: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import os
import select
import stat
from pathlib import Path

from h1export.errors import H1ExportError

UTF8_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {  # the longest first, because UTF-32's begins as UTF-16's does
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
SAVE_AS_UTF8 = "save it as UTF-8"
MOST_TEXT = 256 << 20  # bytes, far more than a calibration or a prompt needs
BLOCK = 1 << 20  # bytes that are read at a time
PATIENCE = 1.0  # seconds in which somebody must open a pipe for writing


def read_text(file: Path, option: str, nbytes: int = 0, *, kind: str = "text", most: int = MOST_TEXT) -> str:
    """Return the text of ``file``, which ``option`` names: its first ``nbytes``, or all of it for 0.

    A character that the end cuts is left out. ``kind`` is what the file should be, for errors. The file may be a pipe;
    it is read up to its first NUL, which no text has, and never beyond ``most`` bytes.

    Raises:
        H1ExportError: the file cannot be read, is not text, or is larger than ``most``.
    """
    try:
        data = _data(file, nbytes or most + 1)
    except (OSError, ValueError) as error:  # a ValueError for a name that has a NUL
        what = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise H1ExportError(file, what, f"give another {option}") from None
    if not nbytes and len(data) > most and b"\0" not in data:
        raise H1ExportError(file, f"has more than the {most} bytes that are read of {kind}", f"give a shorter {option}")
    return decode(data, file, cut=len(data) == nbytes, kind=kind)


def _data(file: Path, most: int) -> bytes:
    """Return the first ``most`` bytes of a file or a pipe, or those up to the block that has the first NUL."""
    found = bytearray()
    with open(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as stream:
        descriptor = stream.fileno()
        if hasattr(select, "poll"):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                found += _first(descriptor, min(BLOCK, most))
            os.set_blocking(descriptor, True)
        while len(found) < most and b"\0" not in found[-BLOCK:]:
            if not (block := stream.read(min(BLOCK, most - len(found)))):
                break
            found += block
    return bytes(found)


def _first(descriptor: int, most: int) -> bytes:
    """Wait for the text of a pipe that does not block; return what was read meanwhile, which may be none of it.

    Raises:
        TimeoutError: nobody has opened the pipe for writing.
    """
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    if waiting.poll(PATIENCE * 1000):  # there is text, or a writer has come and gone
        return b""
    try:
        if data := os.read(descriptor, most):
            return data
    except BlockingIOError:  # there is a writer, which has written nothing yet
        return b""
    raise TimeoutError("nobody writes to this pipe")


def decode(data: bytes, where: object, *, cut: bool = False, kind: str = "text") -> str:
    """Return ``data`` as text, without the byte order mark; ``where`` names it in errors.

    Args:
        data: bytes of UTF-8.
        where: what they come from.
        cut: whether the last character may be incomplete; it is left out then.
        kind: what the text should be, for errors.

    Raises:
        H1ExportError: the bytes are not UTF-8, or have a NUL, as binary files and UTF-16 do. The error has the place
            and nothing of the text.
    """
    for mark, encoding in OTHER_MARKS.items():
        if data.startswith(mark):
            raise H1ExportError(where, f"is not {kind}: it is {encoding} by its first bytes", SAVE_AS_UTF8)
    start = len(UTF8_MARK) if data.startswith(UTF8_MARK) else 0
    if (place := data.find(b"\0")) >= 0:
        raise H1ExportError(where, f"is not {kind}: byte {place} is NUL", SAVE_AS_UTF8)
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        if cut and error.reason == "unexpected end of data":
            return data[start : start + error.start].decode("utf-8")
        what = f"is not {kind}: it is not UTF-8 at byte {start + error.start}"
        raise H1ExportError(where, what, SAVE_AS_UTF8) from None
