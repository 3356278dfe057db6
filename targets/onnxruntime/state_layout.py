"""How this target's graphs store states, which differs from the canonical float32 of model/falcon_h1/states.py.

The CPU's graphs store a convolution's channels last, and the recurrent state as [d_state, d_head] for LinearAttention.
Some kinds of states have another dtype than float32; those in int8 are rows of int8_rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array, StateKind, StateTensor
from h1export.targets.onnxruntime import int8_rows

Permutation = Mapping[StateKind, tuple[int, ...]]
Stored = npt.NDArray[Any]

# axes of the canonical layout in the graph's order; each is its own inverse
PERMUTATION: Permutation = {StateKind.CONV: (0, 2, 1), StateKind.RECURRENT: (0, 1, 3, 2)}
CUDA_PERMUTATION: Permutation = {StateKind.CONV: (0, 2, 1)}  # GatedDeltaNet's state is the canonical one
ONNX_NAMES: Mapping[Any, str] = {
    np.float32: "FLOAT",
    np.float16: "FLOAT16",
    ml_dtypes.bfloat16: "BFLOAT16",
    np.int8: "INT8",
}


def permute(kind: StateKind, state: Stored, permutation: Permutation = PERMUTATION) -> Stored:
    """Convert a state from the canonical order of axes to the graph's, or back."""
    axes = permutation.get(kind)
    return state if axes is None else np.ascontiguousarray(state.transpose(axes))


@dataclass(frozen=True)
class StateLayout:
    """The axes and dtypes of the states of one graph.

    Attributes:
        permutation: kind of state -> the order of its axes in the graph.
        dtypes: kind of state -> its dtype, of those that are not float32: float16, ml_dtypes.bfloat16 or int8.
    """

    permutation: Permutation = field(default_factory=lambda: PERMUTATION)
    dtypes: Mapping[StateKind, type[Any]] = field(default_factory=dict)

    def dtype(self, kind: StateKind) -> type[Any]:
        """Return the dtype of states of this kind."""
        return self.dtypes.get(kind, np.float32)

    def dtype_name(self, kind: StateKind) -> str:
        """Return ONNX's name of the dtype of states of this kind."""
        return ONNX_NAMES[self.dtype(kind)]

    def shape(self, tensor: StateTensor) -> tuple[int | str, ...]:
        """Return the dims of a state in the graph."""
        return self._stored(tensor.kind, tensor.shape)

    def sized(self, tensor: StateTensor, batch: int, past: int) -> tuple[int, ...]:
        """Return the shape of a state in the graph in numbers, for ``batch`` sequences of ``past`` tokens."""
        return tuple(int(size) for size in self._stored(tensor.kind, tensor.sized(batch, past)))

    def _stored(self, kind: StateKind, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        dims = tuple(shape[axis] for axis in self.permutation.get(kind, range(len(shape))))
        return (*dims[:-1], int8_rows.width(int(dims[-1]))) if self.dtype(kind) is np.int8 else dims

    def stored(self, kind: StateKind, state: Array) -> Stored:
        """Return a canonical state, float32, as the graph has it."""
        permuted = permute(kind, state, self.permutation)
        dtype = self.dtype(kind)
        return int8_rows.encode(permuted) if dtype is np.int8 else permuted.astype(dtype)

    def canonical(self, kind: StateKind, stored: Stored) -> Array:
        """Return a state of the graph in the canonical layout and in float32."""
        numbers = int8_rows.decode(stored) if self.dtype(kind) is np.int8 else stored.astype(np.float32)
        return permute(kind, numbers, self.permutation)
