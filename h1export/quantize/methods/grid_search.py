"""Search for scales of a GridFormat: those that leave the least weighted squared error in every group of columns.

A few steps are tried for each group. For the codes of each, the step, and the offset where there is one, come from
weighted least squares. Then the block's scale and the integers of its groups are rounded to what the format has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.quantize.grid import BlockScales, GridFormat, PackedRows, in_fp16

# Shares of the step that clips no weight.
SHARES = (1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
REFINEMENTS = 2  # choices of codes for the best step and offset so far, after the shares
TINY = float(torch.finfo(torch.float32).tiny)


def round_own_rows(weight: Array, format_: GridFormat, *, name: str) -> PackedRows:
    """Return ``weight`` [rows, columns] packed in the nearest codes of searched scales; every column counts alike.

    Raises:
        H1ExportError: a value that is not finite, or too large for the scales; ``name`` names the tensor.
    """
    wanted = torch.from_numpy(weight)
    scales = searched(wanted, torch.ones(weight.shape[1]), format_, name=name)
    return format_.pack(scales, format_.nearest(wanted, scales).numpy())


def searched(weight: Tensor, importance: Tensor, format_: GridFormat, *, name: str) -> BlockScales:
    """Return scales for ``weight`` [rows, columns] with the least squared error, weighted by ``importance`` [columns].

    Raises:
        H1ExportError: as ``round_own_rows`` does.
    """
    if not bool(torch.isfinite(weight).all()):
        what = "holds values that are not finite"
        raise H1ExportError(f'tensor "{name}"', what, "the checkpoint is damaged, download it again")
    groups = weight.reshape(len(weight), -1, format_.width)
    columns = importance.reshape(-1, format_.width)
    steps, offsets = (_with_offsets if format_.offsets else _without_offsets)(groups, columns, format_)
    try:
        scale, units = _in_units(steps, format_)
        minimum, minimum_units = _in_units(offsets, format_)
    except OverflowError as error:
        raise H1ExportError(f'tensor "{name}"', str(error), "use --quant none") from None
    return BlockScales(scale, units, minimum, minimum_units)


def _with_offsets(groups: Tensor, importance: Tensor, format_: GridFormat) -> tuple[Tensor, Tensor]:
    """Return steps and offsets [rows, groups], neither negative, of ``groups`` [rows, groups, width]."""
    lowest = groups.amin(2).clamp_max(0.0)
    plain = (groups.amax(2) - lowest).clamp_min(0.0) / format_.highest
    total = importance.sum(1)
    sum_w = (groups * importance).sum(2)
    sum_ww = (groups.square() * importance).sum(2)
    best_steps, best_offsets = plain, -lowest
    least = torch.full_like(plain, torch.inf)
    for share in (*SHARES, *[None] * REFINEMENTS):
        step, start = (best_steps, best_offsets) if share is None else (plain * share, -lowest)
        codes = torch.round((groups + start[..., None]) / step.clamp_min(TINY)[..., None])
        codes = codes.clamp_(format_.lowest, format_.highest)
        weighted = codes * importance
        sum_q, sum_qq, sum_qw = weighted.sum(2), (weighted * codes).sum(2), (weighted * groups).sum(2)
        determinant = total * sum_qq - sum_q.square()
        free = determinant > 1e-6 * total * sum_qq
        divisor = determinant.masked_fill(~free, 1.0)
        offset = ((sum_q * sum_qw - sum_qq * sum_w) / divisor).masked_fill(~free, 0.0).clamp_min(0.0)
        fitted = (sum_qw + offset * sum_q) / sum_qq.clamp_min(TINY)
        loss = fitted.square() * sum_qq + offset.square() * total + sum_ww
        loss += 2 * (offset * sum_w - fitted * sum_qw - fitted * offset * sum_q)
        better = (loss < least) & (fitted > 0)
        best_steps = torch.where(better, fitted, best_steps)
        best_offsets = torch.where(better, offset, best_offsets)
        least = torch.where(better, loss, least)
    return best_steps, best_offsets


def _without_offsets(groups: Tensor, importance: Tensor, format_: GridFormat) -> tuple[Tensor, Tensor]:
    """Return steps of any sign and zeros, as ``_with_offsets`` does.

    There is one code more below zero than above, and the sign of a step says on which side of the weights it is.
    """
    largest = groups.abs().amax(2) / -format_.lowest
    best_steps = largest
    gain = torch.full_like(largest, -torch.inf)
    for share in SHARES:
        for sign in (1.0, -1.0):
            step = (largest * share).clamp_min(TINY)[..., None] * sign
            codes = torch.round(groups / step).clamp_(format_.lowest, format_.highest)
            weighted = codes * importance
            sum_qq, sum_qw = (weighted * codes).sum(2), (weighted * groups).sum(2)
            fitted = sum_qw / sum_qq.clamp_min(TINY)
            better = fitted * sum_qw > gain  # the error is what the weights have less this
            best_steps = torch.where(better, fitted, best_steps)
            gain = torch.where(better, fitted * sum_qw, gain)
    return best_steps, torch.zeros_like(best_steps)


def _in_units(of_groups: Tensor, format_: GridFormat) -> tuple[Tensor, Tensor]:
    """Return the blocks' scales and the groups' integers whose products are nearest to ``of_groups`` [rows, groups]."""
    if format_.most == 1:
        return in_fp16(of_groups), torch.ones_like(of_groups)
    blocks = of_groups.reshape(len(of_groups), -1, format_.groups)
    scale = in_fp16(blocks.abs().amax(2) / format_.most)
    divisor = scale.masked_fill(scale == 0, 1.0)[..., None]
    units = torch.round(blocks / divisor).clamp_(-format_.most, format_.most)
    return scale, units.reshape(of_groups.shape)
