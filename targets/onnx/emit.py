"""Walk a Program and let a target's table emit ONNX for every node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from torch.fx import Node

from h1export.artifact.manifest import StoredPart, StoredWeight
from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.probes import probes
from h1export.graphs.program import Program
from h1export.model.falcon_h1.probes import Columns, label
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedWeights
from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.onnx.external_data import ExternalData


class Context:
    """What emitters see: the builder, the weights, the values made so far, and ``stored`` to note quantised weights in."""

    activations: type[np.float16] | type[np.float32] = np.float32

    def __init__(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        builder: GraphBuilder,
        data: ExternalData,
    ) -> None:
        self.program = program
        self.store = store
        self.integers = integers
        self.build = builder
        self.data = data
        self.stored: list[StoredWeight] = []
        self._values: dict[Node, Value | tuple[Value, ...]] = {}

    def set(self, node: Node, *values: Value) -> None:
        """Bind a node to the value it stands for, or to its tuple of them."""
        self._values[node] = values if len(values) > 1 else values[0]

    def value(self, node: Any) -> Value:
        """The value of an emitted node, or the initializer of a weight or order placeholder."""
        expr = self.program.weight_of(node)
        if expr is not None:
            return self.weight(expr)
        if node.name in self.program.orders:
            return self.order(self.program.orders[node.name])
        value = self._values[node]
        assert isinstance(value, Value), f"{node} is a tuple"
        return value

    def item(self, node: Any, index: int) -> Value:
        """One output of an emitted node with several."""
        values = self._values[node]
        assert isinstance(values, tuple), f"{node} is a single value"
        return values[index]

    def probed(self, node: Node) -> tuple[Value, Columns | None]:
        """Where a probe's value is: the whole of a value, or columns of it."""
        return self.value(node), None

    def expr(self, node: Any) -> WeightExpr:
        expr = self.program.weight_of(node)
        assert expr is not None, f"{node} is not a weight"
        return expr

    def as_activation(self, value: Value) -> Value:
        """A float32 value in the activations' dtype."""
        return value if self.activations is np.float32 else self.build.op("Cast", value, to=int(ir.DataType.FLOAT16))

    def as_float32(self, value: Value) -> Value:
        """The inverse of ``as_activation``, but for the rounding."""
        return value if self.activations is np.float32 else self.build.op("Cast", value, to=int(ir.DataType.FLOAT))

    @property
    def masked(self) -> float:
        """What hides a key when added to its score: finite, so that a row of pads stays finite, and with room for a score below it."""
        return -float(np.finfo(self.activations).max) / 2

    def has(self, node: Node) -> bool:
        """Whether an emitter of an earlier node has made this one's value too."""
        return node in self._values

    def precision(self, expr: WeightExpr) -> Precision | None:
        """The integers that all parts of ``expr`` are stored in; None: float32."""
        (precision,) = {self.integers.precisions.get(part.tensor) for part in expr.parts}
        return precision

    def weight(self, expr: WeightExpr) -> Value:
        """``expr`` in float32 as an initializer in the external data, written once."""
        return self.build.initializer(self.data.once(expr, lambda: self._write(expr)))

    def _write(self, expr: WeightExpr) -> ir.ExternalTensor:
        tensor = self.data.place(initializer_name(expr), ir.DataType.FLOAT, expr.shape(self.store.shape))
        self.data.fill([tensor], (partial(_alone, block) for block in expr.lazy_blocks(self.store, BLOCK_BYTES)))
        return tensor

    def order(self, tensor: str) -> Value:
        """The order of a packed tensor's columns, int64 [columns]; written once for all that have it."""
        name = self.store.order_name(tensor)

        def write() -> ir.ExternalTensor:
            order = self.store.packed[tensor].order
            placed = self.data.place(name, ir.DataType.INT64, order.shape)
            self.data.fill([placed], [lambda: (order,)])
            return placed

        return self.build.initializer(self.data.once(("order", name), write))

    def small_tensor(self, name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.ExternalTensor:
        """A float32 tensor that the emitter itself computes with ``make``, when it is written: once."""

        def write() -> ir.ExternalTensor:
            tensor = self.data.place(name, ir.DataType.FLOAT, shape)
            self.data.fill([tensor], [partial(_alone, make)])
            return tensor

        return self.data.once(("small", name), write)


def _alone(block: Callable[[], Array]) -> tuple[Array]:
    return (block(),)


def stored_parts(c: Context, expr: WeightExpr) -> tuple[StoredPart, ...]:
    """What the manifest says about the parts of ``expr``."""
    return tuple(
        StoredPart(
            part.tensor, c.store.shape(part.tensor)[expr.axis], part.multiplier, order=c.store.order_name(part.tensor)
        )
        for part in expr.parts
    )


def initializer_name(expr: WeightExpr) -> str:
    """The checkpoint's name(s) of what an initializer is made of, and the functions that made it."""
    return ("+", "|")[expr.axis].join(".".join((part.tensor, *part.functions)) for part in expr.parts)


def name_probes(context: Context) -> None:
    """Name the emitted values that model/falcon_h1/probes.py speaks of; a Runner makes outputs of them when it is asked to observe."""
    parts: dict[Value, dict[str, Columns | None]] = {}
    for name, node in probes(context.program).items():
        value, columns = context.probed(node)
        parts.setdefault(value, {})[name] = columns
    for value, inside in parts.items():
        value.name = label(inside)


C = TypeVar("C", bound=Context)
Emitter = Callable[[C, Node], None]


def emit(context: C, table: Mapping[Any, Emitter[C]]) -> list[Value]:
    """Emit every node in order and return the output values; inputs must be set already.

    Raises:
        KeyError: an op that the table lacks; graphs.verify lists what a table must have.
    """
    graph = context.program.graph
    for node in graph.nodes:
        if node.op == "call_function" and not context.has(node):
            table[node.target](context, node)
    (result,) = [node for node in graph.nodes if node.op == "output"]
    return [context.value(node) for node in result.args[0]]
