"""Scale search: round with the scale that leaves the least squared error in its group.

A scale smaller than round-to-nearest's clips the few largest weights of a group and rounds all others more finely.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from h1export.model.falcon_h1.states import Array
from h1export.quantize.methods.rtn import nearest_codes, quantize_rows, scales_of_largest, unclipped_scales
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MIN_SCALE, QuantizedTensor

# Shares of the scale that clips nothing. The best one of 32 normally distributed weights at 4 bits is between 0.8 and
# 1.
SHARES = tuple(1 - step / 40 for step in range(17))


def search_rows(weight: Array, precision: Precision, row_scale: Array, *, name: str = "weight") -> QuantizedTensor:
    """Returns what ``quantize_rows`` does, with the best of SHARES times each group's scale.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, precision.columns_per_group(columns))
    scales = searched_scales(groups, precision, np.ones(groups.shape[1:], np.float32), name=name)
    return QuantizedTensor(nearest_codes(groups, scales, precision).reshape(rows, columns), scales, row_scale)


def plain_rows(weight: Array, precision: Precision, row_scale: Array, *, name: str = "weight") -> QuantizedTensor:
    """Returns what a method that looks at a text falls back to: ``search_rows`` for int4, ``quantize_rows`` for int8.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    return (search_rows if precision.bits == 4 else quantize_rows)(weight, precision, row_scale, name=name)


def searched_scales(groups: Array, precision: Precision, importance: Array, *, name: str) -> npt.NDArray[np.float16]:
    """Returns the scales [rows, groups] of ``groups`` [rows, groups, group size] with the least weighted squared error.

    ``importance`` [groups, group size] are the weights of the columns' squared errors.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    plain = unclipped_scales(groups, precision, name)
    best = plain
    least = np.full(plain.shape, np.inf, np.float32)
    for share in SHARES:
        scales = np.maximum(plain.astype(np.float32) * np.float32(share), MIN_SCALE).astype(np.float16)
        step = scales.astype(np.float32)[..., None]
        error = np.clip(np.rint(groups / step), -precision.top, precision.top) * step - groups
        loss = np.einsum("rgc,rgc,gc->rg", error, error, importance)
        best = np.where(loss < least, scales, best)
        least = np.minimum(loss, least)
    return best


def searched_scales_on_gpu(
    groups: Tensor, precision: Precision, importance: Tensor, *, name: str
) -> npt.NDArray[np.float16]:
    """Returns what ``searched_scales`` does, computed where ``groups`` are; sums may differ in their last bits.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    plain = torch.from_numpy(scales_of_largest(groups.abs().amax(2).cpu().numpy(), precision, name)).to(groups.device)
    best = plain
    least = torch.full(plain.shape, float("inf"), device=groups.device)
    for share in SHARES:
        scales = (plain.float() * share).clamp_min(MIN_SCALE).half()
        step = scales.float()[..., None]
        error = torch.round(groups / step).clamp_(-precision.top, precision.top) * step - groups
        loss = (error.square() * importance).sum(2)
        best = torch.where(loss < least, scales, best)
        least = torch.minimum(loss, least)
    found: npt.NDArray[np.float16] = best.cpu().numpy()
    return found
