"""The graph of an artifact as a judge needs it: in float32 arithmetic, or with values between its ops as outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.probes import PREFIX
from h1export.targets.onnxruntime.float32_graph import float32_graph
from h1export.targets.onnxruntime.variants import GraphVariant


def changed(path: Path, variant: GraphVariant, options: Any, *, float32: bool, observed: bool) -> bytes:
    """Return the model in float32 arithmetic, with its probes as outputs, or both. Its external data stays where it is.

    In float32 there are no narrower activations or states, and products with integers have accuracy level 0.
    """
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    model = ir.load(path)
    if float32 and variant.state_layout.dtypes:
        model = float32_graph(model, weights=variant.half_activations)
    for node in model.graph:
        if float32 and "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        if observed:
            model.graph.outputs.extend(value for value in node.outputs if (value.name or "").startswith(PREFIX))
    if observed and not any((value.name or "").startswith(PREFIX) for value in model.graph.outputs):
        raise H1ExportError(path, "names no values between its ops", "build the artifact again")
    return bytes(ir.to_proto(model).SerializeToString())
