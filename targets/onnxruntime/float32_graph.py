"""A graph with narrow values in float32 arithmetic, so that a CPU can run it and no rounding hides a fault."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from h1export.targets.onnxruntime import int8_rows

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT = ir.DataType.FLOAT


def float32_graph(model: ir.Model, *, weights: bool) -> ir.Model:
    """Replace fp16, bf16 and rows in int8 by float32 in ``model`` and return it: inputs, outputs and casts.

    ``weights``: initializers too. Where activations are float32 anyway, those in 16 bits are scales and tables, which
    their ops read as they are.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype in HALVES:
            value.dtype = FLOAT
        if value.dtype == ir.DataType.INT8 and value.shape is not None:
            *outer, width = value.shape
            value.dtype = FLOAT
            if isinstance(width, int):
                value.shape = ir.Shape([*outer, int8_rows.columns_of(width)])
    for name, value in model.graph.initializers.items() if weights else ():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in HALVES:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
            value.dtype = FLOAT
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() in HALVES:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
        if node.domain == int8_rows.DOMAIN:
            node.domain, node.op_type = "", "Identity"
    model.functions.clear()
    return model
