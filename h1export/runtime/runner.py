"""What a loaded artifact can do, whatever the runtime below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids

States = TypeVar("States")


@dataclass(frozen=True)
class Capabilities:
    """Limits of a runtime, so that a harness shows a case as not applicable instead of failing in it.

    Attributes:
        max_batch: rows in one call; None: no limit.
        all_logits: logits for every position; False: for the last one only.
        float32: activations are float32 throughout; False: they are rounded somewhere, and figures drift by design.
        notes: limits in words, for the report.
        kernels: whose kernels compute, for the report.
        fallback: what is slower than it could be here, why, and the next step; empty: nothing is. Users are told.
        max_context: tokens in one sequence; None: no limit.
        probes: whether ``observe`` works.
        gpu: on which GPU it computes; empty: on none.
        emulated: not the runtime itself computes, but something that stands in for it: right, and no measure of speed.
    """

    max_batch: int | None
    all_logits: bool
    float32: bool = True
    notes: tuple[str, ...] = ()
    kernels: str = ""
    fallback: str = ""
    max_context: int | None = None
    emulated: bool = False
    probes: bool = False
    gpu: str = ""


class Sequences(Protocol):
    """A batch of sequences being extended; states are updated in place.

    Attributes:
        length: tokens so far, the same for every row.
    """

    length: int

    def append(self, ids: Ids) -> Array:
        """Logits float32 [batch, new or 1, vocab] of ids int64 [batch, new].

        Raises:
            H1ExportError: ids that do not fit the vocabulary, the batch or the capacity.
        """
        ...


class Runner(Protocol, Generic[States]):
    """A loaded artifact. ``States`` is the runtime's own form of them, opaque to callers."""

    @property
    def config(self) -> FalconH1Config: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def initial(self, batch: int) -> States:
        """States before the first token."""
        ...

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        """One call: ids [batch, new], mask [batch, past + new] with 1 for real tokens and left padding only.

        Returns logits, float32 [batch, new or 1, vocab], and the states after the call.
        """
        ...

    def observe(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States, dict[str, Array]]:
        """``step``, and the probes of model/falcon_h1/probes.py: name -> float32 [batch, new, width].

        Raises:
            H1ExportError: ``capabilities.probes`` is False.
        """
        ...

    def start(self, batch: int, capacity: int) -> Sequences:
        """``batch`` new sequences with room for ``capacity`` tokens each: the fast way to generate."""
        ...

    def snapshot(self, states: States) -> dict[str, Array]:
        """The states by ``StateTensor.key`` in ``StateSpec``'s canonical layouts."""
        ...

    def stored_weights(self) -> Mapping[str, Array]:
        """Checkpoint name -> float32 tensor, unfolded, dequantised from what the artifact stores. Lazy; quantised tensors only."""
        ...

    def magnitudes(self) -> Mapping[str, float]:
        """Kind of op -> the largest magnitude that it gave in fp16 so far, before rounding; beyond 65504 it became infinite.

        Empty where nothing is computed in fp16, or the runtime does not show it.
        """
        ...


class SteppedSequences:
    """Sequences over ``Runner.step``, for a runtime that has no states in place."""

    def __init__(self, runner: Runner[Any], batch: int) -> None:
        self._runner = runner
        self._states = runner.initial(batch)
        self._batch = batch
        self.length = 0

    def append(self, ids: Ids) -> Array:
        self.length += ids.shape[1]
        logits, self._states = self._runner.step(ids, np.ones((self._batch, self.length), np.int64), self._states)
        return logits


def check_call(ids: Ids, mask: Ids, past: int, *, vocab_size: int) -> None:
    """The contract of ``Runner.step``'s inputs, for every runtime.

    Raises:
        H1ExportError: shapes that do not fit, token ids outside the vocabulary, or a mask that is not left padding.
    """
    if ids.ndim != 2 or not ids.size or mask.shape != (ids.shape[0], past + ids.shape[1]):
        what = f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} after {past} tokens"
        raise H1ExportError("step", what, "expected [batch, new] and [batch, past + new]")
    if ids.dtype != np.int64 or mask.dtype != np.int64:
        raise H1ExportError("step", f"input_ids {ids.dtype} and attention_mask {mask.dtype}", "expected int64")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise H1ExportError(
            "step", f"token ids from {ids.min()} to {ids.max()}", f"the vocabulary is 0 to {vocab_size - 1}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise H1ExportError("step", "attention_mask has values besides 0 and 1", "1 is a real token, 0 a pad")
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise H1ExportError(
            "step",
            "attention_mask has a pad after a real token",
            "pad on the left: recurrent states see tokens in order",
        )
