"""bf16 arrays in ONNX Runtime's Python API, which has names for NumPy's own dtypes only.

An array of ml_dtypes.bfloat16 goes in by its bits and the number of its ONNX type, and comes out by its address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime.run_options import run_options

BFLOAT16 = 16  # TensorProto.DataType of onnx.proto


def in_numpy(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return the dtype of NumPy's own that stores the bits of ``dtype``: uint16 for bf16, others themselves."""
    return np.dtype(np.uint16 if dtype == ml_dtypes.bfloat16 else dtype)


def element_type(dtype: np.dtype[Any]) -> Any:
    """Return how ONNX Runtime names ``dtype``: by ONNX's number for bf16, by NumPy's scalar type for others."""
    return BFLOAT16 if dtype == ml_dtypes.bfloat16 else dtype.type


def run(session: Any, outputs: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Run an InferenceSession whose inputs and outputs are on the CPU, bf16 among them where a feed has it."""
    if not any(array.dtype == ml_dtypes.bfloat16 for array in feeds.values()):
        found: list[npt.NDArray[Any]] = session.run(outputs, dict(feeds), run_options())
        return found
    values = session.run_with_ort_values(outputs, {name: _value(array) for name, array in feeds.items()}, run_options())
    return [_array(value) for value in values]


def _value(array: npt.NDArray[Any]) -> Any:
    kind = sdk.onnxruntime().OrtValue
    if array.dtype != ml_dtypes.bfloat16:
        return kind.ortvalue_from_numpy(array)
    return kind.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint16), BFLOAT16)


def _array(value: Any) -> npt.NDArray[Any]:
    if value.element_type() != BFLOAT16:
        array: npt.NDArray[Any] = value.numpy()
        return array
    shape = value.shape()
    bits = ctypes.string_at(value.data_ptr(), 2 * prod(shape)) if prod(shape) else b""
    return np.frombuffer(bits, np.uint16).reshape(shape).view(ml_dtypes.bfloat16)
