"""Artifact.open and file_table: a folder that differs from its manifest is refused, and the error names the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from artifact_files import FILES, NESTED, build, refused, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from released_config import RELEASED

from h1export.artifact.artifact import Artifact, file_table
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config


def test_the_file_table_is_sha256_and_size(artifact: Artifact) -> None:
    expected = {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in FILES.items()}
    assert artifact.manifest.files == expected
    assert list(file_table(artifact.folder)) == sorted([*FILES, MANIFEST])


def test_sizes_alone_read_no_file(artifact: Artifact) -> None:
    (artifact.folder / NESTED).chmod(0)
    assert file_table(artifact.folder, sizes_only=True)[NESTED] == (64 * "0", 256)


@pytest.mark.parametrize("name", ["link", "model.mlpackage/Data/link"])
@pytest.mark.parametrize("to", ["config.json", "model.mlpackage", "nowhere"])
def test_a_link_is_in_no_file_table(name: str, to: str, artifact: Artifact) -> None:
    """What a link leads to does not belong to the artifact, and Artifact.open would refuse it."""
    (artifact.folder / name).symlink_to(artifact.folder / to)
    with pytest.raises(H1ExportError, match=f"{name}: is not a plain file; a target writes plain files"):
        file_table(artifact.folder)


def test_a_name_with_a_backslash_is_in_no_file_table(artifact: Artifact) -> None:
    """Another system would read the backslash as a slash."""
    (artifact.folder / "a\\b").write_bytes(b"")
    with pytest.raises(H1ExportError, match="is not a plain file"):
        file_table(artifact.folder)


def test_the_config_is_read_from_the_artifacts_own_file(
    artifact: Artifact, released: dict[str, Any], config: FalconH1Config
) -> None:
    (artifact.folder / "config.json").write_text(json.dumps(released), encoding="utf-8")
    assert artifact.config == config


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", MANIFEST, "h1export build")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    refused(tmp_path, f"no {MANIFEST}", "h1export build")


def test_a_folder_in_the_manifests_place(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    refused(tmp_path, f"no {MANIFEST}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, artifact: Artifact) -> None:
    (artifact.folder / name).unlink()
    refused(artifact.folder, f"{name}: is missing", "build the artifact again")


def test_a_folder_in_a_files_place(artifact: Artifact) -> None:
    (artifact.folder / "model.onnx").unlink()
    (artifact.folder / "model.onnx").mkdir()
    refused(artifact.folder, "model.onnx: is missing")


@pytest.mark.parametrize(
    ("content", "size"), [(FILES["model.onnx.data"][:-1], 255), (FILES["model.onnx.data"] + b"x", 257), (b"", 0)]
)
def test_a_file_of_another_size(content: bytes, size: int, artifact: Artifact) -> None:
    (artifact.folder / "model.onnx.data").write_bytes(content)
    refused(artifact.folder, f"model.onnx.data: has {size} bytes", "says 256", "build the artifact again")


def test_a_link_in_a_files_place(artifact: Artifact, tmp_path: Path) -> None:
    """A link is refused even where it leads to the same bytes, because they may change later."""
    file = artifact.folder / "model.onnx.data"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(artifact.folder, MANIFEST, "'model.onnx.data'", "not a plain file")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_in_the_place_of_a_folder_on_the_way(depth: int, artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact.folder / "/".join(NESTED.split("/")[:depth])
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refused(artifact.folder, MANIFEST, repr(NESTED), "not a plain file")


def test_a_file_in_the_place_of_a_folder_on_the_way(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.folder / "model.mlpackage").rename(tmp_path / "elsewhere")
    (artifact.folder / "model.mlpackage").write_bytes(b"")
    refused(artifact.folder, f"{NESTED}: is missing")


LEAVING = ["../outside", "/", ".", "..", "", "./model.onnx", "model.onnx/", "a/../model.onnx"]
INSIDE = ["sub//inside", "sub/./inside", "sub/../sub/inside", "sub\\inside", "sub\\..\\model.onnx", "/sub/inside"]


@pytest.mark.parametrize("name", [*LEAVING, *INSIDE], ids=repr)
def test_listed_names_may_not_leave_the_folder(name: str, artifact: Artifact) -> None:
    """A file has exactly one valid name, too."""
    (artifact.folder.parent / "outside").write_bytes(b"graph")
    (artifact.folder / "sub").mkdir()
    for inside in ("sub/inside", "sub\\inside"):
        (artifact.folder / inside).write_bytes(b"graph")
    entry = artifact.manifest.files["model.onnx"]
    folder = rewrite(artifact, lambda data: data["files"].update({name: entry}))
    refused(folder, MANIFEST, repr(name), "not a plain file")


def test_listed_names_may_not_be_absolute(artifact: Artifact) -> None:
    outside = artifact.folder.parent / "outside"
    outside.write_bytes(b"graph")
    folder = rewrite(artifact, lambda data: data["files"].update({str(outside): artifact.manifest.files["model.onnx"]}))
    refused(folder, MANIFEST, str(outside), "not a plain file")


@pytest.mark.parametrize("name", ["a\0b", "none", "model.mlpackage", "model.mlpackage/none", "\ud800"], ids=ascii)
def test_listed_names_that_are_no_file(name: str, artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data["files"].update({name: [64 * "0", 0]})), "is missing")


def test_a_listed_name_too_long_for_the_file_system(artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data["files"].update({"x" * 300: [64 * "0", 0]})), "xxx", "is missing")


def test_hashes_of_an_untouched_artifact_hold(artifact: Artifact) -> None:
    artifact.check_hashes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(FILES)), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_hashes_see_one_bit(tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int) -> None:
    """The size is right, so open() does not see it; check_hashes() names the file."""
    artifact = build(tmp_path_factory.mktemp("flip") / "out", FalconH1Config.from_config(dict(RELEASED)))
    opened = Artifact.open(artifact.folder)
    content = bytearray(FILES[name])
    content[int(place * len(content))] ^= 1 << bit
    (artifact.folder / name).write_bytes(content)
    with pytest.raises(H1ExportError, match=f"{name}: was changed after the build; build the artifact again"):
        opened.check_hashes()


def test_reports_may_be_added(artifact: Artifact) -> None:
    (artifact.folder / "report.json").write_text("{}", encoding="utf-8")
    Artifact.open(artifact.folder).check_hashes()
