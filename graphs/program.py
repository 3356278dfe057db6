"""Program: the traced model as every target receives it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec

Op = torch._ops.OpOverload


def args_of(node: Any) -> tuple[Any, ...]:
    """The node's arguments; what each is, graphs.verify and the op's schema say."""
    args: tuple[Any, ...] = node.args
    return args


@dataclass(frozen=True)
class Program:
    """One ATen graph without weights; states are explicit inputs and outputs.

    Attributes:
        spec: the architecture it was traced from.
        states: its states, in the order of the graph's inputs and outputs.
        module: the graph; placeholders are weights, constants or inputs, and the output is a flat tuple.
        weights: placeholder -> how to make that initializer.
        constants: placeholder -> a µP vector that no pass has folded yet.
        inputs: placeholder -> I/O name.
        outputs: I/O names in the order of the output tuple.
        orders: placeholder -> a packed tensor whose order of columns it is, int64 [columns].
    """

    config: FalconH1Config
    states: StateSpec
    module: GraphModule
    weights: Mapping[str, WeightExpr]
    constants: Mapping[str, Multiplier]
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    orders: Mapping[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.module.graph

    def editable(self) -> Program:
        """A copy whose graph and mappings a pass may change."""
        module = copy.deepcopy(self.module)
        weights = dict(self.weights)
        return replace(self, module=module, weights=weights, constants=dict(self.constants), orders=dict(self.orders))

    def calls(self, *ops: Op) -> Iterator[Node]:
        """Nodes that call one of ``ops``, in graph order, safe against edits while iterating."""
        yield from [node for node in self.graph.nodes if node.op == "call_function" and node.target in ops]

    def weight_of(self, node: object) -> WeightExpr | None:
        """The expression behind a placeholder node; None for anything else."""
        return self.weights.get(node.name) if isinstance(node, Node) and node.op == "placeholder" else None
