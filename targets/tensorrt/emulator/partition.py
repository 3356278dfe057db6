"""A network cut into pieces that ONNX Runtime executes, in the arithmetic of its dtypes.

The nodes are those of model.onnx, which a builder of TensorRT is given. Every piece computes in float32: values that the network
declares in fp16 or bf16 are rounded to it after each op, or, to judge the lowering alone, not at all. Between the pieces lie the
plugins' nodes, and before them all is what constants alone make, which is computed once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from h1export.errors import H1ExportError
from h1export.targets.tensorrt.plugin.schema import NAMESPACE

FLOAT = TensorProto.FLOAT
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
MOVING = frozenset(  # these round nothing
    [
        "Concat",
        "Gather",
        "GatherElements",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
    ]
)
# prefixes of a value before its rounding, and of the largest magnitude there
EXACT = "exact|"
PEAK = "peak|"
STORED = "stored|"  # of an initializer as the file has it


@dataclass(frozen=True)
class Subgraph:
    """``model``: standard nodes; ``peaks``: its output -> the kind of op that it is the largest magnitude of."""

    model: ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    peaks: Mapping[str, str]


class Partitioner:
    """Cuts ``network``, whose data stays where it is. ``rounded``: in the declared dtypes; ``shown``: values to keep.

    Raises:
        H1ExportError: a value whose dtype the network does not declare.
    """

    def __init__(self, network: ModelProto, rounded: bool, shown: Collection[str] = ()) -> None:
        self._network = network
        self._rounded = rounded
        graph = network.graph
        self._types = {
            info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input, *graph.output)
        }
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        for name in (name for node in graph.node for name in node.output if name not in self._types):
            raise H1ExportError("model.onnx", f"declares no dtype of value {name!r}", "build the artifact again")
        self._kept = {*(output.name for output in graph.output), *shown}

    def constants(self) -> Subgraph:
        """What initializers alone make, and the initializers that other nodes read."""
        fixed = self._fixed_nodes()
        made = {name for node in fixed for name in node.output} | {
            tensor.name for tensor in self._network.graph.initializer
        }
        return self._piece(fixed, sorted(made & self._read_by(self._moving_nodes())), initializers=True)

    def steps(self) -> Iterator[Subgraph | NodeProto]:
        """The rest in order: pieces, and nodes of the plugin."""
        pending: list[NodeProto] = []
        nodes = self._moving_nodes()
        for index, node in enumerate(nodes):
            if node.domain != NAMESPACE:
                pending.append(node)
                continue
            if pending:
                yield self._needed(pending, nodes[index:])
            pending = []
            yield node
        yield self._needed(pending, [])

    def is_half(self, name: str) -> bool:
        """Whether a value is declared in fp16 or bf16."""
        return self._types[name] in HALVES

    @property
    def half(self) -> int:
        """Of the activations: the type of the first state."""
        return int(next(self._types[info.name] for info in self._network.graph.input if self.is_half(info.name)))

    def _fixed_nodes(self) -> list[NodeProto]:
        known = {"", *(tensor.name for tensor in self._network.graph.initializer)}
        fixed = []
        for node in self._network.graph.node:
            if node.domain != NAMESPACE and known.issuperset(node.input):
                known |= {*node.output}
                fixed.append(node)
        return fixed

    def _moving_nodes(self) -> list[NodeProto]:
        fixed = {name for node in self._fixed_nodes() for name in node.output}
        return [node for node in self._network.graph.node if fixed.isdisjoint(node.output)]

    def _read_by(self, nodes: Sequence[NodeProto]) -> set[str]:
        return {name for node in nodes for name in node.input if name}

    def _needed(self, nodes: list[NodeProto], later: Sequence[NodeProto]) -> Subgraph:
        made = {name for node in nodes for name in node.output}
        return self._piece(nodes, sorted(made & (self._read_by(later) | self._kept)))

    def _piece(self, nodes: Sequence[NodeProto], outputs: list[str], initializers: bool = False) -> Subgraph:
        made = {name for node in nodes for name in node.output}
        tensors, loads = self._initializers(outputs) if initializers else ([], [])
        inputs = () if initializers else tuple(sorted(self._read_by(nodes) - made))
        peaks: dict[str, str] = {}
        body = [*loads, *(one for node in nodes for one in self._emulated(node, peaks))]
        infos = [*map(self._info, outputs), *(helper.make_tensor_value_info(peak, FLOAT, ()) for peak in peaks)]
        graph = helper.make_graph(body, "piece", [self._info(name) for name in inputs], infos, tensors)
        model = helper.make_model(graph, opset_imports=self._network.opset_import, ir_version=self._network.ir_version)
        return Subgraph(model, inputs, tuple(outputs), peaks=peaks)

    def _info(self, name: str) -> ValueInfoProto:
        kind = self._types[name]
        return helper.make_tensor_value_info(name, FLOAT if kind in HALVES else kind, None)

    def _initializers(self, outputs: Collection[str]) -> tuple[list[TensorProto], list[NodeProto]]:
        """All of them, and nodes for those that need another form: float32 in place of what is shorter, and what an output can be."""
        tensors = []
        loads = []
        for tensor in self._network.graph.initializer:
            stored = TensorProto()
            stored.CopyFrom(tensor)
            tensors.append(stored)
            if tensor.data_type in HALVES or tensor.name in outputs:
                stored.name = STORED + tensor.name
                how: dict[str, Any] = (
                    {"op_type": "Cast", "to": FLOAT} if tensor.data_type in HALVES else {"op_type": "Identity"}
                )
                loads.append(helper.make_node(inputs=[stored.name], outputs=[tensor.name], **how))
        return tensors, loads

    def _emulated(self, node: NodeProto, peaks: dict[str, str]) -> Iterator[NodeProto]:
        """``node`` in float32, and what rounds its outputs."""
        wide = NodeProto()
        wide.CopyFrom(node)
        for attribute in wide.attribute:
            if wide.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
                attribute.i = FLOAT
        short = [name for name in node.output if self._rounded and self.is_half(name) and node.op_type not in MOVING]
        del wide.output[:]
        wide.output.extend(EXACT + name if name in short else name for name in node.output)
        yield wide
        for name in short:
            yield helper.make_node("Cast", [EXACT + name], [f"{EXACT}{EXACT}{name}"], to=self._types[name])
            yield helper.make_node("Cast", [f"{EXACT}{EXACT}{name}"], [name], to=FLOAT)
            if self._types[name] == TensorProto.FLOAT16:
                yield helper.make_node("Abs", [EXACT + name], [f"{PEAK}{EXACT}{name}"])
                yield helper.make_node("ReduceMax", [f"{PEAK}{EXACT}{name}"], [PEAK + name], keepdims=0)
                peaks[PEAK + name] = node.op_type
