"""GraphBuilder: an ONNX graph, or a function of one, under construction, on onnx_ir's Tape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import tape
from onnx_ir.passes.common import RemoveUnusedNodesPass

from h1export import __version__

T = TypeVar("T")
Value = ir.Value
# Opset -> the IR version to write. Opset 23 came out with IR version 11, which older runtimes cannot read: hence 10.
IR_VERSIONS = {18: 8, 19: 9, 21: 10, 23: 10, 24: 11}


class GraphBuilder:
    """Appends nodes; constants are made once each; values are named after the nodes that make them."""

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self._tape = tape.Tape()
        self._opsets = dict(opsets)
        self._once: dict[Hashable, Any] = {}
        self._functions: dict[str, ir.Function] = {}

    def op(self, op_type: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """Append a node with one output."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self, op_type: str, outputs: int, *inputs: Value | None, domain: str = "", **attributes: Any
    ) -> tuple[Value, ...]:
        """Append a node with several outputs."""
        return tuple(self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, domain=domain))

    def call(self, function: ir.Function, *inputs: Value | None) -> Value:
        """Append a call of a function with one output, which becomes a function of the model."""
        self._functions[function.name] = function
        self._opsets[function.domain] = 1
        return self.op(function.name, *inputs, domain=function.domain)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make()`` returned the first time: the values of a subgraph that all layers share."""
        if key not in self._once:
            self._once[key] = make()
        made: T = self._once[key]
        return made

    def initializer(self, tensor: ir.TensorProtocol) -> Value:
        """Return the initializer of a tensor, one per name. Raises ValueError where two tensors have one name."""
        value = self.once(("initializer", tensor.name), lambda: self._tape.initializer(tensor))
        if value.const_value is not tensor:
            raise ValueError(f"two initializers are called {tensor.name!r}")
        return value

    def overridable(self, name: str, default: npt.NDArray[Any]) -> Value:
        """Return an input that callers may leave out: an initializer that is listed among the inputs, too."""
        return self._tape.initializer(ir.tensor(default, name=name))

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Value:
        """Return a small constant inside the model file, one per value."""
        array = np.asarray(value, dtype)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        return self.once(key, lambda: self._constant(array))

    def _constant(self, array: npt.NDArray[Any]) -> Value:
        return self._tape.initializer(ir.tensor(array, name=f"const_{len(self._once)}"))

    def ints(self, *values: int) -> Value:
        """Return a 1-D int64 constant."""
        return self.constant(values, np.int64)

    def model(self, inputs: list[Value], outputs: list[Value], name: str) -> ir.Model:
        """Return the finished model, without nodes that nothing reads."""
        nodes = self._tape.nodes
        initializers = self._tape.initializers
        graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=self._opsets, name=name)
        model = ir.Model(
            graph,
            ir_version=IR_VERSIONS[self._opsets[""]],
            producer_name="h1export",
            producer_version=__version__,
            functions=tuple(self._functions.values()),
        )
        RemoveUnusedNodesPass()(model)
        return model


class FunctionBuilder(GraphBuilder):
    """A GraphBuilder for the body of a function, which has no initializers: its constants are nodes."""

    def _constant(self, array: npt.NDArray[Any]) -> Value:
        return self.op("Constant", value=ir.tensor(array))

    def function(self, domain: str, name: str, *, given: Value, result: Value) -> ir.Function:
        """Return the finished function with one input and one output."""
        graph = ir.Graph([given], [result], nodes=self._tape.nodes, opset_imports=self._opsets, name=name)
        return ir.Function(domain, name, graph=graph, attributes=())
