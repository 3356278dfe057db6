"""What a loaded artifact can do, whatever the runtime below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from h1export.core.spec import HybridSpec
from h1export.core.state import Array

Ids = npt.NDArray[np.int64]
States = TypeVar("States")


@dataclass(frozen=True)
class Capabilities:
    """Limits of a runtime, so that a harness shows a case as not applicable instead of failing in it.

    Attributes:
        max_batch: rows in one call; None: no limit.
        all_logits: logits for every position; False: for the last one only.
        notes: limits in words, for the artifact's README and the report.
    """

    max_batch: int | None
    all_logits: bool
    notes: tuple[str, ...] = ()


class Runner(Protocol, Generic[States]):
    """A loaded artifact. ``States`` is the runtime's own form of them, opaque to callers."""

    @property
    def spec(self) -> HybridSpec: ...

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

    def snapshot(self, states: States) -> dict[str, Array]:
        """The states by ``StateTensor.key`` in ``StateSpec``'s canonical layouts."""
        ...

    def stored_weights(self) -> Mapping[str, Array]:
        """Checkpoint name -> float32 tensor, unfolded, dequantised from what the artifact stores. Lazy; quantised tensors only."""
        ...
