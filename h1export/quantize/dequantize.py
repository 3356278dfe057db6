"""The float32 weights that a runtime multiplies by: an artifact's integers, dequantised, with µP folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.model.falcon_h1.states import Array
from h1export.quantize.source import QuantizedBlock, QuantizedWeights, quantized_blocks


def dequantized_blocks(
    expr: WeightExpr, store: WeightStore, integers: QuantizedWeights | None, *, max_bytes: int
) -> Iterator[Callable[[], Array]]:
    """Yield the rows of ``expr``, µP included, in blocks from the top.

    Rows are dequantised from ``integers``, or read from the checkpoint where that is None. A block is float32 [rows,
    columns] of at most ``max_bytes``. It is computed when it is called, on any thread.
    """
    if integers is None:
        yield from expr.lazy_blocks(store, max_bytes)
    else:
        yield from (partial(_folded, block) for block in quantized_blocks(expr, store, integers, max_bytes=max_bytes))


def _folded(block: QuantizedBlock) -> Array:
    return np.concatenate([tensor.unfolded() * tensor.row_scale[:, None] for tensor in block()], axis=1)
