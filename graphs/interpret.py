"""Run a Program with PyTorch, eagerly, on its own weight expressions: the Runner that judges passes, with no target in between."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from h1export.core.protocols import Capabilities, Ids, SteppedSequences, check_call
from h1export.core.spec import HybridSpec
from h1export.core.state import ATTENTION_MASK, INPUT_IDS, LOGITS, Array
from h1export.core.weights import WeightStore
from h1export.graphs.programs import Program

States = dict[str, Tensor]


class ProgramRunner:
    """Runner over a Program in float32. Holds every weight in memory: for small models."""

    def __init__(self, program: Program, store: WeightStore) -> None:
        self._program = program
        self._fixed = {name: torch.from_numpy(expr.dense(store)) for name, expr in program.weights.items()}
        for name, multiplier in program.constants.items():
            self._fixed[name] = torch.from_numpy(multiplier.rows(sum(program.spec.in_proj_parts)))

    @property
    def spec(self) -> HybridSpec:
        return self._program.spec

    @property
    def capabilities(self) -> Capabilities:
        logits = self._program.graph.output_node().args[0][0]  # type: ignore[index]
        return Capabilities(max_batch=None, all_logits=not isinstance(logits.meta["val"].shape[1], int))  # type: ignore[union-attr]

    def initial(self, batch: int) -> States:
        zeros = self._program.states.zeros(batch)
        return {tensor.past: torch.from_numpy(zeros[tensor.key]) for tensor in self._program.states.tensors}

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        check_call(ids, mask, states[self._program.states.tensors[0].past].shape[2], self.spec.vocab_size)
        inputs = {INPUT_IDS: torch.from_numpy(ids), ATTENTION_MASK: torch.from_numpy(mask), **states}
        values = [
            self._fixed[node.name] if node.name in self._fixed else inputs[self._program.inputs[node.name]]
            for node in self._program.graph.nodes
            if node.op == "placeholder"
        ]
        with torch.no_grad():
            results = torch.fx.Interpreter(self._program.module).run(*values)
        named = dict(zip(self._program.outputs, results, strict=True))
        logits: Array = named[LOGITS].numpy()
        return logits, {tensor.past: named[tensor.present] for tensor in self._program.states.tensors}

    def start(self, batch: int, capacity: int) -> SteppedSequences:
        return SteppedSequences(self, batch)

    def snapshot(self, states: States) -> dict[str, Array]:
        return {tensor.key: np.asarray(states[tensor.past].numpy()) for tensor in self._program.states.tensors}

    def stored_weights(self) -> Mapping[str, Array]:
        return {}
