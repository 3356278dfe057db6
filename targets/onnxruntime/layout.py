"""How this target's graphs hold the states: channels last for the convolution, [d_state, d_head] for LinearAttention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from h1export.core.state import Array, StateKind, StateTensor

# axes of the canonical layout in this target's order; each is its own inverse
PERMUTATION: Mapping[StateKind, tuple[int, ...]] = {StateKind.CONV: (0, 2, 1), StateKind.RECURRENT: (0, 1, 3, 2)}


def shape(tensor: StateTensor) -> tuple[int | str, ...]:
    """The state's dims in the graph."""
    return tuple(tensor.shape[axis] for axis in PERMUTATION.get(tensor.kind, range(len(tensor.shape))))


def permute(kind: StateKind, state: Array) -> Array:
    """From the canonical layout to the graph's, or back."""
    axes = PERMUTATION.get(kind)
    return state if axes is None else np.ascontiguousarray(state.transpose(axes))
