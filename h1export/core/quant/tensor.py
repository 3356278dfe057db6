"""QuantizedTensor: the integers, scales and multiplier of one weight, the same on every target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from h1export.core.state import Array

MIN_SCALE = float(np.finfo(np.float16).smallest_normal)
MAX_SCALE = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class QuantizedTensor:
    """weight[n, k] = codes[n, k] * scales[n, k // columns_per_scale] * multiplier[n].

    Attributes:
        codes: int8 [rows, columns]; in [-7, 7] for int4, [-127, 127] for int8.
        scales: float16 [rows, groups], positive and normal; of the unfolded tensor.
        multiplier: float32 [rows]; carries µP, never part of the scales.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float16]
    multiplier: Array

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        if self.scales.shape[0] != rows or columns % self.scales.shape[1] or self.multiplier.shape != (rows,):
            raise ValueError(f"codes {self.codes.shape}, scales {self.scales.shape}, multiplier {self.multiplier.shape} do not fit")
        if self.scales.size and not (self.scales.min() >= MIN_SCALE and np.isfinite(self.scales).all()):
            raise ValueError("scales must be positive, normal and finite")

    def times(self, multiplier: Array) -> QuantizedTensor:
        """The same integers with every row's multiplier times that of ``multiplier`` [rows]."""
        return replace(self, multiplier=self.multiplier * multiplier)

    def unfolded(self) -> Array:
        """codes * scales, float32 [rows, columns]: the checkpoint's tensor as stored."""
        groups = self.scales.shape[1]
        scaled = self.codes.reshape(len(self.codes), groups, -1) * self.scales.astype(np.float32)[..., None]
        return scaled.reshape(self.codes.shape)
