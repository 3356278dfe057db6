"""Listing: a Program as text, with dtypes and shapes, and the number of places that each pass has rewritten."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.fx import Node

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr, WeightPart
from h1export.graphs.program import Program, Rewrites, args_of
from h1export.graphs.unroll import layer_of
from h1export.model.falcon_h1.states import ATTENTION_MASK, BATCH, INPUT_IDS, SEQUENCE, TOTAL

SYMBOL = re.compile(r"\bs\d+\b")  # torch's name of a dynamic size
NOT_SHOWN = "layers 1 to {last} are like layer 0, and --all-layers shows them"


@dataclass(frozen=True)
class Entry:
    """One line of a listing: an input, output, weight, constant or node.

    Attributes:
        name: an I/O name, or the name of a placeholder or node.
        definition: the placeholder or node of an input or output, the expression of a weight, the call of a node.
        type: dtype and shape.
        layer: the layer that it belongs to; None: none.
    """

    name: str
    definition: str
    type: str
    layer: int | None


@dataclass(frozen=True)
class Listing:
    """A Program in words; every entry is in graph order."""

    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]
    weights: tuple[Entry, ...]
    constants: tuple[Entry, ...]
    nodes: tuple[Entry, ...]
    rewrites: tuple[Rewrites, ...]

    @classmethod
    def of(cls, program: Program) -> Listing:
        """Returns the listing of ``program``, which may be one that passes have not finished yet."""
        type_of = _type_of(_size_names(program))
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        layers = _layers(program)

        def entries(names: Mapping[str, Any], show: Callable[[Any], str]) -> tuple[Entry, ...]:
            return tuple(
                Entry(node.name, show(names[node.name]), type_of(node.meta["val"]), layer=layers[node])
                for node in placeholders
                if node.name in names
            )

        results: Any = program.graph.output_node().args[0]
        return cls(
            inputs=tuple(
                Entry(program.inputs[node.name], node.name, type_of(node.meta["val"]), layer=layers[node])
                for node in placeholders
                if node.name in program.inputs
            ),
            outputs=tuple(
                Entry(name, str(node), type_of(node.meta["val"]), layer=layers[node])
                for name, node in zip(program.outputs, results, strict=True)
            ),
            weights=entries(program.weights, expression),
            constants=(
                *entries(program.constants, _multiplier),
                *entries(program.orders, lambda tensor: f"order of the columns of {tensor}"),
            ),
            nodes=tuple(
                Entry(node.name, _call(node), type_of(node.meta.get("val")), layer=layers[node])
                for node in program.graph.nodes
                if node.op not in ("placeholder", "output")
            ),
            rewrites=tuple(program.rewrites),
        )

    def text(self, all_layers: bool = False) -> str:
        """Returns the listing with headings and aligned columns; layers after the first only if ``all_layers``."""
        tables = {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weights": self.weights,
            "constants": self.constants,
        }
        lines = []
        for heading, entries in tables.items():
            if entries:
                lines += [
                    f"{heading} ({len(entries)})",
                    *_elided(entries, _table_lines(entries, all_layers), all_layers),
                    "",
                ]
        lines += [f"nodes ({len(self.nodes)})", *_elided(self.nodes, _node_line, all_layers), ""]
        lines.append("rewrites by pass" if self.rewrites else "no pass was run")
        lines += [f"  {rewrites.name:24} {rewrites.count}" for rewrites in self.rewrites]
        return "\n".join(lines)


def expression(expr: WeightExpr) -> str:
    """Returns a weight's expression: [a; b] is a above b, [a | b] is a beside b."""
    parts = [_part(part) for part in expr.parts]
    return parts[0] if len(parts) == 1 else f"[{('; ', ' | ')[expr.axis].join(parts)}]"


def _part(part: WeightPart) -> str:
    text = part.tensor
    for function in part.functions:
        text = f"{function}({text})"
    if part.sorted:
        text += "[:, order]"
    return text if part.multiplier == Multiplier() else f"{_multiplier(part.multiplier)} * {text}"


def _multiplier(multiplier: Multiplier) -> str:
    if multiplier.is_scalar:
        return f"{multiplier.factor:g}"
    return f"rows({', '.join(f'{rows} x {factor:g}' for rows, factor in multiplier.runs)})"


def _elided(entries: Sequence[Entry], line_of: Callable[[Entry], str], all_layers: bool) -> Iterator[str]:
    """Yield a line for each entry, and one line in place of the entries of all layers after the first."""
    last = max((entry.layer or 0 for entry in entries), default=0)
    for elided, run in groupby(entries, lambda entry: bool(entry.layer) and not all_layers):
        if elided:
            yield f"  ... {NOT_SHOWN.format(last=last)}"
        else:
            yield from (f"  {line_of(entry)}" for entry in run)


def _table_lines(entries: Sequence[Entry], all_layers: bool) -> Callable[[Entry], str]:
    """Returns a function that gives an entry's line, with columns as wide as the entries need."""
    shown = [entry for entry in entries if all_layers or not entry.layer]
    names = max(len(entry.name) for entry in shown)
    types = max(len(entry.type) for entry in shown)
    return lambda entry: f"{entry.name:{names}}  {entry.type:{types}}  {entry.definition}"


def _node_line(entry: Entry) -> str:
    return f"{entry.name} = {entry.definition} -> {entry.type}"


def _call(node: Node) -> str:
    named = [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    return f"{_op(node)}({', '.join([*map(_argument, args_of(node)), *named])})"


def _op(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).removeprefix("torch.")


def _layers(program: Program) -> dict[Node, int | None]:
    """Returns the layer of every node; a node that a pass has made is in the layer of the node before it."""
    layers: dict[Node, int | None] = {}
    current: int | None = None
    for node in program.graph.nodes:
        if node.op == "placeholder" or "nn_module_stack" in node.meta:
            layers[node] = layer_of(node)
        else:
            layers[node] = current
        if node.op != "placeholder":
            current = layers[node]
    return layers


def _size_names(program: Program) -> dict[str, str]:
    """Returns torch's name of each dynamic size -> ours, from the inputs whose shapes are known by name."""
    shapes: dict[str, tuple[int | str, ...]] = {tensor.past: tensor.shape for tensor in program.states.tensors}
    shapes |= {ATTENTION_MASK: (BATCH, TOTAL), INPUT_IDS: (BATCH, SEQUENCE)}
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.inputs:
            sizes = zip(node.meta["val"].shape, shapes[program.inputs[node.name]], strict=True)
            found |= {str(size): name for size, name in sizes if isinstance(name, str) and SYMBOL.fullmatch(str(size))}
    return found


def _type_of(names: Mapping[str, str]) -> Callable[[Any], str]:
    """Returns a function from a node's meta value to its dtype and shape, with dynamic sizes by ``names``."""

    def size(value: object) -> str:
        return SYMBOL.sub(lambda symbol: names.get(symbol[0], symbol[0]), str(value))

    def of(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(size, value.shape))}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(map(of, value))})"
        return "" if value is None else f"int {size(value)}"

    return of
