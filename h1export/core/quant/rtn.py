"""Round to nearest: the plain way to integers, symmetric, one scale per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from h1export.core.quant.scheme import Precision
from h1export.core.quant.tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor
from h1export.core.state import Array
from h1export.core.weights.expr import WeightExpr, WeightPart
from h1export.core.weights.store import WeightStore
from h1export.errors import H1ExportError

QuantizedBlock = Callable[[], list[QuantizedTensor]]


def quantize_rows(weight: Array, precision: Precision, multiplier: Array, name: str = "weight") -> QuantizedTensor:
    """Integers of ``weight`` [rows, columns]; rows do not influence each other, so any block of rows will do.

    The scale is absmax / (2^(bits-1) - 1), rounded to a positive normal fp16 before the codes are chosen.

    Raises:
        H1ExportError: a value that is not finite, or too large for an fp16 scale; ``name`` names the tensor.
    """
    top = (1 << (precision.bits - 1)) - 1
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, precision.columns_per_scale(columns))
    absmax = np.abs(blocks).max(axis=2)
    if not np.isfinite(absmax).all():
        raise H1ExportError(f'tensor "{name}"', "holds values that are not finite", "the checkpoint is damaged, download it again")
    if absmax.max(initial=0.0) > top * MAX_SCALE:
        raise H1ExportError(f'tensor "{name}"', f"holds {absmax.max():g}, too large for fp16 scales", "use --quant none")
    scales = np.clip(absmax / top, MIN_SCALE, MAX_SCALE).astype(np.float16)
    quotient = blocks / scales.astype(np.float32)[..., None]
    codes = np.clip(np.rint(quotient, out=quotient), -top, top, out=quotient).astype(np.int8)
    return QuantizedTensor(codes.reshape(rows, columns), scales, multiplier)


def quantized_blocks(
    expr: WeightExpr, store: WeightStore, precision: Precision, max_bytes: int, multiple: int = 1
) -> Iterator[QuantizedBlock]:
    """The integers of an expression by row blocks from the top; in each, the parts that lie side by side.

    A block is read and computed when it is called, on any thread; it holds at most ``max_bytes`` of float32, and a multiple of
    ``multiple`` rows. Every part is quantised on its own, and its multiplier stays beside its integers.
    """
    for strip in expr.strips:
        if changed := [part.tensor for part in strip if part.functions]:
            raise ValueError(f"{changed[0]}: only plain tensors are quantised")
        for start, stop in store.row_ranges([part.tensor for part in strip], max_bytes, multiple):
            yield partial(_quantize, strip, store, precision, start, stop)


def _quantize(strip: tuple[WeightPart, ...], store: WeightStore, precision: Precision, start: int, stop: int) -> list[QuantizedTensor]:
    return [quantize_rows(store.rows(part.tensor, start, stop), precision, part.factors(store)[start:stop], part.tensor) for part in strip]
