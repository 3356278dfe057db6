"""GPTQ into a GridFormat: as in gptq.py, with the steps and offsets that the format has.

Codes are chosen for searched scales. Then the blocks' scales and minimums are fitted to the codes by least squares,
with the integers of the groups as they are, and again after codes have moved for them (descent.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from h1export.model.falcon_h1.states import Array
from h1export.quantize.grid import BlockScales, GridFormat, PackedRows, in_fp16
from h1export.quantize.methods.descent import descended
from h1export.quantize.methods.gptq import (
    MAX_SCALE_CHANGE,
    OLD_SCALE_WEIGHT,
    Inverse,
    column_by_column,
    feed_back,
)
from h1export.quantize.methods.grid_search import searched

SEARCH_BYTES = 2 << 20  # float32 bytes of the rows whose scales are searched at a time


def solve_own_rows(weight: Array, format_: GridFormat, inverse: Inverse, *, name: str) -> PackedRows:
    """Return ``weight`` [rows, columns] packed; rows do not influence each other.

    Raises:
        H1ExportError: a value that is not finite, or too large for the scales; ``name`` names the tensor.
    """
    wanted = torch.from_numpy(weight).to(inverse.upper.device)
    if inverse.correction is not None:
        wanted = wanted + wanted @ inverse.correction
    step = max(1, SEARCH_BYTES // (4 * weight.shape[1]))
    blocks = (wanted[start : start + step] for start in range(0, len(wanted), step))
    parts = [searched(block, inverse.importance, format_, name=name) for block in blocks]
    scales = BlockScales(*(torch.cat(column) for column in zip(*map(_fields, parts), strict=True)))
    codes = round_on_grid(wanted, scales, format_, inverse=inverse)
    scales = fitted(wanted, codes, scales, inverse=inverse)
    offsets = scales.offsets.repeat_interleave(format_.width, 1)
    codes = descended(
        wanted + offsets, codes, scales.steps, moments=inverse.moments, lowest=format_.lowest, highest=format_.highest
    )
    scales = fitted(wanted, codes, scales, inverse=inverse)
    on_cpu = BlockScales(*(field.cpu() for field in _fields(scales)))
    return format_.pack(on_cpu, codes.cpu().numpy())


def _fields(scales: BlockScales) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scales.scale, scales.units, scales.minimum, scales.minimum_units


def round_on_grid(weight: Tensor, scales: BlockScales, format_: GridFormat, *, inverse: Inverse) -> Tensor:
    """Return int8 codes [rows, columns] for ``scales`` by GPTQ."""
    rows, columns = weight.shape
    steps = scales.steps.T.contiguous()  # [groups, rows]
    divisors = steps.masked_fill(steps == 0, 1.0)
    offsets = scales.offsets.T.contiguous()
    codes = torch.empty((columns, rows), dtype=torch.int8, device=weight.device)

    def nearest(column: int, wanted: Tensor) -> Tensor:
        group = column // format_.width
        code = torch.round((wanted + offsets[group]) / divisors[group]).clamp_(format_.lowest, format_.highest)
        codes[column] = code.to(torch.int8)
        return code * steps[group] - offsets[group]

    feed_back(weight, inverse, partial(column_by_column, inverse=inverse, nearest=nearest))
    return codes.T.contiguous()


def fitted(weight: Tensor, codes: Tensor, scales: BlockScales, *, inverse: Inverse) -> BlockScales:
    """Return the scales and minimums of blocks that leave the least error in the outputs for these codes.

    It is ``fitted_scales`` of gptq.py with a coefficient for the scale of each block, and one for each minimum.
    """
    blocks = scales.scale.shape[1]
    bases = [codes.float() * _spread(scales.units, codes.shape[1])]
    before = [scales.scale]
    if bool((scales.minimum != 0).any()):
        bases.append(-_spread(scales.minimum_units, codes.shape[1]))
        before.append(scales.minimum)
    found = _least_squares(weight, bases, torch.cat(before, 1), blocks=blocks, inverse=inverse)
    minimum = found[:, blocks:] if len(bases) > 1 else scales.minimum
    return BlockScales(found[:, :blocks], scales.units, minimum, scales.minimum_units)


def _least_squares(weight: Tensor, bases: list[Tensor], before: Tensor, *, blocks: int, inverse: Inverse) -> Tensor:
    """Return the factors [rows, bases x blocks] of parts of ``bases`` [rows, columns] whose sum is nearest to it.

    A part is a block of columns of one basis. ``before`` are the factors so far.
    """
    rows, columns = weight.shape
    width = columns // blocks
    count = blocks * len(bases)
    normal = torch.empty((rows, count, count), dtype=torch.float64, device=weight.device)
    for place in range(count):
        basis, block = divmod(place, blocks)
        part = slice(block * width, (block + 1) * width)
        moved = bases[basis][:, part] @ inverse.moments[part]
        sums = [(other * moved).reshape(rows, blocks, width).sum(2) for other in bases]
        normal[:, place] = torch.cat(sums, 1).double()
    moved = weight @ inverse.moments
    wanted = torch.cat([(basis * moved).reshape(rows, blocks, width).sum(2) for basis in bases], 1).double()
    damping = OLD_SCALE_WEIGHT * normal.diagonal(dim1=1, dim2=2) + torch.finfo(torch.float32).tiny
    old = before.double()
    wanted += damping * old
    normal.diagonal(dim1=1, dim2=2).add_(damping)
    found = torch.linalg.solve(normal, wanted)
    ratio = found / old.masked_fill(old == 0, 1.0)
    accepted = (ratio > 1 / MAX_SCALE_CHANGE) & (ratio < MAX_SCALE_CHANGE) & (old != 0)
    return in_fp16(torch.where(accepted, found, old).float())


def _spread(of_groups: Tensor, columns: int) -> Tensor:
    return of_groups.repeat_interleave(columns // of_groups.shape[1], dim=1)
