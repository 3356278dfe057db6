"""Artifacts of an object store: copied once, compared with the manifest, never half there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from artifact_files import FILES, build

from h1export.artifact.artifact import Artifact
from h1export.artifact.fetched import fetched
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

PLACE = "memory://bucket/falcon"


@pytest.fixture
def store(tmp_path: Path, config_of: Callable[..., FalconH1Config]) -> Iterator[Any]:
    """fsspec's store in memory, with an artifact at PLACE."""
    files = fsspec.filesystem("memory")
    artifact = build(tmp_path / "built", config_of())
    files.put(f"{artifact.folder}/", "/bucket/falcon/", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


def test_a_folder_is_no_copy(tmp_path: Path) -> None:
    assert fetched(str(tmp_path), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_an_artifact_is_copied_once(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several ask at the same moment, and again where the copy was damaged."""
    opened: list[str] = []
    whole = type(store).open
    monkeypatch.setattr(
        type(store), "open", lambda self, path, *a, **b: (opened.append(path), whole(self, path, *a, **b))[1]
    )
    with ThreadPoolExecutor(4) as pool:
        (out,) = set(pool.map(lambda _: fetched(PLACE, tmp_path / "cache"), range(4)))
    assert sorted(name.removeprefix("/bucket/falcon/") for name in opened if not name.endswith(MANIFEST)) == sorted(
        FILES
    )
    assert Artifact.open(out).identity == Artifact.open(tmp_path / "built").identity
    Artifact.open(out).check_hashes()
    assert out.name.startswith("falcon-")
    (out / "model.onnx").unlink()
    assert fetched(f"{PLACE}/", tmp_path / "cache") == out
    Artifact.open(out).check_hashes()


def test_another_artifact_at_the_address_is_another_copy(store: Any, tmp_path: Path) -> None:
    first = fetched(PLACE, tmp_path)
    manifest = json.loads(store.cat_file("/bucket/falcon/manifest.json"))
    manifest["scheme"]["quant"] = "int8"
    store.pipe_file("/bucket/falcon/manifest.json", json.dumps(manifest).encode())
    second = fetched(PLACE, tmp_path)
    assert first != second
    assert (Artifact.open(first).manifest.scheme["quant"], Artifact.open(second).manifest.scheme["quant"]) == (
        "int4",
        "int8",
    )
    store.pipe_file("/bucket/falcon/manifest.json.sig", b"s" * 64)
    assert (fetched(PLACE, tmp_path) / "manifest.json.sig").read_bytes() == b"s" * 64


def changed(files: Any, name: str, data: bytes | None) -> None:
    path = f"/bucket/falcon/{name}"
    files.rm(path) if data is None else files.pipe_file(path, data)


def outside(files: Any) -> None:
    manifest = json.loads(files.cat_file("/bucket/falcon/manifest.json"))
    manifest["files"]["../outside"] = manifest["files"]["model.onnx"]
    files.pipe_file("/bucket/falcon/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: changed(files, "model.onnx", b"other"), "other bytes than the manifest says"),
        (lambda files: changed(files, "model.onnx", b"grap"), "other bytes than the manifest says"),
        (lambda files: changed(files, "model.onnx", b"graph and more"), "other bytes than the manifest says"),
        (lambda files: changed(files, "model.onnx", None), "cannot be read there"),
        (lambda files: changed(files, MANIFEST, None), "cannot be read there"),
        (lambda files: changed(files, MANIFEST, b"{}"), "not a manifest"),
        (outside, "outside the folder"),
    ],
    ids=["bytes", "short", "long", "missing", "no manifest", "no form", "outside"],
)
def test_what_is_not_whole_is_not_there(
    damage: Callable[[Any], None], message: str, store: Any, tmp_path: Path
) -> None:
    damage(store)
    with pytest.raises(H1ExportError, match=message) as caught:
        fetched(PLACE, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [file.name for file in (tmp_path / "cache").glob("*") if not file.name.endswith(".lock")] == []
    assert not (tmp_path / "outside").exists()


def test_an_unknown_kind_of_address(tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="cannot be read there"):
        fetched("nosuch://bucket/falcon", tmp_path)
