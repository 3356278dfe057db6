"""Tensors made from sizes, scalars and positions (MIL specification: tensor_operation)."""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import (
    Ints,
    OpError,
    Table,
    axis_of,
    broadcastable,
    check_indices,
    computes,
    moves,
)


def fill(shape: Ints, value: Array | None = None) -> Array:
    """Return a tensor of ``shape`` filled with ``value``, or with float zeros if there is none."""
    if any(size < 0 for size in shape):
        raise OpError(f"fills shape {shape}")
    return np.zeros(shape, np.float32) if value is None else np.full(shape, value, value.dtype)


def fill_like(ref_tensor: Array, value: Array | None = None) -> Array:
    """Return a tensor of the shape of ``ref_tensor``, see ``fill``."""
    return fill(ref_tensor.shape, value)


def range_1d(start: Array, end: Array, step: Array) -> Array:
    """Return start, start + step, ... up to, but without, end; the three are scalars of one type."""
    if not start.size == end.size == step.size == 1 or not step.any():
        raise OpError(f"has start {start}, end {end}, step {step}")
    result: Array = np.arange(start.item(), end.item(), step.item()).astype(start.dtype)
    return result


def shape(x: Array) -> Array:
    """Return the shape of x as int32 [rank]."""
    return np.array(x.shape, np.int32)


def one_hot(
    indices: Array,
    one_hot_vector_size: int,
    on_value: Array | None = None,
    off_value: Array | None = None,
    axis: int = -1,
) -> Array:
    """Return ``on_value`` at the place of each index along a new axis of the result, and ``off_value`` elsewhere."""
    check_indices(indices, one_hot_vector_size, axis)
    axis = axis_of(axis, indices.ndim + 1)
    on = np.int32(1) if on_value is None else on_value
    off = np.int32(0) if off_value is None else off_value
    places = broadcastable(np.arange(one_hot_vector_size), indices.ndim + 1, axis)
    return np.where(np.expand_dims(indices, axis) == places, on, off)


def band_part(x: Array, lower: int = -1, upper: int = -1) -> Array:
    """Keep the band of ``lower`` subdiagonals and ``upper`` superdiagonals of the last two axes, and zero the rest.

    -1 keeps all of them.
    """
    row, column = np.ogrid[: x.shape[-2], : x.shape[-1]]
    inside = ((lower < 0) | (row - column <= lower)) & ((upper < 0) | (column - row <= upper))
    return np.where(inside, x, x.dtype.type(0))


def non_zero(x: Array) -> Array:
    """Return the indices of the nonzero elements in row-major order, int32 [n, rank]."""
    return np.stack(np.nonzero(x), axis=1).astype(np.int32)


TABLE: Table = {
    "fill": moves(fill),
    "fill_like": moves(fill_like),
    "range_1d": computes(range_1d),
    "shape": moves(shape),
    "one_hot": moves(one_hot),
    "band_part": moves(band_part),
    "non_zero": moves(non_zero),
}
