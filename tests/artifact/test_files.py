"""The files of a folder by relative name, sorted and without what links lead to; their sizes and sha256."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.files import (
    NOT_PLAIN,
    READ_BYTES,
    folders,
    is_name,
    names,
    plain_size,
    sha256_file,
    sha256_range,
)
from h1export.errors import H1ExportError

FILES = ("a", "b/c", "b-", "b/.hidden", "b/d/e")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with FILES, an empty folder, and links to a file, to a folder outside it and to nothing."""
    inside = tmp_path / "inside"
    for name in FILES:
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(name, encoding="utf-8")
    (inside / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret", encoding="utf-8")
    (inside / "b" / "to_folder").symlink_to(tmp_path / "outside")
    (inside / "to_file").symlink_to("a")
    (inside / "to_nothing").symlink_to("nowhere")
    return inside


def test_names_are_sorted_as_texts_and_hold_links_but_nothing_behind_them(folder: Path) -> None:
    assert names(folder) == sorted([*FILES, "b/to_folder", "to_file", "to_nothing"])


def test_folders_come_after_those_inside_them(folder: Path) -> None:
    found = list(folders(folder))
    assert sorted(found) == [folder / "b", folder / "b" / "d", folder / "empty"]
    assert found.index(folder / "b" / "d") < found.index(folder / "b")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        names(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        list(folders(tmp_path / "none"))


def test_sizes_are_those_of_regular_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert {name: plain_size(folder, name) for name in FILES} == {name: len(name) for name in FILES}
    assert [
        plain_size(folder, name) for name in ("b", "empty", "none", "b/none", "a/b", "pipe", "a\0b", "x" * 300)
    ] == [None] * 8


@pytest.mark.parametrize("name", ["to_file", "to_nothing", "b/to_folder", "b/to_folder/file"])
def test_links_are_not_plain_wherever_they_stand(name: str, folder: Path) -> None:
    assert plain_size(folder, name) == NOT_PLAIN


BAD = ["", ".", "..", "/", "/a", "a/", "a//b", "./a", "a/.", "a/./b", "../a", "a/..", "a/../b", "a\\b", "..\\a", "\\"]


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_names_that_could_lead_elsewhere(name: str, folder: Path) -> None:
    assert not is_name(name)
    assert plain_size(folder, name) == NOT_PLAIN


@pytest.mark.parametrize(
    "name", ["a", "a/b", "...", "a..b/.c", "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "ä b"]
)
def test_names_that_stay(name: str) -> None:
    assert is_name(name)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from(["", ".", "..", "a", "a.b", "\\"]), min_size=1, max_size=5))
def test_a_name_is_what_normalising_leaves_alone(parts: list[str]) -> None:
    name = "/".join(parts)
    assert is_name(name) == (
        os.path.normpath(name) == name and not name.startswith(("/", "..", "\\")) and name != "." and "\\" not in name
    )


def test_the_sha256_of_a_file_and_of_a_range_of_it(tmp_path: Path) -> None:
    """A range that is longer than the file ends with the file."""
    data = os.urandom(READ_BYTES + 5)
    (tmp_path / "data").write_bytes(data)
    assert sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    with (tmp_path / "data").open("rb") as stream:
        assert sha256_range(stream.fileno(), 3, READ_BYTES + 1) == hashlib.sha256(data[3:-1]).hexdigest()
        assert sha256_range(stream.fileno(), READ_BYTES, 99) == hashlib.sha256(data[READ_BYTES:]).hexdigest()


def test_a_file_without_a_sha256_is_named(tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match=r"none: cannot be read \(No such file.*\); check its permissions"):
        sha256_file(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["C:evil", "a:b", "C:/x", "a\\b", "../a", "a/../b", "/a", "a//b", "a/", "./a", "", "."]
)
def test_names_that_lead_elsewhere_on_some_system(name: str, folder: Path) -> None:
    assert not is_name(name)
    assert plain_size(folder, name) == NOT_PLAIN
