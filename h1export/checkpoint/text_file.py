"""Text that people bring in files and pipes: UTF-8, with or without a byte order mark."""

from __future__ import annotations

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


def read_text(file: Path, option: str, nbytes: int = 0, *, kind: str = "text") -> str:
    """Return the text of ``file``, which ``option`` names: its first ``nbytes``, or all of it for 0.

    A character that the end cuts is left out. ``kind`` is what the file should be, for errors.

    Raises:
        H1ExportError: the file cannot be read, or is not text.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(nbytes or -1)
    except (OSError, ValueError) as error:  # a ValueError for a name that has a NUL
        what = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise H1ExportError(file, what, f"give another {option}") from None
    return decode(data, file, cut=len(data) == nbytes, kind=kind)


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
