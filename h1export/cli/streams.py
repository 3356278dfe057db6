"""Standard output and error of any encoding, with any reader or none, for as long as a command runs."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast

from h1export.errors import H1ExportError

READER_GONE = 141  # 128 + SIGPIPE, as a shell reports a program that wrote to a closed pipe
STANDARD_STREAMS = (0, 1, 2)
ESCAPE = "backslashreplace"


class ReaderGoneError(SystemExit):
    """The reader of standard output closed it: the command ends, and nothing failed.

    It is a SystemExit, so that no library takes it for an error of its own. click and rich would exit with 1.
    """

    def __init__(self) -> None:
        super().__init__(READER_GONE)


class Stream(io.TextIOBase):
    """A text stream over ``inner`` that writes every character, those that the encoding lacks as escapes.

    After a failed write, what is left goes nowhere, so that the interpreter's last flush does not fail too. There is no
    ``buffer``: click would write UTF-8 to it wherever the encoding is ASCII.

    Args:
        inner: the stream to write to.
        vital: whether the command ends when nobody reads the stream. Standard output is what a command is for; its
            messages on standard error are not.
        name: the stream's name in an error.
    """

    def __init__(self, inner: TextIO, vital: bool, name: str) -> None:
        self._inner = inner
        self._vital = vital
        self._name = name
        self.lost = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The inner stream's encoding; ASCII where it has none."""
        return getattr(self._inner, "encoding", None) or "ascii"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """What becomes of characters that the encoding lacks."""
        return ESCAPE

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Leave the inner stream open: it belongs to the process."""

    def isatty(self) -> bool:
        return self._inner.isatty()

    def fileno(self) -> int:
        return self._inner.fileno()

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError("a text stream takes text")  # click asks by writing bytes
        if text:
            with self._failures():
                self._inner.write(encodable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        with self._failures():
            self._inner.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            if error.errno == errno.EPIPE:
                if self._vital:
                    raise ReaderGoneError from None
                return
            self.lost = True
            if self._vital:
                next_step = "free some space or choose another place, and run again"
                raise H1ExportError(self._name, str(error.strerror or error), next_step) from None

    def _discard(self) -> None:
        """Lead the stream's descriptor to the null device."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._inner.fileno())
            os.close(null)


def encodable(text: str, encoding: str) -> str:
    """Return ``text`` with an escape such as \\u2502 in the place of every character that ``encoding`` lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, ESCAPE).decode(encoding)
    return text


def guarded(stream: TextIO, vital: bool = True, name: str = "standard output") -> Stream:
    """Return ``stream``, over which a Stream is put where it is none."""
    return stream if isinstance(stream, Stream) else Stream(stream, vital, name)


@contextmanager
def guarded_streams() -> Iterator[tuple[Stream, Stream]]:
    """Put a Stream over standard output and one over standard error, and yield them."""
    open_closed_streams()
    kept = sys.stdout, sys.stderr
    output, messages = guarded(kept[0]), guarded(kept[1], False, "standard error")
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", messages)
    try:
        yield output, messages
    finally:
        sys.stdout, sys.stderr = kept


def open_closed_streams() -> None:
    """Open those of the three standard streams that the caller of this process had closed, on the null device.

    Otherwise the next file that is opened gets the number of one of them, and whatever a library prints is written
    into that file.
    """
    for descriptor in STANDARD_STREAMS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  as long as the process
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
