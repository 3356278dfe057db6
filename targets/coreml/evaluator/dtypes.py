"""Element types of CoreML programs, and fp16 as the evaluator holds it: float32 arrays of values that fp16 has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

HALF_MAX = 65504.0
FEW = 512  # elements: up to here numpy's rounding to fp16 is faster than torch's, from here on much slower


@dataclass(frozen=True)
class DType:
    """An element type: its number in MIL.proto, its number in weight.bin (None: never stored there), the array type that holds it."""

    name: str
    mil: int
    blob: int | None
    array: np.dtype[Any]
    bits: int

    @property
    def packed(self) -> bool:
        """Whether elements share bytes, the first one in the lowest bits."""
        return self.bits < 8

    def nbytes(self, count: int) -> int:
        """Bytes that ``count`` elements occupy."""
        return (count * self.bits + 7) // 8

    def __str__(self) -> str:
        return self.name


def _dtype(name: str, mil: int, blob: int | None, array: type, bits: int = 0) -> DType:
    dtype: np.dtype[Any] = np.dtype(array)
    return DType(name, mil, blob, array=dtype, bits=bits or dtype.itemsize * 8)


BOOL = _dtype("bool", 1, None, np.bool_)
STRING = _dtype("string", 2, None, object)
FP16 = _dtype("fp16", 10, 1, np.float16)
FP32 = _dtype("fp32", 11, 2, np.float32)
INT4 = _dtype("int4", 25, 8, np.int8, bits=4)
INT32 = _dtype("int32", 23, 14, np.int32)
DTYPES = (
    BOOL,
    STRING,
    FP16,
    FP32,
    INT4,
    INT32,
    _dtype("fp64", 12, None, np.float64),
    _dtype("int8", 21, 4, np.int8),
    _dtype("int16", 22, 6, np.int16),
    _dtype("int64", 24, None, np.int64),
    _dtype("uint8", 31, 3, np.uint8),
    _dtype("uint16", 32, 7, np.uint16),
    _dtype("uint32", 33, 15, np.uint32),
    _dtype("uint64", 34, None, np.uint64),
    _dtype("uint4", 35, 11, np.uint8, bits=4),
    _dtype("uint2", 36, 10, np.uint8, bits=2),
    _dtype("uint1", 37, 9, np.uint8, bits=1),
    _dtype("uint6", 38, 13, np.uint8, bits=6),
    _dtype("uint3", 39, 12, np.uint8, bits=3),
)
BY_MIL: Mapping[int, DType] = {dtype.mil: dtype for dtype in DTYPES}
BY_BLOB: Mapping[int, DType] = {dtype.blob: dtype for dtype in DTYPES if dtype.blob is not None}
BY_NAME: Mapping[str, DType] = {dtype.name: dtype for dtype in DTYPES}


def decode(raw: Array, dtype: DType, count: int) -> Array:
    """``count`` elements from little-endian bytes (uint8, exactly ``dtype.nbytes(count)``): a view, or a new array where packed."""
    if not dtype.packed:
        return raw.view(dtype.array.newbyteorder("<"))
    codes: Array
    if dtype.bits == 4:  # what most weights are, and six times as fast
        codes = np.stack((raw & 15, raw >> 4), axis=1).ravel()[:count]
    else:
        bits = np.unpackbits(raw, bitorder="little")[: count * dtype.bits].reshape(count, dtype.bits)
        codes = (bits << np.arange(dtype.bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if dtype is INT4:
        codes = (codes ^ 8).astype(np.int8) - np.int8(8)
    return codes


def round_half(array: Array) -> Array:
    """Float32 of the nearest fp16 values, ties to even; beyond 65504 infinite. A new array."""
    if array.size <= FEW:
        return array.astype(np.float16).astype(np.float32)
    return widen(_converted(array, torch.float16))


def widen(array: Array) -> Array:
    """fp16 as the evaluator holds it, float32; anything else unchanged."""
    if array.dtype != np.float16:
        return array
    return array.astype(np.float32) if array.size <= FEW else _converted(array, torch.float32)


def narrow(array: Array, dtype: DType) -> Array:
    """The reverse of ``widen``: a new array of the declared type."""
    if dtype is not FP16 or array.size <= FEW:
        return array.astype(dtype.array)
    return _converted(array, torch.float16)


def _converted(array: Array, dtype: torch.dtype) -> Array:
    return tensor(array).to(dtype).numpy()


def tensor(array: Array) -> torch.Tensor:
    """``array`` for torch; of one that is read-only, or whose strides run backwards, a copy."""
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)


def peak(array: Array) -> float:
    """Largest magnitude; NaN where there is one; 0 for no elements."""
    return float(np.abs(array).max()) if array.size else 0.0
