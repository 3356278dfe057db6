"""StateSpec: the states that a Falcon-H1 model carries from call to call. The only module that knows I/O names.

Canonical layouts, all float32 (transformers' cache layouts; fp16 recurrent states drift, so they are never narrowed):

=================  ==============================  ==========================================
kind               shape                           content
=================  ==============================  ==========================================
key                [batch, kv_heads, past, dim]    rotated keys, µP key multiplier applied
value              [batch, kv_heads, past, dim]    values
conv_state         [batch, conv_dim, d_conv - 1]   the last inputs of the causal convolution
recurrent_state    [batch, heads, d_head, d_state]  the SSM state S
=================  ==============================  ==========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.config import FalconH1Config

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
LOGITS = "logits"
KEPT = "num_logits_to_keep"  # how many of the last positions of each row get logits, or ALL
ALL = 0
BATCH = "batch"
SEQUENCE = "sequence"
POSITIONS = "positions"  # those that get logits
PAST = "past"
TOTAL = "total"

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]  # token ids, or a mask of them


class StateKind(StrEnum):
    """The four states of a layer; the value is part of I/O names."""

    KEY = "key"
    VALUE = "value"
    CONV = "conv_state"
    RECURRENT = "recurrent_state"

    @property
    def grows(self) -> bool:
        """Whether the state gets longer along axis 2 by one column per token."""
        return self in (StateKind.KEY, StateKind.VALUE)


@dataclass(frozen=True)
class StateTensor:
    """One state of one layer; ``shape`` is canonical, with "batch" and "past" symbolic."""

    layer: int
    kind: StateKind
    shape: tuple[int | str, ...]

    @property
    def past(self) -> str:
        """Input name."""
        return f"past_key_values.{self.layer}.{self.kind}"

    @property
    def present(self) -> str:
        """Output name."""
        return f"present.{self.layer}.{self.kind}"

    @property
    def key(self) -> str:
        """Name in snapshots and reports."""
        return f"{self.layer}.{self.kind}"

    def sized(self, batch: int, past: int) -> tuple[int, ...]:
        """Returns the shape in numbers for ``batch`` sequences after ``past`` tokens."""
        sizes = {BATCH: batch, PAST: past}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True)
class StateSpec:
    """Every state in graph I/O order: layer by layer, ``StateKind`` order within a layer."""

    tensors: tuple[StateTensor, ...]

    @classmethod
    def of(cls, config: FalconH1Config) -> StateSpec:
        """Returns the states of a model of ``config``."""
        kv: tuple[int | str, ...] = (BATCH, config.num_key_value_heads, PAST, config.head_dim)
        shapes: dict[StateKind, tuple[int | str, ...]] = {
            StateKind.KEY: kv,
            StateKind.VALUE: kv,
            StateKind.CONV: (BATCH, config.conv_dim, config.mamba_d_conv - 1),
            StateKind.RECURRENT: (BATCH, config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state),
        }
        return cls(
            tuple(
                StateTensor(layer, kind, shapes[kind])
                for layer in range(config.num_hidden_layers)
                for kind in StateKind
            )
        )

    def of_layer(self, layer: int) -> tuple[StateTensor, ...]:
        """Returns the states of one layer, in ``StateKind`` order."""
        return self.tensors[layer * len(StateKind) : (layer + 1) * len(StateKind)]

    def nbytes(self, batch: int, past: int) -> int:
        """Returns the bytes of all states of ``batch`` sequences after ``past`` tokens."""
        return sum(4 * prod(tensor.sized(batch, past)) for tensor in self.tensors)

    def zeros(self, batch: int, past: int = 0) -> dict[str, Array]:
        """Returns the states before the first token by ``StateTensor.key``.

        Keys and values have ``past`` columns of zeros.
        """
        return {tensor.key: np.zeros(tensor.sized(batch, past), np.float32) for tensor in self.tensors}
