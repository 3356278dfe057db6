"""GPTQ of one matrix: columns are rounded one after the other, and later columns make up for earlier errors.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022:
act-order, lazy blocks, and the inverse by Cholesky. Three things differ:

- Groups are static: a group's scale is chosen before any column is rounded, so that act-order may separate its columns.
- Afterwards the scales are fitted to the codes by least squares, the codes move for these scales (descent.py), and the
  scales are fitted again.
- What is rounded is not the checkpoint's weight. It is the weight that, on the inputs of the quantised model, gives
  outputs nearest to the checkpoint's on the float model's inputs (the aim of Li et al., "GPTAQ", 2025, here by least
  squares before the rounding).

It runs where the moments are. On a CPU a loop rounds the columns, and on a GPU one kernel a block of columns
(plugins/gptq_rounding); the scales of a whole weight are searched there at once. An H100 has half of float32's speed in
float64, so that inverses are float64 on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.plugins.gptq_rounding.launch import COLUMNS, round_columns
from h1export.quantize.methods.descent import descended
from h1export.quantize.methods.scale_search import searched_scales, searched_scales_on_gpu
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor

DAMPING = 0.01  # the share of the mean second moment that is added to the diagonal
OLD_SCALE_WEIGHT = 1e-4  # relative weight of the old scales in a fit
MAX_SCALE_CHANGE = 1.5  # largest factor by which a fit may change a scale
LAZY_COLUMNS = COLUMNS  # 128: columns whose corrections are applied to all later ones together, as one matrix product

Scales = npt.NDArray[np.float16]
RoundBlock = Callable[..., Tensor]  # the rounding of some columns, for ``feed_back``


@dataclass(frozen=True)
class Inverse:
    """The inverse of the second moments of a weight's inputs, and what else the rounding derives from them.

    Attributes:
        order: int64 [columns], the order in which columns are rounded: the largest second moment first.
        upper: float32 [columns, columns], the Cholesky factor U of the moments' inverse in that order, inverse = U^T U.
        importance: float32 [columns], the damped diagonal of the moments.
        moments: float32 [columns, columns], damped, in the columns' own order.
        correction: float32 [columns, columns]. On quantised inputs x, weight + weight @ correction gives nearly the
            outputs that the weight itself gives on the float inputs t. None where x and t are the same.
    """

    order: Tensor
    upper: Tensor
    importance: Tensor
    moments: Tensor
    correction: Tensor | None


def invert(moments: Tensor, name: str, drift: Tensor | None = None, *, damping: float = DAMPING) -> Inverse:
    """Returns the Inverse of ``moments``, float64 [columns, columns]: the sum of x x^T over inputs x, on any scale.

    ``drift``, float64 [columns, columns] on the same scale, is the sum of (t - x) x^T; t is the float input of the
    position whose quantised input is x. ``damping`` is the share of the mean second moment that is added to the
    diagonal: the larger it is, the less a weight may move away from itself for the sake of outputs.

    Raises:
        H1ExportError: moments that are not finite; ``name`` names the weight.
    """
    diagonal = moments.diagonal()
    if not torch.isfinite(moments).all():
        raise H1ExportError(
            f'inputs of "{name}"',
            "are not finite on the calibration text",
            "use --method rtn, and check the checkpoint",
        )
    added = damping * float(diagonal.mean()) or 1.0  # where all inputs are zero, weights are rounded to nearest
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = moments[order][:, order]
    damped.diagonal().add_(added)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    if not upper.is_cpu:
        upper = upper.contiguous()  # the kernel reads its rows
    importance = (diagonal + added).float()
    own = moments.float()
    own.diagonal().copy_(importance)
    correction = None if drift is None else (drift[:, order] @ inverse).float()[:, torch.argsort(order)].contiguous()
    return Inverse(order, upper.float(), importance, moments=own, correction=correction)


def solve_rows(weight: Array, precision: Precision, inverse: Inverse, *, name: str) -> QuantizedTensor:
    """Returns the integers of ``weight`` [rows, columns], with row scales of 1; rows do not influence each other.

    Searched scales come first, and GPTQ chooses codes for them. Then a fit chooses scales for the codes, codes move for
    the scales, and a second fit is the last.

    Raises:
        H1ExportError: as quantize_rows does.
    """
    rows, columns = weight.shape
    width = precision.columns_per_group(columns)
    wanted = torch.from_numpy(weight).to(inverse.upper.device)
    if inverse.correction is not None:
        wanted = wanted + wanted @ inverse.correction
    groups, importance = wanted.reshape(rows, -1, width), inverse.importance.reshape(-1, width)
    if wanted.is_cpu:
        scales = searched_scales(groups.numpy(), precision, importance.numpy(), name=name)
    else:
        scales = searched_scales_on_gpu(groups, precision, importance, name=name)
    codes = round_rows(wanted, scales, precision, inverse=inverse)
    scales = fitted_scales(wanted, codes, scales, inverse=inverse)
    steps = torch.from_numpy(scales.astype(np.float32)).to(wanted.device)
    codes = descended(wanted, codes, steps, moments=inverse.moments, lowest=-precision.top, highest=precision.top)
    scales = fitted_scales(wanted, codes, scales, inverse=inverse)
    return QuantizedTensor(codes.cpu().numpy(), scales, np.ones(rows, np.float32))


def fitted_scales(weight: Tensor, codes: Tensor, scales: Scales, *, inverse: Inverse) -> Scales:
    """Returns the scales [rows, groups] that leave the least error in the outputs for these codes.

    They minimise ||(w - sum over groups g of s_g codes_g) x||^2 over s, summed over inputs x, for every row w by
    itself. The term OLD_SCALE_WEIGHT keeps ``scales`` where codes or inputs do not determine new ones. A scale that
    would change by more than the factor MAX_SCALE_CHANGE stays as it is.
    """
    rows, groups = scales.shape
    q = codes.float()
    before = torch.from_numpy(scales.astype(np.float64)).to(q.device)
    width = q.shape[1] // groups
    products = torch.empty((rows, groups, groups), device=q.device)
    for group in range(groups):  # its products with itself and with later groups: those with earlier ones are the same
        start = group * width
        columns = slice(start, start + width)
        later = q[:, start:] * (q[:, columns] @ inverse.moments[columns, start:])
        block = later.reshape(rows, groups - group, width).sum(2)
        products[:, group, group:] = block
        products[:, group:, group] = block
    normal = products.double()
    wanted = (q * (weight @ inverse.moments)).reshape(rows, groups, width).sum(2).double()
    damping = OLD_SCALE_WEIGHT * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    normal.diagonal(dim1=1, dim2=2).add_(damping)
    fitted = torch.linalg.solve(normal, wanted + damping * before)
    accepted = (fitted > before / MAX_SCALE_CHANGE) & (fitted < before * MAX_SCALE_CHANGE)
    chosen = torch.where(accepted, fitted, before).cpu().numpy()
    found: Scales = np.clip(chosen, MIN_SCALE, MAX_SCALE).astype(np.float16)
    return found


def round_rows(weight: Tensor, scales: Scales, precision: Precision, *, inverse: Inverse) -> Tensor:
    """Returns int8 codes [rows, columns] for ``scales`` [rows, groups] by GPTQ."""
    rows, columns = weight.shape
    by_column = torch.from_numpy(scales.astype(np.float32).T.copy()).to(weight.device)  # [groups, rows]
    codes = torch.empty((columns, rows), dtype=torch.int8, device=weight.device)
    width = columns // len(by_column)
    function = _round_columns if weight.is_cpu else _round_columns_on_gpu
    feed_back(
        weight,
        inverse,
        partial(function, inverse=inverse, scales=by_column, width=width, top=precision.top, codes=codes),
    )
    return codes.T.contiguous()


def feed_back(weight: Tensor, inverse: Inverse, round_block: RoundBlock) -> None:
    """Round the columns of ``weight`` [rows, columns] in the order of ``inverse``, and move later ones by the errors.

    ``round_block(weights, start=...)`` rounds the next columns, whose weights it gets as [n, rows] and may change, and
    returns their errors [n, rows], as ``column_by_column`` does; ``start`` is the place of the first in the order.
    """
    rest = weight.T[inverse.order].contiguous()  # [columns, rows], in the order of rounding
    columns = len(rest)
    for start in range(0, columns, LAZY_COLUMNS):
        stop = min(start + LAZY_COLUMNS, columns)
        errors = round_block(rest[start:stop], start=start)
        rest[stop:] -= inverse.upper[start:stop, stop:].T @ errors


def column_by_column(rest: Tensor, inverse: Inverse, start: int, *, nearest: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Round some columns one after the other, and return their errors [n, rows] for later columns.

    ``rest`` [n, rows], n at most LAZY_COLUMNS, has the weights of columns ``inverse.order[start : start + n]`` and is
    changed. ``nearest(column, weights [rows])`` chooses a column's codes, and returns what they stand for.
    """
    errors = torch.empty_like(rest)
    for i in range(len(rest)):
        row = inverse.upper[start + i, start : start + len(rest)]
        errors[i] = (rest[i] - nearest(int(inverse.order[start + i]), rest[i])) / row[i]
        rest[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
    return errors


def _round_columns(
    rest: Tensor, inverse: Inverse, start: int, *, scales: Tensor, width: int, top: int, codes: Tensor
) -> Tensor:
    """Round columns into ``codes``, int8 [columns, rows], and return their errors [n, rows] for later columns.

    ``rest`` [n, rows], n at most LAZY_COLUMNS, has the weights of columns ``inverse.order[start : start + n]`` and is
    changed. ``scales`` are [groups, rows], ``width`` is the columns of a group, and ``top`` the largest code.
    """

    def nearest(column: int, wanted: Tensor) -> Tensor:
        scale = scales[column // width]
        code = torch.round(wanted / scale).clamp_(-top, top)
        codes[column] = code.to(torch.int8)
        return code * scale

    return column_by_column(rest, inverse, start, nearest=nearest)


def _round_columns_on_gpu(
    rest: Tensor, inverse: Inverse, start: int, *, scales: Tensor, width: int, top: int, codes: Tensor
) -> Tensor:
    """Does what ``_round_columns`` does, by one kernel; ``rest`` is not changed."""
    errors = torch.empty_like(rest)
    round_columns(
        rest,
        inverse.order.int(),
        inverse.upper.contiguous(),
        start=start,
        scales=scales,
        width=width,
        top=top,
        codes=codes,
        errors=errors,
    )
    return errors
