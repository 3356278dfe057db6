"""What emitters see: a strongly typed network, in which every value has its dtype and nothing is converted but by a Cast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.onnx.emit import Context, initializer_name
from h1export.targets.tensorrt.network.layout import FLOAT
from h1export.targets.tensorrt.plugin.schema import OPS

OPSETS = {"": 24, "h1export": 1}
LOGICAL = ("And", "Equal", "LessOrEqual", "Or")
STATE_INPUT = {op.name: op.inputs.index(op.state) for op in OPS}


def result_types(node: ir.Node) -> list[ir.DataType | None]:
    """The dtype of each output, by ONNX's rules for the ops that this target emits."""
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
    """A GraphBuilder whose values know their dtypes; the model file has them too."""

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
        return self.ops(op_type, 1, *inputs, domain=domain, **attributes)[0]


class TensorRTContext(Context):
    """Context of a network whose activations are ``own``: fp16 or bf16.

    Small weights are stored in float32, and where activations read them a Cast follows, which the builder computes once; matrices
    are stored in ``own``.

    Attributes:
        write_indices: int64 [batch], where in the keys' buffer the call's tokens go.
        max_context: columns of that buffer.
    """

    def __init__(self, *args: Any, own: ir.DataType, write_indices: Value, max_context: int) -> None:
        super().__init__(*args)
        self.own = own
        self.write_indices = write_indices
        self.max_context = max_context

    def cast(self, value: Value, dtype: ir.DataType) -> Value:
        """``value`` in ``dtype``."""
        if value.dtype == dtype:
            return value
        return self.build.once((value, dtype), lambda: self.build.op("Cast", value, to=int(dtype)))  # type: ignore[no-any-return]

    def as_activation(self, value: Value) -> Value:
        return self.cast(value, self.own)

    def as_float32(self, value: Value) -> Value:
        return self.cast(value, FLOAT)

    def weight(self, expr: WeightExpr) -> Value:
        return self.as_activation(self.exact(expr))

    def exact(self, expr: WeightExpr) -> Value:
        """``expr`` in float32."""
        return super().weight(expr)

    def matrix(self, expr: WeightExpr) -> Value:
        """``expr`` in ``own``, written once. Raises H1ExportError for values beyond it."""
        return self.build.once((expr, "matrix"), lambda: self.build.initializer(self._write_own(expr)))  # type: ignore[no-any-return]

    def _write_own(self, expr: WeightExpr) -> ir.ExternalTensor:
        name = initializer_name(expr)
        tensor = self.data.place(name, self.own, expr.shape(self.store.shape))
        narrow = _half if self.own == ir.DataType.FLOAT16 else _brain
        self.data.fill([tensor], (partial(narrow, name, block) for block in expr.lazy_blocks(self.store, BLOCK_BYTES)))
        return tensor


def _half(name: str, block: Callable[[], Array]) -> tuple[npt.NDArray[np.float16]]:
    values = block()
    if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise H1ExportError(f'weights "{name}"', "hold values beyond fp16", "use --compute bf16")
    return (values.astype(np.float16),)


def _brain(_name: str, block: Callable[[], Array]) -> tuple[npt.NDArray[np.int16]]:
    """bf16, as the bits that NumPy has no name for."""
    return (torch.from_numpy(block()).to(torch.bfloat16).view(torch.int16).numpy(),)
