"""Reductions and cumulative sums (MIL specification: reduction and tensor_operation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import (
    Ints,
    Op,
    OpError,
    Table,
    axes_of,
    axis_of,
    computes,
    require_floats,
)

INDEX_TYPES = ("int32", "uint16")


def reduction_op(function: Callable[..., Any]) -> Op:
    """Define an op that reduces ``axes``, or all axes if none are given, with a function of numpy."""

    def reduce(x: Array, axes: Ints | None = None, keep_dims: bool = False) -> Array:
        return np.asarray(function(x, axis=axes_of(axes, x.ndim), keepdims=keep_dims))

    return computes(reduce)


def arg_reduction_op(function: Callable[..., Any]) -> Op:
    """Define an op that returns the index of the first extreme value along ``axis``."""

    def reduce(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
        if output_dtype not in INDEX_TYPES:
            raise OpError(f"has output_dtype {output_dtype!r}")
        return np.asarray(function(x, axis=axis_of(axis, x.ndim), keepdims=keep_dims))

    return computes(reduce)


def log_sum_exp(x: Array, axis: Ints, keepdims: bool) -> Array:
    """Compute log(sum(e^x)) without overflow."""
    largest = require_floats(x).max(axis, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, np.float32(0))
    result: Array = np.log(np.exp(x - shift).sum(axis, keepdims=True)) + shift
    return result if keepdims else result.squeeze(axis)


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Sum the elements up to each element of ``axis``.

    ``reverse`` sums from each element to the end; ``exclusive`` leaves the element itself out.
    """
    axis = axis_of(axis, x.ndim)
    ordered = np.flip(x, axis) if reverse else x
    result = np.cumsum(ordered, axis, dtype=x.dtype)
    if exclusive:  # a difference of sums would be rounded once more
        result = np.roll(result, 1, axis)
        result[(slice(None),) * axis + (slice(0, 1),)] = 0
    return np.flip(result, axis) if reverse else result


TABLE: Table = {
    "reduce_sum": reduction_op(np.sum),
    "reduce_mean": reduction_op(lambda x, **options: np.mean(require_floats(x), **options)),
    "reduce_max": reduction_op(np.max),
    "reduce_min": reduction_op(np.min),
    "reduce_prod": reduction_op(np.prod),
    "reduce_sum_square": reduction_op(lambda x, **options: np.square(x).sum(**options)),
    "reduce_l1_norm": reduction_op(lambda x, **options: np.abs(x).sum(**options)),
    "reduce_l2_norm": reduction_op(lambda x, **options: np.sqrt(np.square(require_floats(x)).sum(**options))),
    "reduce_log_sum": reduction_op(lambda x, **options: np.log(require_floats(x).sum(**options))),
    "reduce_log_sum_exp": reduction_op(log_sum_exp),
    "reduce_argmax": arg_reduction_op(np.argmax),
    "reduce_argmin": arg_reduction_op(np.argmin),
    "cumsum": computes(cumsum),
}
