"""The tensors of an mlx-lm folder.

A quantised weight X [rows, columns] of b bits is, in MLX's affine mode with groups of g columns,

    X.weight  uint32 [rows, columns * b / 32]   codes + 2^(b-1), the first in the lowest bits of a word
    X.scales  float  [rows, columns / g]        scale x µP
    X.biases  float  [rows, columns / g]        -(2^(b-1) + zero point) x scale x µP

and stands for scales x codes + biases, so symmetric codes are exact: the bias is a power of two times the scale.
Source: MLX's documentation of ``mlx.core.quantize``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.weight_file import BLOCK_BYTES, Block
from h1export.checkpoint.packed_format import WORD
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedWeights
from h1export.targets.hf_folder.floats import float_blocks, rounded, unrounded
from h1export.targets.hf_folder.shards import Stored, TensorSpec
from h1export.targets.hf_folder.words import packed
from h1export.targets.mlx.fold import CONVOLUTION
from h1export.targets.mlx.options import Compute

DTYPES: Mapping[Compute, str] = {"fp16": "F16", "fp32": "F32", "bf16": "BF16"}
GROUPS = (128, 64, 32)  # columns that may share a scale in MLX
PARTS = ("weight", "scales", "biases")


def group_of(precision: Precision, columns: int, tensor: str) -> int:
    """Return the columns of a group in MLX; a scale that more columns share is repeated.

    Raises:
        H1ExportError: no group that MLX has divides the columns.
    """
    shared = precision.columns_per_group(columns)
    found = next((size for size in GROUPS if shared % size == 0), 0)
    if not found:
        what = f"has {columns} columns, which no group of MLX divides ({', '.join(map(str, GROUPS))})"
        raise H1ExportError(f'tensor "{tensor}"', what, "keep it in floats with --precisions, or use --quant none")
    return found


def quantization(store: WeightStore, integers: QuantizedWeights) -> dict[str, Any]:
    """Return config.json's ``quantization``: what most weights have, and by module what the others have."""
    found = {
        name.removesuffix(".weight"): {
            "group_size": group_of(precision, store.shape(name)[1], name),
            "bits": precision.bits,
        }
        for name, precision in integers.precisions.items()
    }
    if not found:
        return {}
    (most, _), *_ = Counter(tuple(setting.items()) for setting in found.values()).most_common(1)
    return dict(most) | {module: setting for module, setting in found.items() if setting != dict(most)}


def float_tensor(store: WeightStore, name: str, multiplier: Multiplier, *, dtype: str) -> Stored:
    """Return a tensor times its multiplier; convolution weights become [channels, taps, 1], which mlx-lm has."""
    shape = store.shape(name)
    if not name.endswith(CONVOLUTION):
        spec = TensorSpec(name, dtype, shape)
        return Stored((spec,), partial(float_blocks, store, name, dtype, multiplier=multiplier))
    channels, _, taps = shape
    spec = TensorSpec(name, dtype, (channels, taps, 1))
    return Stored(
        (spec,), partial(float_blocks, store, name, dtype, multiplier=multiplier, arranged=lambda x: x.swapaxes(1, 2))
    )


def quantized_tensor(
    store: WeightStore, integers: QuantizedWeights, name: str, *, multiplier: Multiplier, dtype: str
) -> Stored:
    """Return the three tensors of a quantised weight."""
    precision = integers.precisions[name]
    rows, columns = store.shape(name)
    groups = columns // group_of(precision, columns, name)
    stem = name.removesuffix("weight")
    shapes = (("U32", (rows, columns * precision.bits // WORD)), (dtype, (rows, groups)), (dtype, (rows, groups)))
    specs = tuple(
        TensorSpec(stem + part, part_dtype, shape) for part, (part_dtype, shape) in zip(PARTS, shapes, strict=True)
    )
    return Stored(specs, partial(_blocks, store, integers, name, multiplier=multiplier, dtype=dtype))


def _blocks(
    store: WeightStore, integers: QuantizedWeights, name: str, *, multiplier: Multiplier, dtype: str
) -> Iterator[Block]:
    factors = multiplier.rows(store.shape(name)[0])
    for start, stop in store.row_ranges([name], BLOCK_BYTES):
        yield partial(_block, integers, name, factors[start:stop], start=start, stop=stop, dtype=dtype)


def _block(
    integers: QuantizedWeights, name: str, factors: Array, *, start: int, stop: int, dtype: str
) -> tuple[npt.NDArray[Any], ...]:
    found = integers.rows(name, start, stop)
    bits = integers.precisions[name].bits
    columns = found.codes.shape[1]
    repeats = columns // group_of(integers.precisions[name], columns, name) // found.scales.shape[1]
    exact = found.scales.astype(np.float64) * factors[:, None]
    scales = rounded(exact, dtype, tensor=name)
    kept = unrounded(scales, dtype)
    if not kept.all():
        what = f"has scales that are 0 in {dtype} once µP is folded into them"
        raise H1ExportError(f'tensor "{name}"', what, "use --compute fp32")
    zeros = np.zeros(exact.shape, np.int8) if found.zeros is None else found.zeros
    biases = rounded(-((1 << (bits - 1)) + zeros.astype(np.float64)) * kept, dtype, tensor=name)
    return packed(found.codes, bits), np.repeat(scales, repeats, axis=1), np.repeat(biases, repeats, axis=1)
