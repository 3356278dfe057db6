"""Slices and their updates (MIL specification: iOS 17 slice_by_index and slice_by_size, iOS 18 slice_update)."""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import Ints, OpError, Table, moves

Index = tuple[int | slice, ...]


def numpy_index(
    shape: Ints,
    begin: Ints,
    end: Ints,
    *,
    stride: Ints | None,
    begin_mask: Ints | None,
    end_mask: Ints | None,
    squeeze_mask: Ints | None,
    strict: bool,
) -> Index:
    """Return numpy's index of a slice; negative bounds count from the end.

    A bound outside its axis is clamped.

    Raises:
        OpError: a begin is after its end, a stride is zero, or, if ``strict``, a bound is outside its axis.
    """
    rank = len(shape)
    none = (0,) * rank
    stride = stride or (1,) * rank
    begin_mask = begin_mask or none
    end_mask = end_mask or none
    squeeze_mask = squeeze_mask or none
    if not len(begin) == len(end) == len(stride) == len(begin_mask) == len(end_mask) == len(squeeze_mask) == rank:
        raise OpError(f"has a slice of {len(begin)} axes for shape {shape}")
    index: list[int | slice] = []
    for axis, size in enumerate(shape):
        if squeeze_mask[axis]:
            index.append(_element(0 if begin_mask[axis] else begin[axis], size, axis))
            continue
        exact = strict or stride[axis] < 0  # a clamped bound is not specified for negative strides
        first = None if begin_mask[axis] else _bound(begin[axis], size, axis, exact=exact)
        last = None if end_mask[axis] else _bound(end[axis], size, axis, exact=exact)
        if stride[axis] == 0 or (first is not None and last is not None and (last - first) * stride[axis] < 0):
            raise OpError(f"has begin {first}, end {last} and stride {stride[axis]} along axis {axis}")
        index.append(slice(first, last, stride[axis]))
    return tuple(index)


def _bound(value: int, size: int, axis: int, *, exact: bool = True) -> int:
    if exact and not -size <= value <= size:
        raise OpError(f"has bound {value} of axis {axis}, which has {size} elements")
    return min(max(value + size if value < 0 else value, 0), size)


def _element(value: int, size: int, axis: int) -> int:
    if not -size <= value < size:
        raise OpError(f"takes element {value} of axis {axis}, which has {size} elements")
    return value


def slice_by_index(
    x: Array,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> Array:
    """Return x[begin:end:stride].

    ``begin_mask`` and ``end_mask`` ignore the bound of an axis; ``squeeze_mask`` takes the element at begin and drops
    the axis.
    """
    index = numpy_index(
        x.shape,
        begin,
        end,
        stride=stride,
        begin_mask=begin_mask,
        end_mask=end_mask,
        squeeze_mask=squeeze_mask,
        strict=False,
    )
    return np.asarray(x[index])


def slice_by_size(x: Array, begin: Ints, size: Ints) -> Array:
    """Return ``size`` elements from ``begin`` on along each axis; -1 takes all that follow."""
    if not len(begin) == len(size) == x.ndim:
        raise OpError(f"has begin {begin} and size {size} for shape {x.shape}")
    starts = [_bound(start, own, axis) for axis, (start, own) in enumerate(zip(begin, x.shape, strict=True))]
    ends = [own if count == -1 else start + count for start, count, own in zip(starts, size, x.shape, strict=True)]
    if any(end > own or end < start for start, end, own in zip(starts, ends, x.shape, strict=True)):
        raise OpError(f"has begin {begin} and size {size}, outside shape {x.shape}")
    return x[tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))]


def slice_update(
    x: Array,
    update: Array,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> Array:
    """Return a copy of x with ``update`` in the place of a slice of exactly its shape."""
    index = numpy_index(
        x.shape,
        begin,
        end,
        stride=stride,
        begin_mask=begin_mask,
        end_mask=end_mask,
        squeeze_mask=squeeze_mask,
        strict=True,
    )
    result = x.copy()
    if result[index].shape != update.shape:
        raise OpError(f"puts update {update.shape} into a slice of shape {result[index].shape}")
    result[index] = update
    return result


TABLE: Table = {
    "slice_by_index": moves(slice_by_index),
    "slice_by_size": moves(slice_by_size),
    "slice_update": moves(slice_update),
}
