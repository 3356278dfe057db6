"""ProgramRunner: step through a traced Program, to judge passes and artifacts with no target in between."""

from __future__ import annotations

import numpy as np
import torch

from h1export.checkpoint.store import WeightStore
from h1export.graphs.interpret import States, initial_states, inputs_of, orders, run
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import LOGITS, Array, Ids
from h1export.runtime.runner import check_call

__all__ = ["ProgramRunner", "States"]


class ProgramRunner:
    """Runs a Program in float32 by PyTorch. It holds every weight in memory, so it is for small models."""

    def __init__(self, program: Program, store: WeightStore) -> None:
        self._program = program
        self._fixed = {name: torch.from_numpy(expr.dense(store)) for name, expr in program.weights.items()}
        self._fixed |= orders(program, store)
        for name, multiplier in program.constants.items():
            self._fixed[name] = torch.from_numpy(multiplier.rows(sum(program.config.in_proj_parts)))

    @property
    def config(self) -> FalconH1Config:
        return self._program.config

    def initial(self, batch: int) -> States:
        """Returns the states before the first token."""
        return initial_states(self._program, batch)

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        """Returns logits and new states for ids [batch, new] and a mask [batch, past + new]."""
        (past,) = {states[t.past].shape[2] for t in self._program.states.tensors if t.kind.grows}
        check_call(ids, mask, past, vocab_size=self.config.vocab_size)
        named = run(self._program, self._fixed, inputs_of(ids, mask, states))
        logits: Array = named[LOGITS].numpy()
        return logits, {tensor.past: named[tensor.present] for tensor in self._program.states.tensors}

    def snapshot(self, states: States) -> dict[str, Array]:
        """Returns the states by ``StateTensor.key``."""
        return {tensor.key: np.asarray(states[tensor.past].numpy()) for tensor in self._program.states.tensors}
