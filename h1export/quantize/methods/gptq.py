"""GPTQ: columns are rounded one after the other, and those still to come take up what rounding changed in the product.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022: act-order, lazy
blocks, and the inverse by Cholesky. Groups are static: a block's scale is chosen before any column is rounded, so that its columns
may be visited apart; afterwards scales are fitted to the codes by least squares. What is rounded is not the checkpoint's weight but the
one that comes nearest to its outputs from the inputs that the layers before, quantised already, leave (the aim of Li et al., "GPTAQ",
2025, here by least squares ahead of the rounding). On CPUs, by torch's linear algebra; this module is imported by name, because the
others do without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.quantize.methods.scale_search import searched_scales
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor

DAMPING = 0.01  # of the mean second moment, added to the diagonal
ROUNDS = 2  # more than two change nothing that a text would show
# weight of the old scales in a fit; factor by which a fit may change one
TRUST = 1e-4
WILD = 1.5
LAZY = 128  # columns whose corrections reach the later ones together, as one matrix product


Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Inverse:
    """What the second moments of a product's inputs say about rounding its weight.

    Attributes:
        order: int64 [columns], the order in which columns are rounded: the largest second moment first.
        upper: float32 [columns, columns], the Cholesky factor U of the moments' inverse in that order, inverse = U^T U.
        importance: float32 [columns], the damped diagonal of the moments.
        moments: float32 [columns, columns], damped, in the columns' own order.
        correction: float32 [columns, columns]: a weight plus its product with this gives nearly the outputs on x that the weight gives
            on the inputs that x is a quantised model's version of. None: x is what it should be.
    """

    order: Tensor
    upper: Tensor
    importance: Array
    moments: Tensor
    correction: Tensor | None


def invert(moments: Tensor, name: str, drift: Tensor | None = None) -> Inverse:
    """The Inverse of ``moments``, float64 [columns, columns]: the sum of x x^T over inputs x; its scale does not matter.

    ``drift``, float64 [columns, columns], on the same scale, is the sum of (t - x) x^T, where t is what x should be.

    Raises:
        H1ExportError: moments that are not finite; ``name`` names the product.
    """
    diagonal = moments.diagonal()
    if not torch.isfinite(moments).all():
        raise H1ExportError(
            f'inputs of "{name}"',
            "are not finite on the calibration text",
            "use --method rtn, and check the checkpoint",
        )
    damping = DAMPING * float(diagonal.mean()) or 1.0  # inputs that are all zero leave plain rounding
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = moments[order][:, order]
    damped.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    importance = (diagonal + damping).float()
    own = moments.float()
    own.diagonal().copy_(importance)
    correction = None if drift is None else (drift[:, order] @ inverse).float()[:, torch.argsort(order)].contiguous()
    return Inverse(order, upper.float(), importance.numpy(), moments=own, correction=correction)


def solve_rows(weight: Array, precision: Precision, inverse: Inverse, *, name: str) -> QuantizedTensor:
    """Integers of ``weight`` [rows, columns] with a multiplier of 1; rows do not influence each other.

    Codes for given scales by GPTQ and the best scales for given codes take turns, ROUNDS times, from searched scales on.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    rows, columns = weight.shape
    width = precision.columns_per_group(columns)
    if inverse.correction is not None:
        weight = weight + (torch.from_numpy(weight) @ inverse.correction).numpy()
    blocks = weight.reshape(rows, -1, width)
    scales = searched_scales(blocks, precision, inverse.importance.reshape(-1, width), name=name)
    codes = round_rows(weight, scales, precision, inverse=inverse)
    for _ in range(ROUNDS):
        scales = fitted_scales(weight, codes, scales, inverse=inverse)
        codes = round_rows(weight, scales, precision, inverse=inverse)
    return QuantizedTensor(codes, fitted_scales(weight, codes, scales, inverse=inverse), np.ones(rows, np.float32))


def fitted_scales(weight: Array, codes: Codes, scales: Scales, *, inverse: Inverse) -> Scales:
    """The scales [rows, groups] that leave the least error in the product's outputs for these codes; those they were where that is wild.

    Least squares, row by row: of s in ||(w - sum over groups g of s_g codes_g) x||^2, summed over inputs x, with a little weight on
    ``scales``, which decides where codes or inputs say nothing.
    """
    rows, groups = scales.shape
    q = torch.from_numpy(codes).float()
    before = torch.from_numpy(scales.astype(np.float64))
    width = q.shape[1] // groups
    products = torch.empty((rows, groups, groups))
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        products[:, group] = (q * (q[:, columns] @ inverse.moments[columns])).reshape(rows, groups, width).sum(2)
    normal = products.double()
    wanted = (q * (torch.from_numpy(weight) @ inverse.moments)).reshape(rows, groups, width).sum(2).double()
    trust = TRUST * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    normal.diagonal(dim1=1, dim2=2).add_(trust)
    fitted = torch.linalg.solve(normal, wanted + trust * before)
    tame = (fitted > before / WILD) & (fitted < before * WILD)
    found: Scales = np.clip(torch.where(tame, fitted, before).numpy(), MIN_SCALE, MAX_SCALE).astype(np.float16)
    return found


def round_rows(weight: Array, scales: Scales, precision: Precision, *, inverse: Inverse) -> Codes:
    """int8 codes [rows, columns] for ``scales`` [rows, groups] by GPTQ."""
    rows, columns = weight.shape
    by_column = torch.from_numpy(scales.astype(np.float32).T.copy())  # [groups, rows]
    codes = torch.empty((columns, rows), dtype=torch.int8)
    rest = torch.from_numpy(weight).T[inverse.order].contiguous()  # [columns, rows], in the order of rounding
    width = columns // len(by_column)
    for start in range(0, columns, LAZY):
        stop = min(start + LAZY, columns)
        errors = _round_columns(
            rest[start:stop], inverse, start, scales=by_column, width=width, top=precision.top, codes=codes
        )
        rest[stop:] -= inverse.upper[start:stop, stop:].T @ errors
    found: Codes = codes.T.contiguous().numpy()
    return found


def _round_columns(
    rest: Tensor, inverse: Inverse, start: int, *, scales: Tensor, width: int, top: int, codes: Tensor
) -> Tensor:
    """Round ``rest`` [LAZY columns, rows], which it changes, into ``codes``; the columns' errors, as later ones take them up."""
    errors = torch.empty_like(rest)
    for i in range(len(rest)):
        column = int(inverse.order[start + i])
        row = inverse.upper[start + i, start : start + len(rest)]
        scale = scales[column // width]
        code = torch.round(rest[i] / scale).clamp_(-top, top)
        codes[column] = code.to(torch.int8)
        errors[i] = (rest[i] - code * scale) / row[i]
        rest[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
    return errors
