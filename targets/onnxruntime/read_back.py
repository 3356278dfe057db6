"""Integers read back from an artifact, by what its products are: MatMulNBits, or MatMul behind a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.manifest import StoredWeight
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.targets.onnx.column_major import CODES, SCALES, ZEROS, read_column_major
from h1export.targets.onnxruntime.emit.packing import NBitsLayout

ROWS = ".rows"  # suffix of the name under which an embedding reads codes, one row a token
# suffix of an embedding's codes, one row a token; a tied head has codes of its own, column by column
TABLE = ".table"


def read_matmul_nbits(
    weight: StoredWeight, tensors: Mapping[str, Any], columns: Callable[[str], int]
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield the integers that an artifact stores, by checkpoint tensor.

    Args:
        weight: the initializer's entry in the manifest.
        tensors: initializer -> array as stored.
        columns: gives the number of columns of a checkpoint tensor.
    """
    precision = Precision(weight.bits, weight.group_size)
    zeros = tensors.get(weight.initializer + ZEROS)
    width = sum(part.size for part in weight.parts) if weight.axis else columns(weight.parts[0].tensor)
    whole = NBitsLayout.of(precision, width)
    start = 0
    for part in weight.parts:
        rows = slice(start, start + part.size)
        blocks = slice(None)
        if weight.axis:
            rows = slice(None)
            blocks = slice(start // whole.block_size, (start + part.size) // whole.block_size)
        codes = tensors[weight.initializer + CODES][rows, blocks]
        scales = tensors[weight.initializer + SCALES][rows, blocks]
        layout = replace(whole, columns=columns(part.tensor))
        multiplier = part.multiplier.rows(len(codes))
        groups = slice(layout.blocks if weight.group_size else 1)
        zero_points = None if zeros is None else whole.unpack_zeros(np.asarray(zeros[rows]))[:, blocks][:, groups]
        quantized = QuantizedTensor(layout.unpack(codes), np.asarray(scales[:, groups]), multiplier, zeros=zero_points)
        yield part.tensor, quantized
        start += part.size


def read_dequantize_linear(
    weight: StoredWeight, tensors: Mapping[str, Any], columns: Callable[[str], int]
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield the integers that an artifact stores, by checkpoint tensor; int4 arrays are flat. See read_matmul_nbits."""
    (part,) = weight.parts
    name = weight.initializer
    multiplier = part.multiplier.rows(part.size)
    zeros = None
    if name + CODES in tensors:
        scales = tensors[name + SCALES].reshape(-1, part.size).T
        codes = read_column_major(tensors[name + CODES], weight.bits, part.size)
        zeros = read_column_major(tensors[name + ZEROS], weight.bits, part.size) if name + ZEROS in tensors else None
    else:
        codes = np.asarray(tensors[name + TABLE])
        if weight.bits == 4:
            table = NBitsLayout(weight.bits, weight.group_size, columns(part.tensor))
            codes = table.unpack(codes.view(np.uint8))
        scales = tensors[name + TABLE + SCALES]
    yield part.tensor, QuantizedTensor(codes, unfolded_scales(scales, multiplier), multiplier, zeros=zeros)


def unfolded_scales(stored: Array, multiplier: Array) -> npt.NDArray[np.float16]:
    """Undo ``folded_scales`` of emit/dequantize_linear.py.

    Dividing by the multiplier lands within half a unit in the last place of float16.
    """
    return (stored.astype(np.float64) / multiplier[:, None]).astype(np.float16)
