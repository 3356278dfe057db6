"""Text that people bring: UTF-8 with or without a byte order mark, or one line that says where it is not."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_files import ODD, bounded

from h1export.checkpoint.text_file import decode, read_text
from h1export.errors import H1ExportError


@given(st.text().filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_utf_8_is_read_with_or_without_its_mark(text: str) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        assert decode(text.encode(encoding), "x") == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"abc\xffdef", "is not UTF-8 at byte 3"),
        (b"\xef\xbb\xbfabc\xffdef", "is not UTF-8 at byte 6"),
        (b"abc\xe6\x97", "is not UTF-8 at byte 3"),
        (b"\xed\xa0\x80", "is not UTF-8 at byte 0"),
        ("héllo".encode("latin-1"), "is not UTF-8 at byte 1"),
        ("abc".encode("utf-16"), "it is UTF-16"),
        ("abc".encode("utf-32"), "it is UTF-32"),
        ("abc".encode("utf-16-le"), "byte 1 is NUL"),
        (b"ab\0", "byte 2 is NUL"),
    ],
)
def test_other_bytes_are_refused_by_their_place(data: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(H1ExportError, match=says) as caught:
        read_text(file, "--text")
    assert str(file) in str(caught.value)
    assert "def" not in str(caught.value)


@pytest.mark.parametrize("nbytes", range(1, 12))
def test_a_part_of_a_text_has_whole_characters(nbytes: int, tmp_path: Path) -> None:
    text = "é日😀x!"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert read_text(file, "--text", nbytes) == text.encode()[:nbytes].decode("utf-8", "ignore")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(H1ExportError, match="cannot be read") as caught:
            read_text(file, "--file")
        assert "give another --file" in str(caught.value)


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_text_is_neither_waited_for_nor_loaded(odd: str, tmp_path: Path) -> None:
    ODD[odd](tmp_path / "text.txt")
    with bounded(), pytest.raises(H1ExportError, match=r"text\.txt: "):
        read_text(tmp_path / "text.txt", "--text")


def test_a_text_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"a" * 100)
    assert read_text(tmp_path / "text.txt", "--text", most=100) == "a" * 100
    assert read_text(tmp_path / "text.txt", "--text", 7, most=10) == "a" * 7
    with pytest.raises(
        H1ExportError, match="has more than the 99 bytes that are read of a plan; give a shorter --text"
    ):
        read_text(tmp_path / "text.txt", "--text", kind="a plan", most=99)


@pytest.mark.parametrize("delay", [0.0, 0.3])
@pytest.mark.parametrize("nbytes", [0, 3])
def test_a_pipe_is_read_to_its_end(delay: float, nbytes: int, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "é日 " * 100_000

    def write() -> None:
        with suppress(BrokenPipeError):  # the reader had enough
            pipe.write_text(text, encoding="utf-8")

    writer = threading.Timer(delay, write)
    writer.start()
    found = read_text(pipe, "--text", nbytes)
    writer.join()
    assert found == (text.encode()[:nbytes].decode("utf-8", "ignore") if nbytes else text)


def test_a_pipe_of_the_shell_may_take_its_time(tmp_path: Path) -> None:
    """Process substitution names a pipe that has a writer from the beginning."""
    reading, writing = os.pipe()
    place = Path(f"/dev/fd/{reading}")
    writer = threading.Timer(1.3, lambda: (os.write(writing, b"text"), os.close(writing)))
    writer.start()
    assert read_text(place, "--text") == "text"
    writer.join()
    os.close(reading)
