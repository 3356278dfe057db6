"""Copies of artifacts with changed bytes or a changed program."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Package
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.blob_storage import RECORD

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture
def with_changed_bytes(tmp_path: Path) -> Callable[[Artifact, str, str, Callable[[Bytes], Bytes]], Artifact]:
    """with_changed_bytes(artifact, weight, "data", change) -> a copy with other bytes in its weight.bin.

    They are the bytes of an input of the weight's constexpr op.
    """

    def make(artifact: Artifact, weight: str, part: str, change: Callable[[Bytes], Bytes]) -> Artifact:
        folder = Path(shutil.copytree(artifact.folder, tmp_path / "changed"))
        value: Any = Package.open(folder / layout.PACKAGE).operation(weight).inputs[part][0]
        stored = np.memmap(folder / layout.WEIGHTS, np.uint8, mode="r+")
        begin = value.blob.offset + RECORD
        end = begin + value.type.dtype.nbytes(int(np.prod(value.type.shape)))
        stored[begin:end] = change(stored[begin:end].copy())
        stored.flush()
        return Artifact(folder, artifact.manifest)

    return make


@pytest.fixture
def with_changed_program(tmp_path: Path) -> Callable[[Artifact, Callable[[Any], None]], Artifact]:
    """with_changed_program(artifact, edit) -> a copy after ``edit`` has changed its Model message."""

    def make(artifact: Artifact, edit: Callable[[Any], None]) -> Artifact:
        folder = Path(shutil.copytree(artifact.folder, tmp_path / "changed"))
        model = sdk.proto().Model_pb2.Model.FromString((folder / layout.MODEL).read_bytes())
        edit(model)
        (folder / layout.MODEL).write_bytes(model.SerializeToString())
        return Artifact(folder, artifact.manifest)

    return make
