"""Scale search: rounding with the scale that leaves the least squared error of its block, instead of the one of its largest weight.

A smaller scale clips a block's few largest weights and rounds all the others more finely.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array
from h1export.quantize.methods.rtn import block_scales, nearest_codes
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MIN_SCALE, QuantizedTensor

# of the scale that clips nothing; the best one of a normal block of 32 at 4 bits lies between 0.8 and 1
SHARES = tuple(1 - step / 40 for step in range(17))


def search_rows(weight: Array, precision: Precision, multiplier: Array, name: str = "weight") -> QuantizedTensor:
    """``quantize_rows`` with a search: of the scales that are SHARES of the block's own, the one with the least squared error.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, precision.columns_per_group(columns))
    scales = searched_scales(blocks, precision, np.ones(blocks.shape[1:], np.float32), name=name)
    return QuantizedTensor(nearest_codes(blocks, scales, precision).reshape(rows, columns), scales, multiplier)


def searched_scales(blocks: Array, precision: Precision, importance: Array, *, name: str) -> npt.NDArray[np.float16]:
    """float16 [rows, groups] for ``blocks`` [rows, groups, columns], whose squared errors count ``importance`` [groups, columns] times.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    plain = block_scales(blocks, precision, name)
    best = plain
    least = np.full(plain.shape, np.inf, np.float32)
    for share in SHARES:
        scales = np.maximum(plain.astype(np.float32) * np.float32(share), MIN_SCALE).astype(np.float16)
        step = scales.astype(np.float32)[..., None]
        error = np.clip(np.rint(blocks / step), -precision.top, precision.top) * step - blocks
        loss = np.einsum("rgc,rgc,gc->rg", error, error, importance)
        best = np.where(loss < least, scales, best)
        least = np.minimum(loss, least)
    return best
