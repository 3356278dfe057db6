"""The context of emitters: a strongly typed network, in which every value has a dtype and only a Cast converts it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.onnx.emit import Context
from h1export.targets.onnx.narrow import narrow_matrix
from h1export.targets.tensorrt.network.layout import FLOAT
from h1export.targets.tensorrt.plugin.schema import OPS

OPSETS = {"": 24, "h1export": 1}
LOGICAL = ("And", "Equal", "LessOrEqual", "Or")
STATE_INPUT = {op.name: op.inputs.index(op.state) for op in OPS}


def result_types(node: ir.Node) -> list[ir.DataType | None]:
    """Return the dtype of each output, by ONNX's rules for the ops that this target emits."""
    first = next((value.dtype for value in node.inputs if value is not None), None)
    match node.op_type:
        case "Cast":
            return [ir.DataType(node.attributes["to"].as_int())]
        case "Shape":
            return [ir.DataType.INT64]
        case "DequantizeLinear":
            return [_type(node, 1)]
        case op if op in LOGICAL:
            return [ir.DataType.BOOL]
        case op if op in STATE_INPUT:
            return [first, _type(node, STATE_INPUT[op])]
    return [first] * len(node.outputs)


def _type(node: ir.Node, index: int) -> ir.DataType | None:
    value = node.inputs[index]
    return None if value is None else value.dtype


class TypedBuilder(GraphBuilder):
    """A GraphBuilder whose values have dtypes, which the model file records too."""

    def ops(
        self, op_type: str, outputs: int, *inputs: Value | None, domain: str = "", **attributes: Any
    ) -> tuple[Value, ...]:
        """Append a node with several outputs."""
        values = super().ops(op_type, outputs, *inputs, domain=domain, **attributes)
        node = values[0].producer()
        assert node is not None
        for value, dtype in zip(values, result_types(node), strict=True):
            value.type = None if dtype is None else ir.TensorType(dtype)
        return values

    def op(self, op_type: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """Append a node with one output."""
        return self.ops(op_type, 1, *inputs, domain=domain, **attributes)[0]


class TensorRTContext(Context):
    """A Context of activations in ``own``: fp16 or bf16.

    Small weights are stored in float32, and where activations read them a Cast follows, which TensorRT's builder
    computes once; matrices are stored in ``own``.

    Attributes:
        own: the dtype of activations.
        write_indices: int64 [batch], the column of the keys' buffer where the call's tokens go.
        max_context: columns of that buffer.
    """

    def __init__(self, *args: Any, own: ir.DataType, write_indices: Value, max_context: int) -> None:
        super().__init__(*args)
        self.own = own
        self.write_indices = write_indices
        self.max_context = max_context

    def cast(self, value: Value, dtype: ir.DataType) -> Value:
        """Return ``value`` in ``dtype``, by a Cast that is made once; none where it has that dtype."""
        if value.dtype == dtype:
            return value
        return self.build.once((value, dtype), lambda: self.build.op("Cast", value, to=int(dtype)))

    def as_activation(self, value: Value) -> Value:
        return self.cast(value, self.own)

    def as_float32(self, value: Value) -> Value:
        return self.cast(value, FLOAT)

    def weight(self, expr: WeightExpr) -> Value:
        return self.as_activation(self.exact(expr))

    def matrix(self, expr: WeightExpr) -> Value:
        """Return ``expr`` in ``own``, written once. Raises H1ExportError for values beyond it."""
        return narrow_matrix(self, expr, self.own, next_step="use --compute bf16")
