"""Run a GPTQ folder: h1export's reader of checkpoints opens it, and the traced graph computes it with PyTorch.

Engines such as GPTQModel load the folder themselves; none of them is a dependency of h1export. This Runner judges the
bytes of the folder through the same reader that takes users' GPTQ checkpoints, and keeps all weights in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.graphs.interpret import States, initial_states, inputs_of, orders, run
from h1export.graphs.passes import passes_for, run_passes
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import LOGITS, Array, Ids
from h1export.quantize.methods.prequantized import Prequantized
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import Rounded
from h1export.runtime.runner import Limits, Provenance, RestorableSession, check_call
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import SteppedSession
from h1export.targets.gptq.options import GptqOptions

NOTE = (
    "h1export's own graph computes the folder in float32: this says what the bytes are worth, not how fast engines are"
)


class GptqRunner:
    """A Runner over the folder of ``artifact``. Its states are torch tensors by input name."""

    def __init__(self, artifact: Artifact) -> None:
        self._config = artifact.config
        self._store = WeightStore.open(artifact.folder, self._config)
        self._all_logits = not GptqOptions.read(artifact).last_logits
        traced = trace(self._config, not self._all_logits)
        self._program = run_passes(traced, passes_for(self._store.order_name))
        self._fixed = {
            name: torch.from_numpy(expr.dense(self._store)) for name, expr in self._program.weights.items()
        } | orders(self._program, self._store)
        self._past = next(tensor.past for tensor in self._program.states.tensors if tensor.kind.grows)

    @property
    def config(self) -> FalconH1Config:
        return self._config

    @property
    def limits(self) -> Limits:
        return Limits(all_logits=self._all_logits)

    @property
    def provenance(self) -> Provenance:
        return Provenance(kernels=f"h1export's reference in PyTorch {torch.__version__}", emulated=True)

    @property
    def notes(self) -> tuple[str, ...]:
        return (NOTE,)

    def initial(self, batch: int) -> States:
        return initial_states(self._program, batch)

    def length(self, states: States) -> int:
        return int(states[self._past].shape[2])

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        check_call(ids, mask, self.length(states), vocab_size=self._config.vocab_size)
        found = run(self._program, self._fixed, inputs_of(ids, mask, states))
        logits: Array = found[LOGITS].numpy()
        return logits, {tensor.past: found[tensor.present] for tensor in self._program.states.tensors}

    def start(self, batch: int, capacity: int) -> RestorableSession:
        return SteppedSession(self, batch)

    def snapshot(self, states: States) -> dict[str, Array]:
        return {tensor.key: np.asarray(states[tensor.past].numpy()) for tensor in self._program.states.tensors}

    def restored(self, saved: SavedStates, batch: int) -> States:
        return {
            tensor.past: torch.from_numpy(np.repeat(saved.arrays[tensor.key], batch, axis=0))
            for tensor in self._program.states.tensors
        }

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._store)


class StoredWeights(Mapping[str, Array]):
    """Checkpoint tensor -> its integers in the folder, dequantised when they are read, float32 [rows, columns]."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def quantized(self, name: str) -> QuantizedTensor:
        """Return the integers of a tensor, with the columns of a group beside each other."""
        integers = Prequantized.of(self._store, Rounded(self._store, {}, quantize_rows))
        return integers.rows(name, 0, self._store.shape(name)[0])

    def __getitem__(self, name: str) -> Array:
        return self._store.packed[name].dense(0, self._store.shape(name)[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.packed)

    def __len__(self) -> int:
        return len(self._store.packed)
