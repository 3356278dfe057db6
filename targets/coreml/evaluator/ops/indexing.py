"""Gathering and selecting (MIL specification: iOS 17 scatter_gather and control_flow).

Negative indices are out of bounds. An index out of bounds raises OpError whatever ``validate_indices`` is, because its
result on a device is undefined.
"""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, axis_of, check_indices, moves


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Gather x [*D] at indices [*N] along ``axis``: the result has the shape D[:axis] + N[batch_dims:] + D[axis+1:]."""
    axis = axis_of(axis, x.ndim)
    check_indices(indices, x.shape[axis], axis)
    if not batch_dims:
        return np.take(x, indices, axis)
    if not 0 < batch_dims <= min(axis, indices.ndim) or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise OpError(f"has x {x.shape}, indices {indices.shape}, axis {axis}, batch_dims {batch_dims}")
    batch = x.shape[:batch_dims]
    rows = [np.take(x[row], indices[row], axis - batch_dims) for row in np.ndindex(batch)]
    return np.stack(rows).reshape(*batch, *rows[0].shape)


def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool = False) -> Array:
    """Gather along ``axis``; ``indices`` and the result have the shape of x except for the size of ``axis``."""
    axis = axis_of(axis, x.ndim)
    check_indices(indices, x.shape[axis], axis)
    if x.ndim != indices.ndim or any(
        a != b for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if i != axis
    ):
        raise OpError(f"has x {x.shape}, indices {indices.shape}, axis {axis}")
    return np.take_along_axis(x, indices.astype(np.int64), axis)


def gather_nd(x: Array, indices: Array, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Gather at indices [*B, *N, K], which address the K axes after the batch axes B.

    The result has the axes B, N and the remaining axes of x.
    """
    depth = indices.shape[-1]
    if (
        batch_dims < 0
        or batch_dims + depth > x.ndim
        or batch_dims >= indices.ndim
        or x.shape[:batch_dims] != indices.shape[:batch_dims]
    ):
        raise OpError(f"has x {x.shape}, indices {indices.shape}, batch_dims {batch_dims}")
    for i in range(depth):
        check_indices(indices[..., i], x.shape[batch_dims + i], batch_dims + i)
    inner = indices.ndim - 1 - batch_dims
    batch = [
        np.arange(size).reshape(size, *(1,) * (batch_dims - i - 1 + inner))
        for i, size in enumerate(x.shape[:batch_dims])
    ]
    result: Array = x[*batch, *(indices[..., i] for i in range(depth))]
    return result


def select(cond: Array, a: Array, b: Array) -> Array:
    """Return a where cond is true, else b; all three broadcast."""
    if cond.dtype != np.bool_:
        raise OpError(f"has a condition of {cond.dtype} instead of bool")
    return np.where(cond, a, b)


TABLE: Table = {
    "gather": moves(gather),
    "gather_along_axis": moves(gather_along_axis),
    "gather_nd": moves(gather_nd),
    "select": moves(select),
}
