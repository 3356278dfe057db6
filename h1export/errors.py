"""H1ExportError: the exception for everything that the user can put right; and how foreign text is shown in a line."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

MOST_SHOWN = 300  # characters of an error beside the path of the file at fault, which is never cut
LEAST_SHOWN = 60  # characters that are left of the next step in an error that is too long
MOST_PART = 160  # characters of what is at fault inside a file, or without one
LONGEST_PATH = 4096  # of Linux
MOST_NAME = 120  # characters of a file's name that comes from another file
MOST_REASON = 120  # characters of another library's error
UNSHOWN = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, ends of lines
# marks that reorder what stands beside them, and the mark of a file's byte order
BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
PLACE = re.compile(r"line \d+,? column \d+|end of document")
BUILDING = "only running artifacts of --target ort does without it"
EXTRAS = {  # package, by what imports call it -> the extra that installs it, and why it is missed
    **dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "cyclonedx"), ("export", BUILDING)),
    "cryptography": ("sign", "signatures need it"),
}


class H1ExportError(Exception):
    """Bad input or an impossible request. The command line prints it without a traceback and exits with code 2.

    The message is one line, and its parts are cut in the middle where they are long: a file's content is never printed
    whole.

    Args:
        where: the file, config key, tensor or option at fault.
        what: what is wrong with it, with the figures.
        next_step: what the user can do about it.
    """

    def __init__(self, where: object, what: str, next_step: str) -> None:
        self.where = str(where)
        self.what = shortened(what, MOST_SHOWN)
        self.next_step = next_step
        super().__init__("; ".join(_fitted(where, printable(self.what), printable(shortened(next_step, MOST_SHOWN)))))


@contextmanager
def naming_extras() -> Iterator[None]:
    """Turn the ModuleNotFoundError of a package of EXTRAS inside into an H1ExportError that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra, why = EXTRAS[package]
        raise H1ExportError(package, f"is not installed, and {why}", f"pip install 'h1export[{extra}]'") from None


def _fitted(where: object, what: str, next_step: str) -> tuple[str, str]:
    """Return both halves of a message of MOST_SHOWN characters; a path comes on top of them, and is not cut."""
    place = printable(shortened(str(where), LONGEST_PATH))
    path = place if isinstance(where, PurePath) else place.partition(": ")[0]  # before a tensor's name, for example
    if not isinstance(where, PurePath) and (path == place or not path.startswith("/")):
        path = ""
    part = shortened(place[len(path) :], MOST_PART)
    room = MOST_SHOWN - len(part) - len(": ; ")
    next_step = shortened(next_step, max(LEAST_SHOWN, room - len(what)))
    return f"{path}{part}: {shortened(what, room - len(next_step))}", next_step


def listed(folder: PurePath, name: str) -> PurePath:
    """Return the path, for a message, of a file of ``folder`` that a file of others names: a long name is cut."""
    return folder / shortened(name, MOST_NAME)


def shortened(text: str, most: int) -> str:
    """Return ``text`` with dots in the place of its middle, where it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    kept = most - 3
    return f"{text[: kept - kept // 3]}...{text[len(text) - kept // 3 :]}"


def printable(text: str) -> str:
    """Escape what controls a terminal or breaks the line, because names from foreign files must do neither.

    These are control characters, marks that reverse the direction of text, and line ends other than a newline too.
    Bytes that Python could not decode are shown as UTF-8, or as escapes.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(char) if _controls(char) else char for char in as_utf8(text))


def printable_text(text: str) -> str:
    """Escape as ``printable`` does, but leave newlines and tabs as they are."""
    return re.sub(r"[^\n\t]+", lambda part: printable(part[0]), text)


def as_utf8(text: str) -> str:
    """Return a text of the command line or the file system with the bytes that Python has kept undecoded as UTF-8.

    Bytes that are not UTF-8 become escapes such as \\xff.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a half of a character that no byte stands for
        return text


def reason(error: BaseException) -> str:
    """Return what is wrong with a text that could not be read, with the place and without the text itself."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: line {error.lineno}, column {error.colno}"
    if isinstance(error, KeyError):
        return f"no {shortened(str(error), MOST_REASON)}"
    mark = getattr(error, "problem_mark", None)  # of a YAML error
    if mark is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}"
    place = PLACE.search(str(error))
    if place is not None:
        return place[0]
    return shortened(" ".join(str(error).split()) or type(error).__name__, MOST_REASON)


@contextmanager
def native_error(where: object, what: str, next_step: str) -> Iterator[None]:
    """Make an H1ExportError of every error of a library below, panics of Rust among them, which are no Exception.

    Raises:
        H1ExportError: the library has raised; ``what`` is followed by its reason.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, H1ExportError):
        raise
    except BaseException as error:
        raise H1ExportError(where, f"{what} ({reason(error)})", next_step) from None


def _controls(char: str) -> bool:
    return char in BIDIRECTIONAL or unicodedata.category(char) in UNSHOWN


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
