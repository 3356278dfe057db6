"""Round to nearest: the plain way to integers, symmetric, one scale per block."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor


def quantize_rows(weight: Array, precision: Precision, multiplier: Array, name: str = "weight") -> QuantizedTensor:
    """Integers of ``weight`` [rows, columns]; rows do not influence each other, so any block of rows will do.

    The scale is absmax / (2^(bits-1) - 1), rounded to a positive normal fp16 before the codes are chosen.

    Raises:
        H1ExportError: a value that is not finite, or too large for an fp16 scale; ``name`` names the tensor.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, precision.columns_per_group(columns))
    scales = block_scales(blocks, precision, name)
    return QuantizedTensor(nearest_codes(blocks, scales, precision).reshape(rows, columns), scales, multiplier)


def block_scales(blocks: Array, precision: Precision, name: str) -> npt.NDArray[np.float16]:
    """The scales [rows, groups] of ``blocks`` [rows, groups, columns] that clip nothing. Raises H1ExportError as quantize_rows does."""
    absmax = np.abs(blocks).max(axis=2)
    if not np.isfinite(absmax).all():
        raise H1ExportError(
            f'tensor "{name}"', "holds values that are not finite", "the checkpoint is damaged, download it again"
        )
    if absmax.max(initial=0.0) > precision.top * MAX_SCALE:
        raise H1ExportError(
            f'tensor "{name}"', f"holds {absmax.max():g}, too large for fp16 scales", "use --quant none"
        )
    scales: npt.NDArray[np.float16] = np.clip(absmax / precision.top, MIN_SCALE, MAX_SCALE).astype(np.float16)
    return scales


def nearest_codes(blocks: Array, scales: npt.NDArray[np.float16], precision: Precision) -> npt.NDArray[np.int8]:
    """The nearest codes, in the shape of ``blocks`` [rows, groups, columns]."""
    quotient = blocks / scales.astype(np.float32)[..., None]
    return np.clip(np.rint(quotient, out=quotient), -precision.top, precision.top, out=quotient).astype(np.int8)
