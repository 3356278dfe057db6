"""Run a folder with mlx-lm itself."""

from __future__ import annotations

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.runner import Limits, Provenance
from h1export.runtime.saved_states import SavedStates
from h1export.targets.mlx import sdk
from h1export.targets.mlx.model import NO_PADS, MlxModel, States
from h1export.targets.mlx.options import MlxOptions
from h1export.targets.mlx.stored_weights import StoredFloats, StoredWeights

# Half a unit in the last place, relative: what folding µP into scales of this dtype may change of a weight.
SCALE_ROUNDING = {"fp16": 2.0**-11, "fp32": 0.0, "bf16": 2.0**-8}


class MlxRunner:
    """A Runner over mlx-lm's model; with ``float32`` it computes in float32, with the floats that the folder has."""

    def __init__(self, artifact: Artifact, float32: bool) -> None:
        self._artifact = artifact
        self._model = MlxModel(artifact, float32)
        self._scale_rounding = SCALE_ROUNDING[MlxOptions.read(artifact).compute]

    @property
    def config(self) -> FalconH1Config:
        return self._model.config

    @property
    def limits(self) -> Limits:
        return Limits(max_batch=1, all_logits=not self._model.last_logits)

    @property
    def provenance(self) -> Provenance:
        return Provenance(
            kernels=sdk.versions(),
            gpu="Metal" if sdk.core().metal.is_available() else "",
            float32=self._model.float32,
            scale_rounding=self._scale_rounding,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    def initial(self, batch: int) -> States:
        if batch != 1:
            raise H1ExportError("initial", f"{batch} rows", NO_PADS)
        return States(0, {})

    def length(self, states: States) -> int:
        return states.length

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        self._model.check(ids, mask, states.length)
        caches = self._model.caches(states)
        logits = self._model.logits(ids, caches)
        return logits, self._model.states(caches, states.length + ids.shape[1])

    def start(self, batch: int, capacity: int) -> MlxSession:
        if batch != 1:
            raise H1ExportError("start", f"{batch} rows", NO_PADS)
        return MlxSession(self._model, capacity)

    def snapshot(self, states: States) -> dict[str, Array]:
        return self._model.snapshot(states)

    def restored(self, saved: SavedStates, batch: int) -> States:
        self.initial(batch)  # checks the batch
        return self._model.restored(saved)

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact)

    def stored_floats(self) -> StoredFloats:
        return StoredFloats(self._artifact)


class MlxSession:
    """A session over mlx-lm's caches, which grow in place."""

    def __init__(self, model: MlxModel, capacity: int) -> None:
        self._model = model
        self._capacity = capacity
        self._caches = model.caches(States(0, {}))
        self.length = 0

    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        end = self.length + ids.shape[-1]
        self._model.check(ids, np.ones((1, end), np.int64), self.length, keep=keep)
        if end > self._capacity:
            what = f"1 rows of {end} tokens"
            raise H1ExportError(
                "append", what, f"there is room for one of {self._capacity}; start with a larger capacity"
            )
        logits = self._model.logits(ids, self._caches, keep=keep)
        self.length = end
        return logits

    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        states = self._model.states(self._caches, self.length)
        found = self._model.snapshot(states)
        return SavedStates.of(self._model.spec, found, row, start=start, length=self.length)

    def restore(self, saved: SavedStates) -> None:
        saved.check(self._model.spec, self._capacity)
        self._caches = self._model.caches(self._model.restored(saved))
        self.length = saved.length
