"""Run a Program with PyTorch, op by op, with weights that are computed from its expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.program import Program
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, Array, Ids

aten = torch.ops.aten

States = dict[str, Tensor]
Blocks = Callable[[WeightExpr], Iterable[Array]]  # an expression -> its float32 rows, in blocks from the top


@dataclass(frozen=True)
class _Streamed:
    """A weight that is read when an op needs it."""

    blocks: Callable[[], Iterable[Array]]

    def __iter__(self) -> Any:
        return (torch.from_numpy(block) for block in self.blocks())

    def whole(self) -> Tensor:
        return torch.cat(list(self))


class _Interpreter(torch.fx.Interpreter):
    """Multiplies by matrices block of rows by block of rows, so that none is in memory as a whole."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.linear.default and isinstance(args[1], _Streamed):
            x, weight, *bias = args
            product = torch.cat([x @ block.T for block in weight], dim=-1)
            if not bias or bias[0] is None:
                return product
            return product + tree_map_only(_Streamed, _Streamed.whole, bias[0])
        if target is aten.embedding.default and isinstance(args[0], _Streamed):
            return _gathered(*args)
        return super().call_function(target, tree_map_only(_Streamed, _Streamed.whole, args), kwargs)


def _gathered(table: _Streamed, ids: Tensor) -> Tensor:
    """Returns the rows ``ids`` of a table, [*ids.shape, columns]."""
    rows = [torch.zeros(0)] * ids.numel()
    start = 0
    for block in table:
        for place, index in enumerate(ids.flatten().tolist()):
            if start <= index < start + len(block):
                rows[place] = block[index - start].clone()
        start += len(block)
    return torch.stack(rows).reshape(*ids.shape, -1)


def run(program: Program, fixed: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a program once and return its outputs by I/O name.

    Args:
        program: what to run.
        fixed: placeholder -> the value of each weight, constant and order.
        inputs: I/O name -> the value of each input.
    """
    values = [
        fixed[node.name] if node.name in fixed else inputs[program.inputs[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    with torch.no_grad():
        return dict(zip(program.outputs, _Interpreter(program.module).run(*values), strict=True))


def orders(program: Program, store: WeightStore) -> dict[str, Tensor]:
    """Returns the values of the placeholders that hold an order of columns."""
    return {name: torch.from_numpy(store.packed[tensor].order) for name, tensor in program.orders.items()}


def initial_states(program: Program, batch: int) -> States:
    """Returns the states before the first token by input name."""
    zeros = program.states.zeros(batch)
    return {tensor.past: torch.from_numpy(zeros[tensor.key]) for tensor in program.states.tensors}


def inputs_of(ids: Ids, mask: Ids, states: States) -> dict[str, Tensor]:
    """Returns the inputs of one call by I/O name."""
    return {INPUT_IDS: torch.from_numpy(ids), ATTENTION_MASK: torch.from_numpy(mask), **states}


def forward(program: Program, store: WeightStore, blocks: Blocks, *, ids: Ids) -> Array:
    """Returns logits, float32 [n, vocab], of one sequence ids int64 [n] from empty states.

    No weight stays in memory.
    """
    fixed: dict[str, Any] = {name: _Streamed(partial(blocks, expr)) for name, expr in program.weights.items()}
    fixed |= orders(program, store)
    inputs = inputs_of(ids[None], np.ones((1, len(ids)), np.int64), initial_states(program, 1))
    logits: Array = run(program, fixed, inputs)[LOGITS][0].numpy()
    return logits
