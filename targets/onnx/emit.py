"""Walk a Program and let a target's table emit ONNX for every node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch.fx import Node

from h1export.artifact.manifest import StoredPart, StoredWeight
from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.probes import probes
from h1export.graphs.program import Program, args_of
from h1export.model.falcon_h1.probes import Columns, label
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedWeights
from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.onnx.external_data import ExternalData


class Context:
    """The context of emitters: the graph under construction, the weights, and the values made so far.

    Attributes:
        activations: the dtype of the activations in the graph.
        program: the graph that is emitted.
        store: the checkpoint's tensors.
        integers: the precision and the integers of each quantised tensor.
        build: the ONNX graph under construction.
        data: the file of external data.
        stored: the quantised weights written so far, for the manifest.
    """

    activations: type[Any] = np.float32  # float32, float16 or ml_dtypes.bfloat16

    def __init__(  # noqa: PLR0917  subclasses pass the arguments on
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
        """Return the value of an emitted node, or the initializer of a weight or order placeholder."""
        expr = self.program.weight_of(node)
        if expr is not None:
            return self.weight(expr)
        if node.name in self.program.orders:
            return self.order(self.program.orders[node.name])
        value = self._values[node]
        assert isinstance(value, Value), f"{node} is a tuple"
        return value

    def item(self, node: Any, index: int) -> Value:
        """Return one output of an emitted node that has several."""
        values = self._values[node]
        assert isinstance(values, tuple), f"{node} is a single value"
        return values[index]

    def probed(self, node: Node) -> tuple[Value, Columns | None]:
        """Return the value that holds a probe, and the columns of it; None: the probe is the whole value."""
        return self.value(node), None

    def expr(self, node: Any) -> WeightExpr:
        """Return the expression behind a weight placeholder."""
        expr = self.program.weight_of(node)
        assert expr is not None, f"{node} is not a weight"
        return expr

    def cast(self, value: Value, dtype: ir.DataType) -> Value:
        """Append a Cast of ``value`` to ``dtype``."""
        return self.build.op("Cast", value, to=int(dtype))

    def as_activation(self, value: Value) -> Value:
        """Return a float32 value in the activations' dtype."""
        return (
            value
            if self.activations is np.float32
            else self.cast(value, ir.DataType.from_numpy(np.dtype(self.activations)))
        )

    def as_float32(self, value: Value) -> Value:
        """Return a value of the activations' dtype in float32."""
        return value if self.activations is np.float32 else self.cast(value, ir.DataType.FLOAT)

    @property
    def masked(self) -> float:
        """The number that hides a key when added to its score, in the activations' dtype."""
        return masked(self.activations)

    def has(self, node: Node) -> bool:
        """Whether an emitter of an earlier node has made this one's value too."""
        return node in self._values

    def precision(self, expr: WeightExpr) -> Precision | None:
        """Return the precision that all parts of ``expr`` are stored in; None: float32."""
        (precision,) = {self.integers.precisions.get(part.tensor) for part in expr.parts}
        return precision

    def is_multiplied(self, tensor: str) -> bool:
        """Return whether a product reads checkpoint ``tensor``; for an embedding, whether the head is tied to it."""
        weights = [self.expr(args_of(node)[1]) for node in self.program.calls(torch.ops.aten.linear.default)]
        return any(part.tensor == tensor for expr in weights for part in expr.parts)

    def weight(self, expr: WeightExpr) -> Value:
        """Return ``expr`` in the activations' dtype."""
        return self.exact(expr)

    def exact(self, expr: WeightExpr) -> Value:
        """Return ``expr`` in float32 as an initializer in the external data, which is written once."""
        return self.build.initializer(self.data.once(expr, lambda: self._write(expr)))

    def _write(self, expr: WeightExpr) -> ir.ExternalTensor:
        tensor = self.data.place(initializer_name(expr), ir.DataType.FLOAT, expr.shape(self.store.shape))
        self.data.fill([tensor], (partial(_alone, block) for block in expr.lazy_blocks(self.store, BLOCK_BYTES)))
        return tensor

    def order(self, tensor: str) -> Value:
        """Return the order of a packed tensor's columns, int64 [columns], written once for all that share it."""
        name = self.store.order_name(tensor)

        def write() -> ir.ExternalTensor:
            order = self.store.packed[tensor].order
            placed = self.data.place(name, ir.DataType.INT64, order.shape)
            self.data.fill([placed], [lambda: (order,)])
            return placed

        return self.build.initializer(self.data.once(("order", name), write))

    def computed_tensor(self, name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.ExternalTensor:
        """Write a float32 tensor that an emitter derives from weights, once; ``make`` runs when it is written."""

        def write() -> ir.ExternalTensor:
            tensor = self.data.place(name, ir.DataType.FLOAT, shape)
            self.data.fill([tensor], [partial(_alone, make)])
            return tensor

        return self.data.once(("small", name), write)

    def row_multipliers(self, expr: WeightExpr) -> Value:
        """Return the µP multiplier of each row of an expression along axis 0, float32 [rows]."""
        made = self.computed_tensor(
            f"{initializer_name(expr)}.multiplier",
            expr.shape(self.store.shape)[:1],
            lambda: np.concatenate([part.factors(self.store) for part in expr.parts]),
        )
        return self.build.initializer(made)

    def note_stored(self, expr: WeightExpr, precision: Precision) -> None:
        """Note that ``expr`` is stored in integers under its initializer's name, for the manifest."""
        parts = tuple(
            StoredPart(
                part.tensor,
                self.store.shape(part.tensor)[expr.axis],
                part.multiplier,
                order=self.store.order_name(part.tensor),
            )
            for part in expr.parts
        )
        self.stored.append(
            StoredWeight(initializer_name(expr), precision.bits, precision.group_size, axis=expr.axis, parts=parts)
        )


def masked(dtype: npt.DTypeLike) -> float:
    """Return a number of ``dtype`` that hides a key when added to its score: finite, so that a row of pads stays so."""
    return -float(ml_dtypes.finfo(dtype).max) / 2  # type: ignore[no-untyped-call]


def _alone(block: Callable[[], Array]) -> tuple[Array]:
    return (block(),)


def initializer_name(expr: WeightExpr) -> str:
    """Return an initializer's name: its tensors with their functions, joined by "+" (axis 0) or "|" (axis 1)."""
    return ("+", "|")[expr.axis].join(".".join((part.tensor, *part.functions)) for part in expr.parts)


def name_probes(context: Context) -> None:
    """Name the emitted values that probes read; a Runner makes outputs of them when it is requested to observe."""
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
