"""Scattering (Core ML MIL specification, iOS 17 scatter_gather): ``mode`` must be given, because the specification has two defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, axis_of, check_indices, computes, floats

UNBUFFERED: Mapping[str, Callable[..., None]] = {  # an index that comes twice counts twice
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def _apply(data: Array, at: tuple[Any, ...], updates: Array, mode: str) -> Array:
    """A copy of ``data`` with ``updates`` at numpy's index ``at``; the last of several updates of one element stays."""
    result = data.copy()
    if mode == "update":
        result[at] = updates
    elif mode == "div":
        np.divide.at(result, at, floats(updates))
    elif mode in UNBUFFERED:
        UNBUFFERED[mode](result, at, updates)
    else:
        raise OpError(f"has mode {mode!r}, which the specification does not")
    return result


def scatter(
    data: Array, indices: Array, updates: Array, mode: str, axis: int = 0, validate_indices: bool = False
) -> Array:
    """indices [*C]; updates: data's shape with C in the place of ``axis``."""
    axis = axis_of(axis, data.ndim)
    check_indices(indices, data.shape[axis], axis)
    expected = data.shape[:axis] + indices.shape + data.shape[axis + 1 :]
    if updates.shape != expected:
        raise OpError(f"has updates {updates.shape}, which must be {expected}")
    return _apply(data, (slice(None),) * axis + (indices,), updates, mode=mode)


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, mode: str, axis: int = 0, validate_indices: bool = False
) -> Array:
    """indices and updates have one shape, which is data's but for ``axis``."""
    axis = axis_of(axis, data.ndim)
    check_indices(indices, data.shape[axis], axis)
    same = data.ndim == indices.ndim and all(data.shape[i] == indices.shape[i] for i in range(data.ndim) if i != axis)
    if not same or updates.shape != indices.shape:
        raise OpError(f"has data {data.shape}, indices {indices.shape}, updates {updates.shape}, axis {axis}")
    at: list[Array] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    at[axis] = indices
    return _apply(data, tuple(at), updates, mode=mode)


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str, validate_indices: bool = False) -> Array:
    """indices [*N, K] point at the first K axes; updates: N + data's remaining axes."""
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
