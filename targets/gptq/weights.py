"""The tensors of a folder in GPTQ's layout, version 1.

A packed weight X [rows, columns] of b bits is

    X.qweight  int32 [columns * b / 32, rows]     codes, packed along the columns
    X.qzeros   int32 [groups, rows * b / 32]      zero points - 1, packed along the rows
    X.scales   fp16  [groups, rows]
    X.g_idx    int32 [columns]                    the group of each column

with the first code of a word in its lowest bits. 1 is subtracted from whole words, as AutoGPTQ and GPTQModel do, so a
zero point of 0 borrows from its neighbour, and readers that add 1 to whole words restore both. Source: checkpoint/
gptq_tensor.py, which reads this layout, and GPTQModel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.weight_file import BLOCK_BYTES, Block, Columns
from h1export.checkpoint.packed_format import WORD, part_name
from h1export.checkpoint.store import WeightStore
from h1export.quantize.precision import Precision
from h1export.quantize.source import QuantizedWeights
from h1export.targets.hf_folder.floats import exact_dtype, float_blocks
from h1export.targets.hf_folder.shards import Stored, TensorSpec
from h1export.targets.hf_folder.words import packed


def float_tensor(store: WeightStore, name: str, dtype: str = "") -> Stored:
    """Return a tensor in ``dtype``, or as the checkpoint stores it, exactly."""
    dtype = dtype or exact_dtype(store, name)
    spec = TensorSpec(name, dtype, store.shape(name))
    return Stored((spec,), partial(float_blocks, store, name, dtype))


def packed_tensors(store: WeightStore, integers: QuantizedWeights, name: str) -> Iterator[Stored]:
    """Yield the four tensors of a packed weight."""
    precision = integers.precisions[name]
    rows, columns = store.shape(name)
    groups = columns // precision.columns_per_group(columns)
    shapes = {
        "qweight": ("I32", (columns * precision.bits // WORD, rows)),
        "qzeros": ("I32", (groups, rows * precision.bits // WORD)),
        "scales": ("F16", (groups, rows)),
    }
    specs = tuple(TensorSpec(part_name(name, part), *found) for part, found in shapes.items())
    yield Stored(specs, partial(_blocks, store, integers, name))
    spec = TensorSpec(part_name(name, "g_idx"), "I32", (columns,))
    yield Stored((spec,), lambda: [partial(_groups, store, name, precision)])


def _blocks(store: WeightStore, integers: QuantizedWeights, name: str) -> Iterator[Block]:
    each = WORD // integers.precisions[name].bits  # so that a block ends where a word of qzeros ends
    for start, stop in store.row_ranges([name], BLOCK_BYTES, each):
        yield partial(_block, store, integers, name, start=start, stop=stop)


def _block(
    store: WeightStore, integers: QuantizedWeights, name: str, *, start: int, stop: int
) -> tuple[Columns, Columns, Columns]:
    bits = integers.precisions[name].bits
    found = integers.rows(name, start, stop)
    codes = found.codes
    if store.order_name(name):
        codes = codes[:, np.argsort(store.packed[name].order)]
    zeros = np.zeros(found.scales.shape, np.int8) if found.zeros is None else found.zeros
    ones = np.uint32((2**WORD - 1) // (2**bits - 1))  # the value 1 in each code of a word
    zero_words = packed(zeros.T, bits) - ones
    return (
        Columns(packed(codes, bits).T, start * WORD // 8),
        Columns(zero_words, start * bits // 8),
        Columns(found.scales.T, start * found.scales.itemsize),
    )


def _groups(store: WeightStore, name: str, precision: Precision) -> tuple[npt.NDArray[Any]]:
    """Return the group of each column, int32 [columns]."""
    columns = store.shape(name)[1]
    groups = (np.arange(columns) // precision.columns_per_group(columns)).astype(np.int32)
    if store.order_name(name):
        groups = groups[np.argsort(store.packed[name].order)]
    return (groups,)
