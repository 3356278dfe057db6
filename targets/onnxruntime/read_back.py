"""Integers read back from an artifact whose products are MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from h1export.artifact.manifest import StoredWeight
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.targets.onnx.column_major import CODES, SCALES, ZEROS
from h1export.targets.onnxruntime.emit.packing import NBitsLayout


def read_stored(
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
