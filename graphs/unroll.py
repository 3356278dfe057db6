"""Unroll a Program of two layers: all layers are alike, so that every further layer is a copy of the second.

torch.export takes some tenths of a second for a layer, and a copy takes milliseconds. The second layer is copied,
because it reads the output of a layer, as all later ones do. The first one reads the embedding.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, StateKind, StateSpec

TRACED = 2  # layers of the program to unroll

# a layer's number in the name of its tensors and modules, of their placeholders, of its states' placeholders
_NUMBER = re.compile(r"(?<=model\.layers\.)\d+|(?<=^[pb]_model_layers_)\d+|(?<=^states_)\d+")


def unroll(program: Program, config: FalconH1Config) -> Program:
    """Returns the Program of ``config`` for a ``program`` of its first two layers.

    It is what tracing all layers gives, down to the names of nodes.

    Only meta["torch_fn"] differs, the tracer's count of calls: all copies have the second layer's. Nothing reads it.

    Raises:
        ValueError: the two layers are not alike.
    """
    unrolled = _Unrolled(program.graph, config.num_hidden_layers)
    weights: dict[str, WeightExpr] = {}
    constants: dict[str, Multiplier] = {}
    inputs: list[str] = []
    for name, traced in unrolled.placeholders.items():
        if expr := program.weight_of(traced):
            weights[name] = WeightExpr.of(_renumbered(expr.only.tensor, _number(name)))
        elif traced.name in program.constants:
            constants[name] = program.constants[traced.name]
        else:
            inputs.append(name)
    states = StateSpec.of(config)
    module = GraphModule({}, unrolled.graph)
    names = (INPUT_IDS, ATTENTION_MASK, *(tensor.past for tensor in states.tensors))
    outputs = (LOGITS, *(tensor.present for tensor in states.tensors))
    return Program(
        config,
        states,
        module,
        weights=weights,
        constants=constants,
        inputs=dict(zip(inputs, names, strict=True)),
        outputs=outputs,
    )


class _Unrolled:
    """A graph of ``layers`` layers, and the traced node that each of its placeholders is a copy of.

    The key of a copy is (representative, layer): the representative of a layer's node is its counterpart in the second
    layer, and that of a node outside the layers is the node itself, with None as its layer.
    """

    def __init__(self, traced: Graph, layers: int) -> None:
        self.graph = Graph()
        self.placeholders: dict[str, Node] = {}
        self._last = layers - 1
        self._layers = {node: layer_of(node) for node in traced.nodes}
        first, second = ([node for node, layer in self._layers.items() if layer == number] for number in range(TRACED))
        if _form(first) != _form(second):
            raise ValueError("the second layer is not like the first")
        self._representatives = {node: node for node in traced.nodes} | dict(zip(first, second, strict=True))
        self._copies: dict[tuple[Node, int | None], Node] = {}
        # a layer is four runs of nodes: weights, constants, states and calls; each of the second layer's goes on with
        # those of the others
        for layer, nodes in groupby(self._layers, self._layers.__getitem__):
            run = list(nodes)
            for copied in range(TRACED - 1, layers) if layer == TRACED - 1 else [layer]:
                for node in run:
                    self._append(node, copied)

    def _append(self, node: Node, layer: int | None) -> None:
        """Copy ``node`` into ``layer``, behind all others."""
        if node.op == "output":
            self.graph.output(self._results(node))
            return
        if node.op == "placeholder":
            copy = self.graph.placeholder(_renumbered(node.name, layer))
            self.placeholders[copy.name] = node
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda read: self._read(read, node, layer))
            # torch.fx appends a number to a name that is taken
            copy = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copy.meta = _meta(node, layer)
        self._copies[self._representatives[node], layer] = copy

    def _read(self, read: Node, reader: Node, layer: int | None) -> Node:
        """Returns what the copy of ``reader`` in ``layer`` reads where ``reader`` reads ``read``."""
        of = self._layers[read]
        own = self._layers[reader]
        # Within the layers, the copies are as many layers apart as the two nodes are. Behind the layers, a value of the
        # second traced layer becomes that of the last layer.
        if of is not None:
            of = of + layer - own if layer is not None and own is not None else of * self._last
        return self._copies[self._representatives[read], of]

    def _results(self, output: Node) -> tuple[Node, ...]:
        """Returns the outputs: logits, and the new states of every layer."""
        results: Any = output.args[0]
        states = [self._representatives[node] for node in results[1 : 1 + len(StateKind)]]
        return self._read(results[0], output, None), *(
            self._copies[state, layer] for layer in range(self._last + 1) for state in states
        )


def layer_of(node: Node) -> int | None:
    """Returns the layer that a traced node belongs to, or None for what is before and after the layers."""
    modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return _number(node.name if node.op == "placeholder" else (modules or [""])[-1])


def _number(name: str) -> int | None:
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def _renumbered(name: str, layer: int | None) -> str:
    return name if layer is None else _NUMBER.sub(str(layer), name)


def _form(layer: list[Node]) -> list[Any]:
    """Returns what a layer computes, equal for equal layers: its own nodes are numbered, and others left out."""
    places = {node: f"%{place}" for place, node in enumerate(layer)}
    names = [_renumbered(node.name, 0) if node.op == "placeholder" else node.target for node in layer]
    return [
        (name, str(node.meta["val"]), map_arg((node.args, node.kwargs), places.get))
        for name, node in zip(names, layer, strict=True)
    ]


def _meta(node: Node, layer: int | None) -> dict[str, Any]:
    """Returns the node's meta, with the names of the modules in ``layer``."""
    meta = dict(node.meta)
    if layer is not None and "nn_module_stack" in meta:
        modules = meta["nn_module_stack"].items()
        meta["nn_module_stack"] = {
            _renumbered(key, layer): (_renumbered(path, layer), kind) for key, (path, kind) in modules
        }
    return meta
