"""Compressed constants (MIL specification: iOS 18 compression and iOS 16 constexpr_ops).

They are decompressed once per package, in float32.
"""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, axis_of, broadcastable, computes, moves


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeat ``values`` along each axis to the sizes of ``shape``, which its own must divide; further axes stay."""
    if any(size % blocks for blocks, size in zip(values.shape, shape, strict=False)):
        raise OpError(f"has blocks {values.shape} that do not divide {shape}")
    for axis, size in enumerate(shape):
        if values.shape[axis] != size:
            values = np.repeat(values, size // values.shape[axis], axis)
    return values


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Compute scale * (data - offset); a block of elements along each axis shares a scale and an offset."""
    if data.ndim != scale.ndim or (offset is not None and offset.shape != scale.shape):
        offset_text = "" if offset is None else f", offset {offset.shape}"
        raise OpError(f"has data {data.shape}, scale {scale.shape}{offset_text}")
    result = data.astype(np.float32)
    if offset is not None:
        result -= _spread(offset.astype(np.float32), data.shape)
    result *= _spread(scale.astype(np.float32), data.shape)
    return result


def lut_to_dense(indices: Array, lut: Array, vector_axis: int | None = None) -> Array:
    """Look up indices [*D] in the tables lut [*G, entries, vector].

    The sizes of G divide those of D, and the elements of a vector run along ``vector_axis``.
    """
    rank = indices.ndim
    if lut.ndim != rank + 2:
        raise OpError(f"has indices {indices.shape} and a table {lut.shape}, whose rank must be two more")
    if indices.size and int(indices.max()) >= lut.shape[-2]:
        raise OpError(f"has index {int(indices.max())} into a table of {lut.shape[-2]}")
    groups = _spread(np.arange(int(np.prod(lut.shape[:-2]))).reshape(lut.shape[:-2]), indices.shape)
    vectors = lut.reshape(-1, *lut.shape[-2:])[groups, indices.astype(np.int64)]
    if lut.shape[-1] == 1:
        return vectors[..., 0]
    if vector_axis is None:
        raise OpError("has vectors in its table but no vector_axis")
    axis = axis_of(vector_axis, rank)
    shape = [size * (lut.shape[-1] if i == axis else 1) for i, size in enumerate(indices.shape)]
    return np.moveaxis(vectors, -1, axis + 1).reshape(shape)


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    """Compute scale * (quantized_data - zero_point); both are scalars or have one value per index of ``axis``."""
    rank = quantized_data.ndim
    axis = axis_of(axis, rank)
    for value in (zero_point, scale):
        if value.ndim > 1 or (value.ndim == 1 and value.size not in (1, quantized_data.shape[axis])):
            raise OpError(f"has values of shape {value.shape} for axis {axis} of {quantized_data.shape}")
    shift, factor = (broadcastable(value.astype(np.float32), rank, axis) for value in (zero_point, scale))
    return factor * (quantized_data.astype(np.float32) - shift)


def cast(source_val: Array, output_dtype: str) -> Array:
    """Cast fp16 to fp32."""
    if output_dtype != "fp32":
        raise OpError(f"casts to {output_dtype!r}, and the specification allows fp32 only")
    return source_val.astype(np.float32)


TABLE: Table = {
    "constexpr_blockwise_shift_scale": computes(blockwise_shift_scale),
    "constexpr_lut_to_dense": moves(lut_to_dense),
    "constexpr_affine_dequantize": computes(affine_dequantize),
    "constexpr_cast": moves(cast),
}
