"""Program: the traced model as every target receives it; EditableProgram: a copy that passes rewrite."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec

Op = torch._ops.OpOverload


@dataclass(frozen=True)
class Rewrites:
    """The number of places that the pass ``name`` has rewritten."""

    name: str
    count: int


def args_of(node: Any) -> tuple[Any, ...]:
    """Returns the node's arguments, whose types follow from the op's schema and from graphs.verify."""
    args: tuple[Any, ...] = node.args
    return args


@dataclass(frozen=True)
class Program:
    """One ATen graph without weights; states are explicit inputs and outputs.

    Attributes:
        config: the architecture that it was traced from.
        states: its states, in the order of the graph's inputs and outputs.
        module: the graph; placeholders are weights, constants, orders or inputs, and the output is a flat tuple.
        weights: placeholder -> the expression of checkpoint tensors that gives its value.
        constants: placeholder -> a µP vector that no pass has folded yet.
        inputs: placeholder -> I/O name.
        outputs: I/O names in the order of the output tuple.
        orders: placeholder, int64 [columns] -> the packed checkpoint tensor whose order of columns it holds.
        rewrites: the rewrites of each pass that has run, in order.
    """

    config: FalconH1Config
    states: StateSpec
    module: GraphModule
    weights: Mapping[str, WeightExpr]
    constants: Mapping[str, Multiplier]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    orders: Mapping[str, str] = field(default_factory=dict)
    rewrites: Sequence[Rewrites] = ()

    @property
    def graph(self) -> Graph:
        return self.module.graph

    def editable(self) -> EditableProgram:
        """Returns a copy whose graph and mappings a pass may change."""
        return EditableProgram(
            self.config,
            self.states,
            copy.deepcopy(self.module),
            weights=dict(self.weights),
            constants=dict(self.constants),
            inputs=self.inputs,
            outputs=self.outputs,
            orders=dict(self.orders),
            rewrites=list(self.rewrites),
        )

    def calls(self, *ops: Op) -> Iterator[Node]:
        """Yield the nodes that call one of ``ops``, in graph order. Callers may edit the graph meanwhile."""
        yield from [node for node in self.graph.nodes if node.op == "call_function" and node.target in ops]

    def weight_of(self, node: object) -> WeightExpr | None:
        """Returns the expression behind a placeholder node; None for anything else."""
        return self.weights.get(node.name) if isinstance(node, Node) and node.op == "placeholder" else None


@dataclass(frozen=True)
class EditableProgram(Program):
    """A Program while passes run: its graph, weights, constants and orders may be changed in place."""

    weights: dict[str, WeightExpr]
    constants: dict[str, Multiplier]
    orders: dict[str, str] = field(default_factory=dict)
    rewrites: list[Rewrites] = field(default_factory=list)

    def finished(self) -> Program:
        """Returns the Program of what has been edited; to be called once, after the last edit."""
        self.module.recompile()
        return Program(
            self.config,
            self.states,
            self.module,
            weights=MappingProxyType(self.weights),
            constants=MappingProxyType(self.constants),
            inputs=self.inputs,
            outputs=self.outputs,
            orders=MappingProxyType(self.orders),
            rewrites=tuple(self.rewrites),
        )
