"""A small artifact that is written without a build, and what the tests of manifests and artifacts do to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from released_config import RELEASED

from h1export.artifact.artifact import Artifact, file_table
from h1export.artifact.manifest import MANIFEST, Manifest, StoredPart, StoredWeight
from h1export.artifact.staging import staged
from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

FILES = {
    "config.json": json.dumps(dict(RELEASED)).encode(),
    "model.mlpackage/Data/weights/weight.bin": bytes(reversed(range(256))),
    "model.mlpackage/Manifest.json": b"[]",
    "model.onnx": b"graph",
    "model.onnx.data": bytes(range(256)),
}
NESTED = "model.mlpackage/Data/weights/weight.bin"


def manifest_of(folder: Path, config: FalconH1Config) -> Manifest:
    """A manifest as a build would write it, without building anything."""
    shapes = tensor_shapes(config)
    name = "model.layers.0.mamba.in_proj.weight"
    rows = shapes[name][0]
    in_proj = StoredPart(name, rows, Multiplier(((192, 0.44), (rows - 192, 0.3125))))
    head = StoredPart("lm_head.weight", shapes["lm_head.weight"][1], Multiplier.scalar(0.39))
    return Manifest(
        target="onnxruntime",
        source="0" * 64,
        config=dataclasses.asdict(config),
        scheme={"quant": "int4", "group_size": 32},
        options={"accuracy_level": 4, "last_logits": False},
        toolchain={"numpy": "2.0.0", "h1export": "0.1.0"},
        inputs={"input_ids": ("int64", ("batch", "sequence"))},
        outputs={"logits": ("float32", ("batch", "sequence", 259))},
        weights=(
            StoredWeight("in_proj_q4", 4, 32, axis=0, parts=(in_proj,)),
            StoredWeight("head_q4", 4, 32, axis=1, parts=(head,)),
        ),
        weights_file="model.onnx.data",
        files=file_table(folder),
    )


def build(out: Path, config: FalconH1Config, reverse: bool = False) -> Artifact:
    """A small artifact at ``out``."""
    with staged(out, force=False, key="0123456789abcdef") as folder:
        for name in sorted(FILES, reverse=reverse):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(FILES[name])
        (folder / MANIFEST).write_text(manifest_of(folder, config).to_json(), encoding="utf-8")
    return Artifact.open(out)


def refused(folder: Path, *mentioned: str) -> None:
    with pytest.raises(H1ExportError) as caught:
        Artifact.open(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)), message
    assert all(text in message for text in mentioned), message
    assert caught.value.next_step


def rewrite(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> Path:
    """The manifest with its JSON changed in place."""
    path = artifact.folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return artifact.folder
