"""A prompt comes from the command line, a file, or standard input, and is the same text from each."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.cli import run
from h1export.cli.prompt import read_prompt
from h1export.errors import H1ExportError

Pipe = Callable[[bytes], None]
TEXT = "import os  # é日本😀\n\tx"


class Stdin(io.TextIOWrapper):
    """Standard input of these bytes."""

    def __init__(self, data: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), "ascii")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    return lambda data: monkeypatch.setattr(sys, "stdin", Stdin(data))


def plain(text: str) -> bool:
    """Whether a text neither begins with a byte order mark nor ends in half of a line end."""
    return not text.startswith("\ufeff") and not text.endswith("\r")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(plain))
def test_a_piped_text_is_the_argument_without_its_last_line_end(text: str) -> None:
    kept = sys.stdin
    try:
        for end in ("\n", "\r\n"):
            sys.stdin = Stdin((text + end).encode())
            assert read_prompt("-", None) == text
        if not text.endswith("\n"):
            sys.stdin = Stdin(text.encode("utf-8-sig"))
            assert read_prompt(None, None) == text
    finally:
        sys.stdin = kept
    if text != "-":
        assert read_prompt(text, None) == text


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"a\n", "a"),
        (b"a\n\n", "a\n"),
        (b"a\r\n", "a"),
        (b"a\r\n\r\n", "a\r\n"),
        (b"a\r", "a\r"),
        (b"a ", "a "),
        (b"\n", ""),
        (b"", ""),
        (b"\xef\xbb\xbfa", "a"),
        ("é\u2028".encode(), "é\u2028"),
    ],
)
def test_line_ends_at_the_end(data: bytes, prompt: str, tmp_path: Path, pipe: Pipe) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    assert read_prompt(None, file) == prompt
    for words in (("-", None), (None, None), (None, Path("-"))):
        pipe(data)
        assert read_prompt(*words) == prompt


@pytest.mark.parametrize("data", [b"s3cret\xff", "s3cret".encode("utf-16"), b"s3cret\0"])
def test_input_that_is_not_text_is_refused(data: bytes, tmp_path: Path, pipe: Pipe) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    pipe(data)
    for words, where in (((None, file), str(file)), (("-", None), "standard input")):
        with pytest.raises(H1ExportError, match="is not text") as caught:
            read_prompt(*words)
        assert str(caught.value).startswith(f"{where}: ")
        assert "s3cret" not in str(caught.value)


def test_no_prompt_and_two_prompts_are_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"", terminal=True))
    with pytest.raises(click.UsageError, match="Missing argument 'PROMPT'"):
        read_prompt(None, None)
    with pytest.raises(click.UsageError, match="not both"):
        read_prompt("a", tmp_path)
    with pytest.raises(H1ExportError, match="cannot be read"):
        read_prompt(None, tmp_path)


def test_an_argument_that_python_could_not_decode_is_utf_8() -> None:
    assert read_prompt("é日".encode().decode("ascii", "surrogateescape"), None) == "é日"


@pytest.fixture(scope="module")
def built(tiny: Path, build: Callable[..., Artifact]) -> str:
    """An int4 artifact of the embedded model."""
    return str(build(tiny, "int4", accuracy_level=4).folder)


@pytest.mark.ort
def test_every_way_to_give_a_prompt_generates_the_same(
    built: str, tmp_path: Path, pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(TEXT + "\n", encoding="utf-8")
    answers = []
    for words in ([TEXT], ["-"], [], ["--file", str(file)], ["--file", "-"]):
        pipe(TEXT.encode() + b"\n")
        assert run(["generate", built, *words, "--max-tokens", "4", "--json"]) == 0
        answers.append(json.loads(capfd.readouterr().out))
    assert answers[0]["prompt"] == TEXT
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.ort
@pytest.mark.parametrize("repeats", [50_000, 500_000])
def test_a_prompt_beyond_the_context_is_one_line(
    repeats: int, built: str, pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe(b"x = 1\n" * repeats)
    assert run(["generate", built, "-"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "tokens, and the model's context is 4096; shorten it" in err


@pytest.mark.ort
def test_generated_control_characters_are_escaped_and_json_has_them(
    built: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "h1export.commands.generate.stream", lambda *_: iter(["a\n\t", "\x1b[31m", "\r", "[b]:x:", "é"])
    )
    assert run(["generate", built, "x"]) == 0
    assert capfd.readouterr().out == "a\n\t\\x1b[31m\\r[b]:x:é\n"
    assert run(["generate", built, "x", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == "a\n\t\x1b[31m\r[b]:x:é"
