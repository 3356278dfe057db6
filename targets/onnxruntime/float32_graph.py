"""The CUDA graph in float32 arithmetic, so that a CPU can run it and no rounding hides a fault."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HALF = ir.DataType.FLOAT16
FLOAT = ir.DataType.FLOAT


def widened(model: ir.Model) -> ir.Model:
    """``model`` with float32 wherever it has fp16: inputs, outputs, casts and, with the same values, initializers. Changed in place."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == HALF:
            value.dtype = FLOAT
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == HALF:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
            value.dtype = FLOAT
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == HALF:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    return model
