"""Run a Program with PyTorch, eagerly, on its own weight expressions: what judges passes and artifacts, with no target in between."""

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
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, Array
from h1export.runtime.runner import Ids, Limits, Provenance, check_call
from h1export.runtime.session import SteppedSession

aten = torch.ops.aten

States = dict[str, Tensor]
Blocks = Callable[[WeightExpr], Iterable[Array]]  # an expression's float32 rows, from the top


@dataclass(frozen=True)
class _Streamed:
    """Stands for a weight that is read when an op asks for it."""

    blocks: Callable[[], Iterable[Array]]

    def __iter__(self) -> Any:
        return (torch.from_numpy(block) for block in self.blocks())

    def whole(self) -> Tensor:
        return torch.cat(list(self))


class _Interpreter(torch.fx.Interpreter):
    """Takes matrices row block by row block, so that none has to be in memory whole."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.linear.default and isinstance(args[1], _Streamed):
            x, weight, *bias = args
            product = torch.cat([x @ block.T for block in weight], dim=-1)
            return (
                product + tree_map_only(_Streamed, _Streamed.whole, bias[0])
                if bias and bias[0] is not None
                else product
            )
        if target is aten.embedding.default and isinstance(args[0], _Streamed):
            return _gathered(*args)
        return super().call_function(target, tree_map_only(_Streamed, _Streamed.whole, args), kwargs)


def _gathered(table: _Streamed, ids: Tensor) -> Tensor:
    """Rows ``ids`` of a table."""
    rows = [torch.zeros(0)] * ids.numel()
    start = 0
    for block in table:
        for place, index in enumerate(ids.flatten().tolist()):
            if start <= index < start + len(block):
                rows[place] = block[index - start].clone()
        start += len(block)
    return torch.stack(rows).reshape(*ids.shape, -1)


def _run(program: Program, fixed: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by I/O name; ``fixed`` has the values of the placeholders that are no inputs."""
    values = [
        fixed[node.name] if node.name in fixed else inputs[program.inputs[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    with torch.no_grad():
        return dict(zip(program.outputs, _Interpreter(program.module).run(*values), strict=True))


def _orders(program: Program, store: WeightStore) -> dict[str, Tensor]:
    return {name: torch.from_numpy(store.packed[tensor].order) for name, tensor in program.orders.items()}


def _initial(program: Program, batch: int) -> States:
    zeros = program.states.zeros(batch)
    return {tensor.past: torch.from_numpy(zeros[tensor.key]) for tensor in program.states.tensors}


def _inputs(ids: Ids, mask: Ids, states: States) -> dict[str, Tensor]:
    return {INPUT_IDS: torch.from_numpy(ids), ATTENTION_MASK: torch.from_numpy(mask), **states}


def forward(program: Program, store: WeightStore, blocks: Blocks, ids: Ids) -> Array:
    """Logits float32 [n, vocab] of one sequence ids int64 [n], from nothing; weights pass by, and none stays in memory."""
    fixed: dict[str, Any] = {name: _Streamed(partial(blocks, expr)) for name, expr in program.weights.items()}
    fixed |= _orders(program, store)
    logits: Array = _run(program, fixed, _inputs(ids[None], np.ones((1, len(ids)), np.int64), _initial(program, 1)))[
        LOGITS
    ][0].numpy()
    return logits


class ProgramRunner:
    """Runner over a Program in float32. Holds every weight in memory: for small models."""

    def __init__(self, program: Program, store: WeightStore) -> None:
        self._program = program
        self._fixed = {name: torch.from_numpy(expr.dense(store)) for name, expr in program.weights.items()}
        self._fixed |= _orders(program, store)
        for name, multiplier in program.constants.items():
            self._fixed[name] = torch.from_numpy(multiplier.rows(sum(program.config.in_proj_parts)))

    @property
    def config(self) -> FalconH1Config:
        return self._program.config

    @property
    def limits(self) -> Limits:
        logits = self._program.graph.output_node().args[0][0]  # type: ignore[index]
        return Limits(all_logits=not isinstance(logits.meta["val"].shape[1], int))  # type: ignore[union-attr]

    @property
    def provenance(self) -> Provenance:
        return Provenance(kernels=f"PyTorch {torch.__version__}")

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def initial(self, batch: int) -> States:
        return _initial(self._program, batch)

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        check_call(ids, mask, self.length(states), vocab_size=self.config.vocab_size)
        named = _run(self._program, self._fixed, _inputs(ids, mask, states))
        logits: Array = named[LOGITS].numpy()
        return logits, {tensor.past: named[tensor.present] for tensor in self._program.states.tensors}

    def length(self, states: States) -> int:
        growing = next(tensor for tensor in self._program.states.tensors if tensor.kind.grows)
        return states[growing.past].shape[2]

    def start(self, batch: int, capacity: int) -> SteppedSession:
        return SteppedSession(self, batch)

    def snapshot(self, states: States) -> dict[str, Array]:
        return {tensor.key: np.asarray(states[tensor.past].numpy()) for tensor in self._program.states.tensors}
