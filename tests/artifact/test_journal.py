"""The journal: an extent is held only where its bytes have the recorded sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.journal import JOURNAL, Extent, Journal

DATA = bytes(range(200))
EXTENTS = [
    Extent("data", "a", 0, length=50),
    Extent("data", "b", 64, length=100),
    Extent("in/a/more", "c", 10, length=5),
]


def digest(extent: Extent) -> str:
    return hashlib.sha256(DATA[extent.offset : extent.offset + extent.length]).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, and a journal that has noted all of EXTENTS."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("data", "in/a/more"):
        (tmp_path / name).write_bytes(DATA)
    journal = Journal(tmp_path)
    for extent in EXTENTS:
        journal.add(extent, digest(extent))
    return tmp_path


def test_what_was_added_is_held(folder: Path) -> None:
    journal = Journal(folder)
    assert all(journal.holds(extent) for extent in EXTENTS)
    assert journal.files == {"data", "in/a/more"}


@pytest.mark.parametrize(
    "other",
    [
        Extent("data", "a", 0, length=49),
        Extent("data", "a", 64, length=50),
        Extent("data", "z", 0, length=50),
        Extent("x", "a", 0, length=50),
    ],
)
def test_another_extent_is_not_held(other: Extent, folder: Path) -> None:
    assert not Journal(folder).holds(other)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(place=st.integers(0, 199))
def test_one_changed_byte_loses_its_extent_only(place: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("journal")
    changed = bytearray(DATA)
    changed[place] ^= 1
    (folder / "data").write_bytes(changed)
    journal = Journal(folder)
    for extent in EXTENTS[:2]:
        journal.add(extent, digest(extent))
        assert journal.holds(extent) == (not extent.offset <= place < extent.offset + extent.length)


def test_a_file_cut_short_or_gone_holds_nothing(folder: Path) -> None:
    (folder / "data").write_bytes(DATA[:120])
    (folder / "in" / "a" / "more").unlink()
    assert [Journal(folder).holds(extent) for extent in EXTENTS] == [True, False, False]


def test_a_journal_cut_anywhere_keeps_its_whole_lines(folder: Path) -> None:
    """Half a line that a kill leaves is cut off, and lines added afterwards are read again."""
    text = (folder / JOURNAL).read_bytes()
    ends = [place + 1 for place, byte in enumerate(text) if byte == ord("\n")]
    for cut in range(len(text) + 1):
        (folder / JOURNAL).write_bytes(text[:cut])
        journal = Journal(folder)
        whole = sum(end <= cut for end in ends)
        assert [journal.holds(extent) for extent in EXTENTS] == [place < whole for place in range(3)]
        journal.add(Extent("data", "new", 1, length=2), hashlib.sha256(DATA[1:3]).hexdigest())
        assert Journal(folder).holds(Extent("data", "new", 1, length=2))


@pytest.mark.parametrize("line", [b"{}\n", b"[]\n", b"7\n", b"\xff\n", b"\n", b'{"sha256": "", "file": "x"}\n'])
def test_a_line_of_anything_else_ends_it(line: bytes, folder: Path) -> None:
    text = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(line + text)
    assert not Journal(folder).holds(EXTENTS[0])
    assert (folder / JOURNAL).read_bytes() == b""


def test_no_journal_is_made_before_there_is_something_to_note(tmp_path: Path) -> None:
    Journal(tmp_path)
    assert not list(tmp_path.iterdir())
