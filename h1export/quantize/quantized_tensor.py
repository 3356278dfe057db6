"""QuantizedTensor: the integers, group scales and row scales of one weight, the same on every target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array

MIN_SCALE = float(np.finfo(np.float16).smallest_normal)
MAX_SCALE = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix in integers.

    weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] * row_scale[n], with g = k // group_size.

    Attributes:
        codes: int8 [rows, columns], in [-7, 7] for int4 and [-127, 127] for int8. Codes of a prequantized checkpoint
            can be -8 and -128.
        scales: float16 [rows, groups], positive; they do not contain µP.
        row_scale: float32 [rows]; carries µP, which is never part of the scales.
        zeros: int8 [rows, groups], in the range of the codes; None: all are 0.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    row_scale: Array
    zeros: npt.NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.scales.shape[0] != rows or columns % self.scales.shape[1] or self.row_scale.shape != (rows,):
            raise ValueError(
                f"codes {self.codes.shape}, scales {self.scales.shape}, row scales {self.row_scale.shape} do not fit"
            )
        if self.scales.size and not (self.scales.min() > 0 and np.isfinite(self.scales).all()):
            raise ValueError("scales must be positive and finite")
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise ValueError(f"zeros {self.zeros.shape}, scales {self.scales.shape} do not fit")

    def times(self, factors: Array) -> QuantizedTensor:
        """Returns the tensor with its rows multiplied by ``factors``, float32 [rows]; the integers stay the same."""
        return replace(self, row_scale=self.row_scale * factors)

    def unfolded(self, order: npt.NDArray[np.integer[Any]] | None = None) -> Array:
        """Returns (codes - zeros) * scales, float32 [rows, columns]: the checkpoint's tensor, without the row scales.

        ``order``: column i of these integers is the tensor's column order[i].
        """
        groups = self.codes.reshape(len(self.codes), self.scales.shape[1], -1)
        if self.zeros is not None:
            groups = groups.astype(np.int16) - self.zeros[..., None]
        scaled = groups * self.scales.astype(np.float32)[..., None]
        weight: Array = scaled.reshape(self.codes.shape)
        return weight if order is None else weight[:, np.argsort(order)]
