"""Solved: integers that a method has left in a file, because no row of it could be computed alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from h1export.artifact.journal import Extent
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedWeights


@dataclass(frozen=True)
class Place:
    """Where a tensor of ``shape`` lies: int8 codes, row after row, and its float16 scales."""

    shape: tuple[int, int]
    codes: Extent
    scales: Extent


@dataclass(frozen=True)
class StoredIntegers:
    """The tensors of ``places``, which lie in files of ``folder``; the others come from ``rest``, as do all precisions."""

    folder: Path
    places: Mapping[str, Place]
    rest: QuantizedWeights

    @property
    def precisions(self) -> Mapping[str, Precision]:
        return self.rest.precisions

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        place = self.places.get(tensor)
        if place is None:
            return self.rest.rows(tensor, start, stop)
        rows, columns = place.shape
        scales = (rows, columns // self.precisions[tensor].columns_per_group(columns))
        return QuantizedTensor(
            np.array(
                np.memmap(self.folder / place.codes.file, np.int8, "r", place.codes.offset, place.shape)[start:stop]
            ),
            np.array(
                np.memmap(self.folder / place.scales.file, np.float16, "r", place.scales.offset, scales)[start:stop]
            ),
            np.ones(min(stop, rows) - start, np.float32),
        )
