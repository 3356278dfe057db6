"""Reductions and cumulative sums (Core ML MIL specification, reduction and tensor_operation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import Ints, Op, OpError, Table, axes_of, axis_of, computes, floats

INDEX_TYPES = ("int32", "uint16")


def over_axes(function: Callable[..., Any]) -> Op:
    """An op over ``axes``, all where none are given; ``function`` is one of numpy's."""

    def reduce(x: Array, axes: Ints | None = None, keep_dims: bool = False) -> Array:
        return np.asarray(function(x, axis=axes_of(axes, x.ndim), keepdims=keep_dims))

    return computes(reduce)


def index_of(function: Callable[..., Any]) -> Op:
    """An op that returns where along ``axis`` the first extreme value is."""

    def reduce(x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Array:
        if output_dtype not in INDEX_TYPES:
            raise OpError(f"has output_dtype {output_dtype!r}")
        return np.asarray(function(x, axis=axis_of(axis, x.ndim), keepdims=keep_dims))

    return computes(reduce)


def log_sum_exp(x: Array, axis: Ints, keepdims: bool) -> Array:
    """log(sum(e^x)), without overflow."""
    largest = floats(x).max(axis, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, np.float32(0))
    result: Array = np.log(np.exp(x - shift).sum(axis, keepdims=True)) + shift
    return result if keepdims else result.squeeze(axis)


def cumsum(x: Array, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Array:
    """Sums up to each element of ``axis``, or from it on where ``reverse``; without itself where ``exclusive``."""
    axis = axis_of(axis, x.ndim)
    ordered = np.flip(x, axis) if reverse else x
    result = np.cumsum(ordered, axis, dtype=x.dtype)
    if exclusive:  # not the difference of sums: it would round once more
        result = np.roll(result, 1, axis)
        result[(slice(None),) * axis + (slice(0, 1),)] = 0
    return np.flip(result, axis) if reverse else result


TABLE: Table = {
    "reduce_sum": over_axes(np.sum),
    "reduce_mean": over_axes(lambda x, **to: np.mean(floats(x), **to)),
    "reduce_max": over_axes(np.max),
    "reduce_min": over_axes(np.min),
    "reduce_prod": over_axes(np.prod),
    "reduce_sum_square": over_axes(lambda x, **to: np.square(x).sum(**to)),
    "reduce_l1_norm": over_axes(lambda x, **to: np.abs(x).sum(**to)),
    "reduce_l2_norm": over_axes(lambda x, **to: np.sqrt(np.square(floats(x)).sum(**to))),
    "reduce_log_sum": over_axes(lambda x, **to: np.log(floats(x).sum(**to))),
    "reduce_log_sum_exp": over_axes(log_sum_exp),
    "reduce_argmax": index_of(np.argmax),
    "reduce_argmin": index_of(np.argmin),
    "cumsum": computes(cumsum),
}
