"""The writer of an .mlpackage: protobuf and manifest, whose bytes depend on the model alone, not on time or chance."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h1export.targets.coreml import sdk
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.weights import Var, Weights

SPECIFICATION_VERSION = 9  # iOS 18, macOS 15: int4 with block scales, states, functions
WEIGHTS_REFERENCE = "@model_path/weights/weight.bin"


def protobuf(program: Any, weights: Weights, notes: Mapping[str, str]) -> Any:
    """Convert a MIL program to a Model message, and write the bytes of its weights.

    Args:
        program: the MIL program; constants stand in for its large weights.
        weights: writes a weight and returns its offset in weight.bin.
        notes: entries of the user-defined metadata.
    """
    load, values = (sdk.module(f"coremltools.converters.mil.backend.mil.{name}") for name in ("load", "helper"))

    class Exporter(load.MILProtoExporter):  # type: ignore[name-defined,misc]
        """An exporter that takes large values from ``weights`` instead of the constants that stand in for them."""

        def get_milproto_value(self, var: Var) -> Any:
            """Return the Value message of a constant, which refers to weight.bin if it is large."""
            offset = weights.offset(var)
            if offset is None:
                return values.create_immediate_value(var)
            primitive = values.types_to_proto_primitive(var.sym_type.get_primitive())
            return values.create_file_value_tensor(
                file_name=WEIGHTS_REFERENCE, offset=offset, dim=var.shape, data_type=primitive
            )

    message = Exporter(prog=program, weights_dir="", specification_version=SPECIFICATION_VERSION).export()
    exporter = load.CoreMLProtoExporter(
        program, message, None, None, None, "mlprogram", "milinternal", SPECIFICATION_VERSION
    )
    model = exporter.export(SPECIFICATION_VERSION)
    model.description.metadata.userDefined.update(notes)
    return model


def write(folder: Path, model: Any) -> None:
    """Write the package except its weight.bin into ``folder``."""
    (folder / layout.MODEL).write_bytes(model.SerializeToString(deterministic=True))
    items = {
        "model.mlmodel": ("com.apple.CoreML/model.mlmodel", "CoreML Model Specification"),
        "weights": ("com.apple.CoreML/weights", "CoreML Model Weights"),
    }
    ids = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"h1export:{path}")).upper() for name, (path, _) in items.items()}
    entries = {
        ids[name]: {"author": "com.apple.CoreML", "description": description, "name": name, "path": path}
        for name, (path, description) in items.items()
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": ids["model.mlmodel"]}
    (folder / layout.PACKAGE / "Manifest.json").write_text(
        json.dumps(manifest, indent=4, sort_keys=True), encoding="utf-8"
    )
