"""Shapes, concatenation and padding (MIL specification: tensor_transformation and tensor_operation)."""

from __future__ import annotations

from math import prod

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import Arrays, Ints, OpError, Table, axes_of, axis_of, moves

PADS = {"reflect": "reflect", "replicate": "edge"}


def reshape(x: Array, shape: Ints) -> Array:
    """Reshape x; a size of -1 stands for what is left.

    A size of 0 stands for x's size at the same place counted from the right, or for 1 beyond x's rank (iOS 17 on).
    """
    sizes = [x.shape[i] if i >= 0 else 1 for i in range(x.ndim - len(shape), x.ndim)]
    return x.reshape([wanted or size for wanted, size in zip(shape, sizes, strict=True)])


def reshape_like(x: Array, ref_tensors: Arrays, begins: Arrays, ends: Arrays, end_masks: Arrays) -> Array:
    """Reshape x to the sizes ``ref.shape[begin:end]``, or ``[begin:]`` if masked, of all references in a row."""
    parts = zip(ref_tensors, begins, ends, end_masks, strict=True)
    sizes = [ref.shape[int(begin) : None if bool(mask) else int(end)] for ref, begin, end, mask in parts]
    return x.reshape([size for part in sizes for size in part])


def transpose(x: Array, perm: Ints) -> Array:
    """Permute the axes; axis i of the result is axis perm[i] of x."""
    return np.transpose(x, perm)


def expand_dims(x: Array, axes: Ints) -> Array:
    """Insert axes of size 1 at ``axes`` of the result."""
    return np.expand_dims(x, axes)


def squeeze(x: Array, axes: Ints | None = None) -> Array:
    """Drop ``axes``, which have size 1; None drops all axes of size 1."""
    return np.squeeze(x, axes)


def flatten2d(x: Array, axis: int = 1) -> Array:
    """Flatten the axes before ``axis``, and those from it on."""
    axis = axis_of(axis, x.ndim)
    return x.reshape(prod(x.shape[:axis]), -1)


def reverse(x: Array, axes: Ints | None = None) -> Array:
    """Reverse the order along ``axes``; None stands for all axes."""
    return np.flip(x, axes_of(axes, x.ndim))


def concat(values: Arrays, axis: int, interleave: bool = False) -> Array:
    """Concatenate along ``axis``, or alternate the slices of the inputs if ``interleave``; scalars give a vector."""
    if values[0].ndim == 0:
        return np.stack(values)
    axis = axis_of(axis, values[0].ndim)
    if not interleave:
        return np.concatenate(values, axis)
    joined = np.stack(values, axis + 1)
    return joined.reshape([size * (len(values) if i == axis else 1) for i, size in enumerate(values[0].shape)])


def stack(values: Arrays, axis: int) -> Array:
    """Join tensors of one shape along a new axis."""
    return np.stack(values, axis)


def split(x: Array, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> list[Array]:
    """Split x along ``axis`` into parts of the given sizes, or into ``num_splits`` equal parts."""
    axis = axis_of(axis, x.ndim)
    if split_sizes is None:
        if not num_splits or x.shape[axis] % num_splits:
            raise OpError(f"splits axis {axis} of {x.shape} into {num_splits} equal parts")
        split_sizes = (x.shape[axis] // num_splits,) * num_splits
    if sum(split_sizes) != x.shape[axis] or min(split_sizes) < 0 or num_splits not in (None, len(split_sizes)):
        raise OpError(f"splits axis {axis} of {x.shape} into {num_splits} parts of sizes {split_sizes}")
    before = (slice(None),) * axis
    start = 0
    parts = []
    for size in split_sizes:
        parts.append(x[(*before, slice(start, start + size))])
        start += size
    return parts


def tile(x: Array, reps: Ints) -> Array:
    """Repeat x ``reps[i]`` times along axis i."""
    if len(reps) != x.ndim:
        raise OpError(f"has {len(reps)} repetitions for rank {x.ndim}")
    return np.tile(x, reps)


def pad(x: Array, pad: Ints, mode: str = "constant", constant_val: Array | None = None) -> Array:
    """Pad the last axes; ``pad`` has the elements before and after each of them."""
    if len(pad) % 2 or len(pad) > 2 * x.ndim or any(size < 0 for size in pad):
        raise OpError(f"has pad {pad} for a tensor of rank {x.ndim}")
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, widths, constant_values=x.dtype.type(0) if constant_val is None else constant_val)
    if mode not in PADS:
        raise OpError(f"has mode {mode!r}, which the specification does not have")
    if any(max(width) > size - (mode == "reflect") for width, size in zip(widths, x.shape, strict=True) if max(width)):
        raise OpError(f"pads {x.shape} with {pad}, more than mode {mode!r} allows")
    return np.pad(x, widths, mode=PADS[mode])  # type: ignore[call-overload, no-any-return]


def sliding_windows(x: Array, axis: int, size: int, stride: int = 1) -> Array:
    """Return the windows of ``size`` elements along ``axis``; their elements are on a new axis after it."""
    axis = axis_of(axis, x.ndim)
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis)
    return np.moveaxis(windows[(slice(None),) * axis + (slice(None, None, stride),)], -1, axis + 1)


TABLE: Table = {
    "reshape": moves(reshape),
    "reshape_like": moves(reshape_like),
    "transpose": moves(transpose),
    "expand_dims": moves(expand_dims),
    "squeeze": moves(squeeze),
    "flatten2d": moves(flatten2d),
    "reverse": moves(reverse),
    "concat": moves(concat),
    "stack": moves(stack),
    "split": moves(split),
    "tile": moves(tile),
    "pad": moves(pad),
    "sliding_windows": moves(sliding_windows),
}
