"""StoredIntegers: integers in a scratch file, for a method such as GPTQ that cannot compute rows on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.journal import Extent
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedWeights


@dataclass(frozen=True)
class StoredMatrix:
    """Where the integers of a matrix of ``shape`` are stored: int8 codes, row after row, and float16 scales."""

    shape: tuple[int, int]
    codes: Extent
    scales: Extent


@dataclass(frozen=True)
class StoredIntegers:
    """QuantizedWeights that reads some tensors from files.

    Attributes:
        folder: the folder of the files.
        matrices: where each tensor is stored.
        rest: gives the integers of all other tensors, and the precisions of all tensors.
    """

    folder: Path
    matrices: Mapping[str, StoredMatrix]
    rest: QuantizedWeights

    @property
    def precisions(self) -> Mapping[str, Precision]:
        return self.rest.precisions

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        """Returns the integers of rows [start, stop) of ``tensor``."""
        stored = self.matrices.get(tensor)
        if stored is None:
            return self.rest.rows(tensor, start, stop)
        rows, columns = stored.shape
        groups = columns // self.precisions[tensor].columns_per_group(columns)
        return QuantizedTensor(
            self._mapped(stored.codes, np.int8, (rows, columns))[start:stop].copy(),
            self._mapped(stored.scales, np.float16, (rows, groups))[start:stop].copy(),
            np.ones(min(stop, rows) - start, np.float32),
        )

    def _mapped(self, extent: Extent, dtype: type[np.generic], shape: tuple[int, int]) -> npt.NDArray[Any]:
        return np.asarray(np.memmap(self.folder / extent.file, dtype, "r", extent.offset, shape))
