"""Foreign text in an error: escaped, cut, and without a file's content."""

from __future__ import annotations

import json
import tomllib
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from h1export.errors import MOST_SHOWN, H1ExportError, as_utf8, printable, printable_text, reason, shortened

CONTROLS = ["\x1b", "\r", "\a", "\b", "\x00", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff"]
KEPT = ["[bold]", "[/]", ":smile:", "é", "日本", "\u3000", "\u00a0", "👩\u200d💻", "{{ x }}", "%s", "\\", "a b"]
SECRET = "s3cret"


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_what_controls_a_terminal_is_escaped(control: str) -> None:
    assert printable(f"a{control}b") == f"a{control.encode('unicode_escape').decode()}b"
    assert control not in str(H1ExportError(f"where{control}", f"what{control}", f"next{control}"))


@pytest.mark.parametrize("text", KEPT, ids=ascii)
def test_other_text_is_what_it_is(text: str) -> None:
    assert printable(text) == text
    assert str(H1ExportError(text, text, text)) == f"{text}: {text}; {text}"


@given(st.text())
def test_a_printed_text_is_one_line_of_harmless_characters(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") for char in shown)
    assert printable(shown) == shown
    assert printable_text(text).count("\n") == text.count("\n")
    shown.encode("utf-8")


@given(st.binary())
def test_undecoded_bytes_are_shown_as_utf_8_or_as_escapes(raw: bytes) -> None:
    kept = raw.decode("ascii", "surrogateescape")
    assert as_utf8(kept) == raw.decode("utf-8", "backslashreplace")


@given(st.text(), st.text(), st.text(), st.integers(1, 500))
def test_a_message_is_short_whatever_is_in_it(where: str, what: str, next_step: str, times: int) -> None:
    assert len(str(H1ExportError(where * times, what * times, next_step * times))) <= MOST_SHOWN
    path = Path("/" + "folder/" * times)
    assert str(path) in str(H1ExportError(path, what * times, next_step * times))


@given(st.text(max_size=200), st.integers(10, 100))
def test_a_text_is_cut_in_the_middle(text: str, most: int) -> None:
    short = shortened(text, most)
    assert len(short) <= most
    assert short == text or ("..." in short and text.startswith(short[:4]))


def parsed(parse: Callable[[str], object], text: str) -> str:
    with pytest.raises((ValueError, yaml.YAMLError)) as caught:
        parse(text)
    return reason(caught.value)


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (json.loads, f'{{"{SECRET}": "{SECRET}" {SECRET}', "line 1, column 21"),
        (json.loads, f"{SECRET}", "line 1, column 1"),
        (tomllib.loads, f"a = 1\n{SECRET} {SECRET}", "line 2, column 8"),
        (tomllib.loads, f"a = '{SECRET}", "end of document"),
        (yaml.safe_load, f"a: 1\n{SECRET}: {SECRET}: {SECRET}", "line 2, column 15"),
        (yaml.safe_load, f"{SECRET}: [{SECRET}", "line 1, column"),
        (yaml.safe_load, f"!{SECRET} {SECRET}", "line 1, column 1"),
        (lambda text: text.encode("latin-1").decode(), f"{SECRET} é {SECRET}", "not UTF-8 at byte 7"),
    ],
)
def test_a_parsers_error_gives_the_place_and_not_the_text(parse: Callable[[str], object], text: str, says: str) -> None:
    found = parsed(parse, text)
    assert says in found
    assert SECRET not in found
