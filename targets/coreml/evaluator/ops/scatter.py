"""Scattering (MIL specification: iOS 17 scatter_gather).

``mode`` is required, because the specification states two different defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, axis_of, check_indices, computes, require_floats

UNBUFFERED: Mapping[str, Callable[..., None]] = {  # an index that occurs twice counts twice
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def _apply(data: Array, index: tuple[Any, ...], updates: Array, *, mode: str) -> Array:
    """Return a copy of ``data`` with ``updates`` applied at numpy's ``index``.

    In mode "update", the last of several updates of one element stays.
    """
    result = data.copy()
    if mode == "update":
        result[index] = updates
    elif mode == "div":
        np.divide.at(result, index, require_floats(updates))
    elif mode in UNBUFFERED:
        UNBUFFERED[mode](result, index, updates)
    else:
        raise OpError(f"has mode {mode!r}, which the specification does not have")
    return result


def scatter(
    data: Array, indices: Array, updates: Array, mode: str, axis: int = 0, validate_indices: bool = False
) -> Array:
    """Scatter updates to indices [*C] of ``axis``; updates has data's shape with C in the place of ``axis``."""
    axis = axis_of(axis, data.ndim)
    check_indices(indices, data.shape[axis], axis)
    expected = data.shape[:axis] + indices.shape + data.shape[axis + 1 :]
    if updates.shape != expected:
        raise OpError(f"has updates {updates.shape}, which must be {expected}")
    return _apply(data, (slice(None),) * axis + (indices,), updates, mode=mode)


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, mode: str, axis: int = 0, validate_indices: bool = False
) -> Array:
    """Scatter along ``axis``; indices and updates have the shape of data except for the size of ``axis``."""
    axis = axis_of(axis, data.ndim)
    check_indices(indices, data.shape[axis], axis)
    same = data.ndim == indices.ndim and all(data.shape[i] == indices.shape[i] for i in range(data.ndim) if i != axis)
    if not same or updates.shape != indices.shape:
        raise OpError(f"has data {data.shape}, indices {indices.shape}, updates {updates.shape}, axis {axis}")
    index: list[Array] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[axis] = indices
    return _apply(data, tuple(index), updates, mode=mode)


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str, validate_indices: bool = False) -> Array:
    """Scatter to indices [*N, K], which address the first K axes; updates has N and the remaining axes of data."""
    depth = indices.shape[-1]
    expected = indices.shape[:-1] + data.shape[depth:]
    if depth > data.ndim or updates.shape != expected:
        raise OpError(
            f"has data {data.shape}, indices {indices.shape}, updates {updates.shape}, which must be {expected}"
        )
    for i in range(depth):
        check_indices(indices[..., i], data.shape[i], i)
    return _apply(data, tuple(indices[..., i] for i in range(depth)), updates, mode=mode)


TABLE: Table = {
    "scatter": computes(scatter),
    "scatter_along_axis": computes(scatter_along_axis),
    "scatter_nd": computes(scatter_nd),
}
