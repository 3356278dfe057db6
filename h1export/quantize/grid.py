"""Grids: what the integers that one runtime alone has can stand for, so that methods choose them without their layout.

A weight is code x step - offset. A step is shared by a group of columns, and is a scale in fp16, shared by a block of
groups, times a small integer of the group; an offset likewise. ggml's types with blocks have this form, and the
integers of QuantizedTensor, which all targets share, have one scale in fp16 a group and no offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from h1export.model.falcon_h1.states import Array

PackedRows = npt.NDArray[np.uint8]  # [rows, bytes of a row]
MAX_FP16 = float(np.finfo(np.float16).max)
LEAST_FP16 = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class BlockScales:
    """The scales of some rows.

    Attributes:
        scale: float32 [rows, blocks], numbers of fp16 of any sign.
        units: float32 [rows, groups], integers: a group's step is this times its block's scale.
        minimum: float32 [rows, blocks], numbers of fp16; zeros where the format has no offsets.
        minimum_units: float32 [rows, groups], integers: a group's offset is this times its block's minimum.
    """

    scale: Tensor
    units: Tensor
    minimum: Tensor
    minimum_units: Tensor

    @property
    def steps(self) -> Tensor:
        """The step of every group, float32 [rows, groups]."""
        return _spread(self.scale, self.units.shape[1]) * self.units

    @property
    def offsets(self) -> Tensor:
        """The offset of every group, float32 [rows, groups]."""
        return _spread(self.minimum, self.units.shape[1]) * self.minimum_units

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights that ``codes`` [rows, columns] stand for, in float32."""
        groups = codes.float().reshape(*self.units.shape, -1)
        return (groups * self.steps[..., None] - self.offsets[..., None]).reshape(codes.shape)


@dataclass(frozen=True)
class GridFormat:
    """The integers of one runtime, and how it stores them.

    Attributes:
        name: its name, for messages and for what a build has left.
        width: columns of a group.
        groups: groups of a block.
        lowest: the least code.
        highest: the largest code.
        most: the largest integer of a group's step and offset; 1: the block's scale is the step.
        offsets: whether it has offsets, which are not negative; without them a step may be negative.
        nbytes: bytes of a block.
        pack: (scales, codes int8 [rows, columns]) -> the bytes of the rows.
        unpack: the bytes of rows -> what ``pack`` was given.
    """

    name: str
    width: int
    groups: int
    lowest: int
    highest: int
    most: int
    offsets: bool
    nbytes: int
    pack: Callable[[BlockScales, npt.NDArray[np.int8]], PackedRows]
    unpack: Callable[[PackedRows], tuple[BlockScales, npt.NDArray[np.int8]]]

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.width * self.groups

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of ``columns`` columns, which blocks divide."""
        return columns // self.columns * self.nbytes

    def values(self, packed: PackedRows) -> Array:
        """Return the weights that packed rows stand for, float32 [rows, columns]."""
        scales, codes = self.unpack(packed)
        found: Array = scales.values(torch.from_numpy(codes)).numpy()
        return found

    def nearest(self, weight: Tensor, scales: BlockScales) -> Tensor:
        """Return the nearest codes for ``weight`` [rows, columns], int8."""
        steps = scales.steps[..., None]
        groups = weight.reshape(*scales.units.shape, -1) + scales.offsets[..., None]
        codes = torch.round(groups / steps.masked_fill(steps == 0, 1.0)).clamp_(self.lowest, self.highest)
        return codes.to(torch.int8).reshape(weight.shape)


@dataclass(frozen=True)
class OwnTensor:
    """A tensor that a target stores in a format of its own.

    Attributes:
        format: the format.
        factors: float32 [rows]: what is stored is the checkpoint's weight with its rows multiplied by them.
    """

    format: GridFormat
    factors: Array

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of ``shape``."""
        return prod(shape[:-1]) * self.format.row_bytes(shape[-1])

    def of_rows(self, rows: slice | npt.NDArray[np.int64]) -> OwnTensor:
        """Return the same for some of the tensor's rows."""
        return replace(self, factors=self.factors[rows])

    def unfolded(self, packed: PackedRows) -> Array:
        """Return the weights of the whole tensor without the factors; a row whose factor is 0 is 0."""
        divisors: Array = np.where(self.factors == 0, 1, self.factors).astype(np.float32)
        found: Array = self.format.values(packed) / divisors[:, None]
        return found


def in_fp16(values: Tensor) -> Tensor:
    """Return ``values`` rounded to fp16, in float32; what is not 0 stays so.

    Raises:
        OverflowError: a value that fp16 cannot hold.
    """
    if not bool((values.abs() <= MAX_FP16).all()):
        raise OverflowError(f"scales up to {float(values.abs().max()):.3g} do not fit fp16")
    rounded = values.half().float()
    return torch.where((rounded == 0) & (values != 0), values.sign() * LEAST_FP16, rounded)


def _spread(of_blocks: Tensor, groups: int) -> Tensor:
    return of_blocks.repeat_interleave(groups // of_blocks.shape[1], dim=1)
