"""The element types of Core ML programs, and the conversion and rounding of fp16.

The evaluator holds fp16 tensors as float32 arrays of values that fp16 can represent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

HALF_MAX = 65504.0
NUMPY_LIMIT = 512  # elements up to which numpy converts to and from fp16 faster than torch; beyond it is much slower


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: its name in MIL.
        mil: its number in MIL.proto.
        blob: its number in weight.bin; None if it is never stored there.
        array: the dtype of an array of such elements.
        bits: the bits of an element.
    """

    name: str
    mil: int
    blob: int | None
    array: np.dtype[Any]
    bits: int

    @property
    def packed(self) -> bool:
        """Whether elements share bytes; the first element is in the lowest bits."""
        return self.bits < 8

    def nbytes(self, count: int) -> int:
        """Return the bytes that ``count`` elements take."""
        return (count * self.bits + 7) // 8

    def __str__(self) -> str:
        return self.name


def _dtype(name: str, mil: int, blob: int | None, *, array: type, bits: int = 0) -> DType:
    dtype: np.dtype[Any] = np.dtype(array)
    return DType(name, mil, blob, array=dtype, bits=bits or dtype.itemsize * 8)


BOOL = _dtype("bool", 1, None, array=np.bool_)
STRING = _dtype("string", 2, None, array=object)
FP16 = _dtype("fp16", 10, 1, array=np.float16)
FP32 = _dtype("fp32", 11, 2, array=np.float32)
INT4 = _dtype("int4", 25, 8, array=np.int8, bits=4)
INT32 = _dtype("int32", 23, 14, array=np.int32)
DTYPES = (
    BOOL,
    STRING,
    FP16,
    FP32,
    INT4,
    INT32,
    _dtype("fp64", 12, None, array=np.float64),
    _dtype("int8", 21, 4, array=np.int8),
    _dtype("int16", 22, 6, array=np.int16),
    _dtype("int64", 24, None, array=np.int64),
    _dtype("uint8", 31, 3, array=np.uint8),
    _dtype("uint16", 32, 7, array=np.uint16),
    _dtype("uint32", 33, 15, array=np.uint32),
    _dtype("uint64", 34, None, array=np.uint64),
    _dtype("uint4", 35, 11, array=np.uint8, bits=4),
    _dtype("uint2", 36, 10, array=np.uint8, bits=2),
    _dtype("uint1", 37, 9, array=np.uint8, bits=1),
    _dtype("uint6", 38, 13, array=np.uint8, bits=6),
    _dtype("uint3", 39, 12, array=np.uint8, bits=3),
)
BY_MIL: Mapping[int, DType] = {dtype.mil: dtype for dtype in DTYPES}
BY_BLOB: Mapping[int, DType] = {dtype.blob: dtype for dtype in DTYPES if dtype.blob is not None}
BY_NAME: Mapping[str, DType] = {dtype.name: dtype for dtype in DTYPES}


def decode(raw: Array, dtype: DType, count: int) -> Array:
    """Decode ``count`` elements from their little-endian bytes, uint8 [dtype.nbytes(count)].

    The result is a view, or a new array if ``dtype`` is packed.
    """
    if not dtype.packed:
        return raw.view(dtype.array.newbyteorder("<"))
    codes: Array
    if dtype.bits == 4:  # most weights are int4, and this is six times as fast
        codes = np.stack((raw & 15, raw >> 4), axis=1).ravel()[:count]
    else:
        bits = np.unpackbits(raw, bitorder="little")[: count * dtype.bits].reshape(count, dtype.bits)
        codes = (bits << np.arange(dtype.bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if dtype is INT4:
        codes = (codes ^ 8).astype(np.int8) - np.int8(8)
    return codes


def round_half(array: Array) -> Array:
    """Return a new float32 array of the nearest fp16 values; ties round to even, and overflow to infinity."""
    if array.size <= NUMPY_LIMIT:
        return array.astype(np.float16).astype(np.float32)
    return widen(_converted(array, torch.float16))


def widen(array: Array) -> Array:
    """Return an fp16 array as float32, and any other array unchanged."""
    if array.dtype != np.float16:
        return array
    return array.astype(np.float32) if array.size <= NUMPY_LIMIT else _converted(array, torch.float32)


def narrow(array: Array, dtype: DType) -> Array:
    """Return a new array of the declared type; it reverses ``widen``."""
    if dtype is not FP16 or array.size <= NUMPY_LIMIT:
        return array.astype(dtype.array)
    return _converted(array, torch.float16)


def _converted(array: Array, dtype: torch.dtype) -> Array:
    return tensor(array).to(dtype).numpy()


def tensor(array: Array) -> torch.Tensor:
    """Return ``array`` as a torch tensor; an array that is read-only or has negative strides is copied."""
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)


def largest_magnitude(array: Array) -> float:
    """Return the largest magnitude: NaN if an element is NaN, and 0 if there are no elements."""
    return float(np.abs(array).max()) if array.size else 0.0
