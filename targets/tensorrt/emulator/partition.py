"""Partitioner: divides a TensorRT network into subgraphs that ONNX Runtime can execute, and nodes of the plugin.

The nodes are those of model.onnx, the file that TensorRT's builder reads. Every subgraph computes in float32. Values
that the network declares as fp16 or bf16 are rounded to that dtype after each op, or, to judge the lowering alone, not
at all. A first subgraph computes everything that depends on constants only; it runs once.
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
MOVING = frozenset(  # ops that move values without computing, so their results need no rounding
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
EXACT = "exact|"  # prefix of a value before its rounding
PEAK = "peak|"  # prefix of the largest magnitude of a value before its rounding
STORED = "stored|"  # prefix of an initializer in its stored dtype


@dataclass(frozen=True)
class Subgraph:
    """A part of the network without nodes of the plugin.

    Attributes:
        model: the ONNX model of its nodes.
        inputs: names of the values that it reads.
        outputs: names of the values that it computes for later steps.
        peaks: further output of the model -> the kind of op whose largest magnitude it is.
    """

    model: ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    peaks: Mapping[str, str]


class Partitioner:
    """Divides ``network`` into steps; its external data is not read.

    Args:
        network: the network.
        rounded: round values to their declared dtypes.
        shown: names of values that the steps must give as outputs.

    Raises:
        H1ExportError: the network does not declare the dtype of a value.
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
        """Return the subgraph of every value that depends on initializers only, initializers included."""
        fixed = self._fixed_nodes()
        made = {name for node in fixed for name in node.output} | {
            tensor.name for tensor in self._network.graph.initializer
        }
        return self._subgraph(fixed, sorted(made & self._read_by(self._variable_nodes())), initializers=True)

    def steps(self) -> Iterator[Subgraph | NodeProto]:
        """Yield the remaining nodes in order, as subgraphs and single nodes of the plugin."""
        pending: list[NodeProto] = []
        nodes = self._variable_nodes()
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
        """Return whether a value is declared as fp16 or bf16."""
        return self._types[name] in HALVES

    @property
    def half(self) -> int:
        """The ONNX dtype of the activations, which is that of the first input in fp16 or bf16, a state."""
        return int(next(self._types[info.name] for info in self._network.graph.input if self.is_half(info.name)))

    def _fixed_nodes(self) -> list[NodeProto]:
        """Return the nodes that depend on initializers only."""
        known = {"", *(tensor.name for tensor in self._network.graph.initializer)}
        fixed = []
        for node in self._network.graph.node:
            if node.domain != NAMESPACE and known.issuperset(node.input):
                known |= {*node.output}
                fixed.append(node)
        return fixed

    def _variable_nodes(self) -> list[NodeProto]:
        """Return the nodes that depend on the inputs of a call."""
        fixed = {name for node in self._fixed_nodes() for name in node.output}
        return [node for node in self._network.graph.node if fixed.isdisjoint(node.output)]

    def _read_by(self, nodes: Sequence[NodeProto]) -> set[str]:
        return {name for node in nodes for name in node.input if name}

    def _needed(self, nodes: list[NodeProto], later: Sequence[NodeProto]) -> Subgraph:
        """Return the subgraph of ``nodes`` with the outputs that ``later`` nodes or the caller need."""
        made = {name for node in nodes for name in node.output}
        return self._subgraph(nodes, sorted(made & (self._read_by(later) | self._kept)))

    def _subgraph(self, nodes: Sequence[NodeProto], outputs: list[str], initializers: bool = False) -> Subgraph:
        made = {name for node in nodes for name in node.output}
        tensors, loads = self._initializers(outputs) if initializers else ([], [])
        inputs = () if initializers else tuple(sorted(self._read_by(nodes) - made))
        peaks: dict[str, str] = {}
        body = [*loads, *(one for node in nodes for one in self._emulated(node, peaks))]
        infos = [*map(self._info, outputs), *(helper.make_tensor_value_info(peak, FLOAT, ()) for peak in peaks)]
        input_infos = [self._info(name) for name in inputs]
        graph = helper.make_graph(body, "subgraph", input_infos, infos, initializer=tensors)
        model = helper.make_model(graph, opset_imports=self._network.opset_import, ir_version=self._network.ir_version)
        return Subgraph(model, inputs, tuple(outputs), peaks=peaks)

    def _info(self, name: str) -> ValueInfoProto:
        kind = self._types[name]
        return helper.make_tensor_value_info(name, FLOAT if kind in HALVES else kind, None)

    def _initializers(self, outputs: Collection[str]) -> tuple[list[TensorProto], list[NodeProto]]:
        """Return all initializers, and nodes that convert some of them.

        A Cast turns fp16 and bf16 into float32. An Identity copies an initializer that is an output, so that a node
        computes every output.
        """
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
        """Yield ``node`` in float32, and the nodes that round its outputs and find their largest magnitude."""
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
