"""The axes of states in this target's graphs, which differ from the canonical ones of model/falcon_h1/states.py.

The CPU's graphs store a convolution's channels last, and the recurrent state as [d_state, d_head] for LinearAttention.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from h1export.model.falcon_h1.states import Array, StateKind, StateTensor

Permutation = Mapping[StateKind, tuple[int, ...]]

# axes of the canonical layout in the graph's order; each is its own inverse
PERMUTATION: Permutation = {StateKind.CONV: (0, 2, 1), StateKind.RECURRENT: (0, 1, 3, 2)}
CUDA_PERMUTATION: Permutation = {StateKind.CONV: (0, 2, 1)}  # GatedDeltaNet's state is the canonical one


def shape(tensor: StateTensor, permutation: Permutation = PERMUTATION) -> tuple[int | str, ...]:
    """Return the state's dims in the graph."""
    return tuple(tensor.shape[axis] for axis in permutation.get(tensor.kind, range(len(tensor.shape))))


def permute(kind: StateKind, state: Array, permutation: Permutation = PERMUTATION) -> Array:
    """Convert a state from the canonical layout to the graph's, or back."""
    axes = permutation.get(kind)
    return state if axes is None else np.ascontiguousarray(state.transpose(axes))
