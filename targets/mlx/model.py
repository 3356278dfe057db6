"""MlxModel: mlx-lm's own Falcon-H1 over a folder, with its caches as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids, StateKind, StateSpec
from h1export.runtime.runner import check_call
from h1export.runtime.saved_states import SavedStates
from h1export.targets.mlx import sdk
from h1export.targets.mlx.options import MlxOptions

NO_PADS = "mlx-lm is run with one sequence at a time, without padding on the left"
Caches = list[Any]  # one mlx_lm CacheList a layer: the mixer's ArraysCache, then attention's KVCache


@dataclass(frozen=True)
class States:
    """The states of a sequence of ``length`` tokens: MLX arrays by ``StateTensor.key``; none before the first token."""

    length: int
    arrays: dict[str, Any]


class MlxModel:
    """The model of the folder of ``artifact``, loaded by mlx-lm; with ``float32`` its floats are cast after that.

    Raises:
        H1ExportError: mlx-lm is not installed, or cannot load the folder.
    """

    def __init__(self, artifact: Artifact, float32: bool = False) -> None:
        self.config: FalconH1Config = artifact.config
        self.spec = StateSpec.of(self.config)
        options = MlxOptions.read(artifact)
        compute = "fp32" if float32 else options.compute
        self.float32 = compute == "fp32"
        self.last_logits = options.last_logits
        self._folder = artifact.folder
        self._mx = sdk.core()
        self._dtype = {"fp16": self._mx.float16, "fp32": self._mx.float32, "bf16": self._mx.bfloat16}[compute]
        with sdk.refused(artifact.folder, "mlx-lm cannot load it"):
            self._model, _ = sdk.utils().load_model(artifact.folder)
            if float32:
                self._model.set_dtype(self._mx.float32)

    def check(self, ids: Ids, mask: Ids, past: int, *, keep: int | None = None) -> None:
        """Check a call. Raises H1ExportError for ids, masks or batches that are not taken, and for a wrong ``keep``."""
        check_call(ids, mask, past, vocab_size=self.config.vocab_size, keep=keep)
        if len(ids) != 1 or not mask.all():
            raise H1ExportError("step", f"{len(ids)} rows, {int((mask == 0).sum())} pads", NO_PADS)

    def logits(self, ids: Ids, caches: Caches, *, keep: int | None = None) -> Array:
        """Return logits float32 [1, positions, vocab] of the last ``keep`` of ids [1, new], and advance ``caches``."""
        with sdk.refused(self._folder, "mlx-lm cannot compute it"):
            found = self._model(self._mx.array(ids.astype(np.int32)), cache=caches)
            last = 1 if self.last_logits else keep
            if last is not None:
                found = found[:, -last:]
            logits: Array = np.array(found.astype(self._mx.float32))
        return logits

    def caches(self, states: States) -> Caches:
        """Return mlx-lm's caches with ``states``, which stay as they are: MLX writes into buffers of its own."""
        made: Caches = self._model.make_cache()
        if states.length:
            for layer, (mixer, attention) in enumerate(made):
                kinds = {kind: states.arrays[f"{layer}.{kind}"] for kind in StateKind}
                mixer[0], mixer[1] = kinds[StateKind.CONV], kinds[StateKind.RECURRENT]
                attention.state = (kinds[StateKind.KEY], kinds[StateKind.VALUE], states.length)
        return made

    def states(self, caches: Caches, length: int) -> States:
        """Return the states of ``caches`` after ``length`` tokens."""
        arrays: dict[str, Any] = {}
        for layer, (mixer, attention) in enumerate(caches if length else ()):
            keys, values = attention.keys_and_values()
            found = {
                StateKind.KEY: keys,
                StateKind.VALUE: values,
                StateKind.CONV: mixer[0],
                StateKind.RECURRENT: mixer[1],
            }
            arrays |= {f"{layer}.{kind}": array[...] for kind, array in found.items()}
        self._mx.eval(list(arrays.values()))
        return States(length, arrays)

    def snapshot(self, states: States) -> dict[str, Array]:
        """Return the states in the canonical layouts: MLX has the convolution's as [1, d_conv - 1, channels]."""
        if not states.length:
            return self.spec.zeros(1)
        found = {key: np.array(array.astype(self._mx.float32)) for key, array in states.arrays.items()}
        return {
            tensor.key: found[tensor.key].swapaxes(1, 2) if tensor.kind is StateKind.CONV else found[tensor.key]
            for tensor in self.spec.tensors
        }

    def restored(self, saved: SavedStates) -> States:
        """Return checked states that were saved."""
        arrays = {}
        for tensor in self.spec.tensors:
            array = saved.arrays[tensor.key]
            if tensor.kind is StateKind.CONV:
                array = array.swapaxes(1, 2)
            dtype = self._mx.float32 if tensor.kind is StateKind.RECURRENT else self._dtype
            arrays[tensor.key] = self._mx.array(np.ascontiguousarray(array)).astype(dtype)
        return States(saved.length, arrays)
