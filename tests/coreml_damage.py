"""Changes of a saved Core ML package that make it invalid, for the tests of the evaluator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coremltools.proto import Model_pb2

DATA = "Data/com.apple.CoreML"

Damage = Callable[[Path], object]


def change_manifest(edit: Callable[[Any], object]) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "Manifest.json").read_text())
        edit(manifest)
        (path / "Manifest.json").write_text(json.dumps(manifest))

    return damage


def write(file: str, content: bytes) -> Damage:
    return lambda path: (path / file).write_bytes(content)


def change_model(edit: Callable[[Any], object]) -> Damage:
    def damage(path: Path) -> None:
        file = path / DATA / "model.mlmodel"
        model = Model_pb2.Model.FromString(file.read_bytes())
        edit(model)
        file.write_bytes(model.SerializeToString())

    return damage
