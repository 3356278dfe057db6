"""Coordinate descent: codes that GPTQ has chosen move, one column after the other, where that lowers the output error.

GPTQ rounds a column once, for the columns that follow it. A later look at each column, with all others as they are,
finds codes that are better together. The aim is GPTQ's own, ||(code x scale - weight) x||^2 summed over inputs x, and
no move raises it.

Source: Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 2  # over all columns; two take five sixths of what four do
LAZY_COLUMNS = 64  # columns whose moves reach all others together, as one matrix product


def descended(weight: Tensor, codes: Tensor, scales: Tensor, *, moments: Tensor, lowest: int, highest: int) -> Tensor:
    """Returns int8 codes [rows, columns], from ``lowest`` to ``highest``, with no larger error than ``codes``.

    Args:
        weight: float32 [rows, columns], what is rounded.
        codes: int8 [rows, columns], where the descent begins.
        scales: float32 [rows, groups] of any sign, which stay.
        moments: float32 [columns, columns], the sum of x x^T over inputs x; its diagonal is positive.
        lowest: the least code.
        highest: the largest code.
    """
    columns = codes.shape[1]
    width = columns // scales.shape[1]
    by_column = scales.T.repeat_interleave(width, 0)
    found = codes.T.float().contiguous()  # [columns, rows], as everything below
    gradient = moments @ (found * by_column - weight.T)
    for _ in range(SWEEPS):
        for start in range(0, columns, LAZY_COLUMNS):
            block = slice(start, min(start + LAZY_COLUMNS, columns))
            own = moments[block, block]
            moves = _move_columns(
                found[block], gradient[block].clone(), by_column[block], moments=own, limits=(lowest, highest)
            )
            gradient.addmm_(moments[:, block], moves)
    return found.T.to(torch.int8).contiguous()


def _move_columns(
    codes: Tensor, gradient: Tensor, scales: Tensor, *, moments: Tensor, limits: tuple[int, int]
) -> Tensor:
    """Move the codes of some columns, and return by how much the weights that they stand for have changed, [n, rows].

    ``codes``, ``gradient`` and ``scales`` are [n, rows] and ``moments`` [n, n], of these columns alone. Codes and
    gradient are changed.
    """
    moves = torch.empty_like(gradient)
    steps = scales.masked_fill(scales == 0, 1.0) * moments.diagonal()[:, None]
    for i in range(len(codes)):
        nearest = torch.round(codes[i] - gradient[i] / steps[i]).clamp_(*limits)
        moves[i] = (nearest - codes[i]) * scales[i]
        codes[i] = nearest
        gradient[i + 1 :].addr_(moments[i, i + 1 :], moves[i])
    return moves
