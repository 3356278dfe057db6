"""Round to nearest: symmetric integers, one scale per group, each weight rounded on its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor


def quantize_rows(weight: Array, precision: Precision, row_scale: Array, *, name: str = "weight") -> QuantizedTensor:
    """Returns the integers of ``weight`` [rows, columns], whose rows are to be scaled by ``row_scale`` [rows].

    Rows do not influence each other, so that any block of rows can be quantised on its own. A group's scale is absmax /
    (2^(bits-1) - 1), rounded to a positive normal fp16 before the codes are chosen.

    Raises:
        H1ExportError: a value that is not finite, or too large for an fp16 scale; ``name`` names the tensor.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, precision.columns_per_group(columns))
    scales = unclipped_scales(groups, precision, name)
    return QuantizedTensor(nearest_codes(groups, scales, precision).reshape(rows, columns), scales, row_scale)


def unclipped_scales(groups: Array, precision: Precision, name: str) -> npt.NDArray[np.float16]:
    """Returns the scales [rows, groups] of ``groups`` [rows, groups, group size] that clip no weight.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    return scales_of_largest(np.abs(groups).max(axis=2), precision, name)


def scales_of_largest(absmax: Array, precision: Precision, name: str) -> npt.NDArray[np.float16]:
    """Returns the scales [rows, groups] of groups whose largest magnitudes are ``absmax`` [rows, groups].

    Raises:
        H1ExportError: as quantize_rows does.
    """
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


def nearest_codes(groups: Array, scales: npt.NDArray[np.float16], precision: Precision) -> npt.NDArray[np.int8]:
    """Returns the nearest codes for ``groups`` [rows, groups, group size], in the same shape."""
    quotient = groups / scales.astype(np.float32)[..., None]
    return np.clip(np.rint(quotient, out=quotient), -precision.top, precision.top, out=quotient).astype(np.int8)
