"""Second moments of a projection's inputs, from which GPTQ derives what an error of a weight does to its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from h1export.artifact.weight_file import in_order
from h1export.quantize.device import CPU_DEVICE, ComputeDevice

InputPair = tuple[Tensor, Tensor]  # a float and a quantised input, [positions, columns] each
POSITIONS = 2048  # of which a product in float32 sums at most; sums of products are float64
ROW_BLOCKS = 4  # of a matrix of moments, which threads compute on their own


@dataclass(frozen=True)
class Moments:
    """Sums over positions of a projection's quantised inputs x and float inputs t: float64 [columns, columns].

    Attributes:
        own: the sum of x x^T.
        drift: the sum of (t - x) x^T.
    """

    own: Tensor
    drift: Tensor

    @classmethod
    def of(cls, pairs: Sequence[InputPair], jobs: int = 1, *, device: ComputeDevice = CPU_DEVICE) -> Moments:
        """Returns the sums over the positions of ``pairs``, at least one, computed by ``jobs`` threads.

        Of ``own``, which is symmetric, the upper half is computed. ``drift`` is a correction, whose products are in
        bf16 where the device says so. No digit depends on ``jobs``.
        """
        columns = pairs[0][1].shape[1]
        lots = _lots(pairs)
        starts = [columns * block // ROW_BLOCKS for block in range(ROW_BLOCKS + 1)]
        rows = [slice(start, stop) for start, stop in pairwise(starts) if stop > start]
        own = (partial(_own_rows, lots, row) for row in rows)
        drift = (partial(_drift_rows, lots, row, halves=device.halves) for row in rows)
        found = list(in_order((*own, *drift), jobs))
        upper = torch.zeros(columns, columns, dtype=torch.float64, device=found[0].device)
        for row, block in zip(rows, found, strict=False):
            upper[row, row.start :] = block
        return cls(upper.triu() + upper.triu(1).T, torch.cat(found[len(rows) :]))

    def mixed(self, other: Moments, share: float) -> Moments:
        """Returns these moments plus ``share`` of ``other``, after both are scaled to a mean diagonal of one."""
        size = float(self.own.diagonal().mean()) or 1.0
        other_size = float(other.own.diagonal().mean()) or 1.0
        return Moments(
            own=self.own / size + share / other_size * other.own,
            drift=self.drift / size + share / other_size * other.drift,
        )


def weighted(pair: InputPair, weights: Tensor) -> InputPair:
    """Returns a pair whose moments have each position multiplied by its weight in ``weights`` [positions]."""
    roots = weights.sqrt()[:, None]
    return pair[0] * roots, pair[1] * roots


def _lots(pairs: Sequence[InputPair]) -> list[list[InputPair]]:
    """Returns ``pairs`` in lots of about POSITIONS positions."""
    lots: list[list[InputPair]] = []
    room = 0
    for pair in pairs:
        if room <= 0:
            lots.append([])
            room = POSITIONS
        lots[-1].append(pair)
        room -= len(pair[1])
    return lots


def _own_rows(lots: Sequence[Sequence[InputPair]], rows: slice) -> Tensor:
    """Returns some rows of ``own``, float64 [rows, columns from the first of the rows]."""
    columns = lots[0][0][1].shape[1] - rows.start
    like = lots[0][0][1]
    sums = torch.zeros(rows.stop - rows.start, columns, dtype=torch.float64, device=like.device)
    for lot in lots:
        product = torch.zeros(sums.shape, device=like.device)
        for _, found in lot:
            product.addmm_(found[:, rows].T, found[:, rows.start :])
        sums += product
    return sums


def _drift_rows(lots: Sequence[Sequence[InputPair]], rows: slice, *, halves: bool) -> Tensor:
    """Returns some rows of ``drift``, float64 [rows, columns]."""
    like = lots[0][0][1]
    sums = torch.zeros(rows.stop - rows.start, like.shape[1], dtype=torch.float64, device=like.device)
    for lot in lots:
        product = torch.zeros(sums.shape, device=like.device)
        for right, found in lot:
            moved = right[:, rows] - found[:, rows]
            if halves:
                product += moved.bfloat16().T @ found.bfloat16()
            else:
                product.addmm_(moved.T, found)
        sums += product
    return sums
