"""Sorting (MIL specification: topk and argsort); the order of equal values is kept."""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Result, Table, axis_of, moves
from h1export.targets.coreml.evaluator.ops.reduction import INDEX_TYPES


def argsort(x: Array, axis: int = -1, ascending: bool = False) -> Array:
    """Return the int32 indices that sort ``x`` along ``axis``."""
    axis = axis_of(axis, x.ndim)
    if ascending:
        return np.argsort(x, axis, stable=True)
    flipped = np.argsort(np.flip(x, axis), axis, stable=True)
    indices: Array = x.shape[axis] - 1 - np.flip(flipped, axis)
    return indices


def topk(
    x: Array,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Result:
    """Return the k largest values along ``axis`` in descending order, and their indices.

    ``ascending`` returns the k smallest in ascending order; a k of -1 returns all.
    """
    axis = axis_of(axis, x.ndim)
    count = x.shape[axis] if k == -1 else k
    if not 0 <= count <= x.shape[axis] or output_indices_dtype not in INDEX_TYPES:
        raise OpError(f"has k {k} for axis {axis} of {x.shape}, output_indices_dtype {output_indices_dtype!r}")
    indices = argsort(x, axis, ascending)[(slice(None),) * axis + (slice(count),)]
    values = np.take_along_axis(x, indices, axis)
    return (values, indices) if return_indices else values


TABLE: Table = {"argsort": moves(argsort), "topk": moves(topk)}
