"""StoredIntegers: integers in a scratch file, for a method such as GPTQ that cannot compute rows on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.journal import Extent
from h1export.artifact.weight_file import WeightFile
from h1export.model.falcon_h1.states import Array
from h1export.quantize.grid import OwnTensor, PackedRows
from h1export.quantize.methods.guard import ERRORS, Errors, GuardRecord, is_worse
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedWeights

ALIGN = 64  # bytes, of every extent in a scratch file


@dataclass(frozen=True)
class StoredMatrix:
    """Where the integers of a matrix of ``shape`` are stored: int8 codes, row after row, and float16 scales."""

    shape: tuple[int, int]
    codes: Extent
    scales: Extent

    @classmethod
    def reserved(cls, file: WeightFile, name: str, shape: tuple[int, int], *, groups: int) -> StoredMatrix:
        """Reserve space in ``file`` for a matrix whose rows have ``groups`` scales each."""
        rows, columns = shape
        codes = file.reserve(f"{name}.codes", rows * columns, ALIGN)
        return cls(shape, codes, file.reserve(f"{name}.scales", 2 * rows * groups, ALIGN))


@dataclass(frozen=True)
class StoredBlocks:
    """Where a tensor in a target's own format is stored: packed rows, [rows, bytes of a row]."""

    own: OwnTensor
    shape: tuple[int, int]
    packed: Extent


@dataclass(frozen=True)
class StoredIntegers:
    """QuantizedWeights that reads some tensors from files.

    Attributes:
        folder: the folder of the files.
        matrices: where each tensor is stored.
        rest: gives the integers of all other tensors, and the precisions of all tensors.
        blocks: where tensors are stored that a target has in a format of its own.
        errors: where the errors are by which the guard has judged a tensor.
        held: the number of sequences on which it has.
    """

    folder: Path
    matrices: Mapping[str, StoredMatrix]
    rest: QuantizedWeights
    blocks: Mapping[str, StoredBlocks] = field(default_factory=dict)
    errors: Mapping[str, Extent] = field(default_factory=dict)
    held: int = 0

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

    def packed_rows(self, tensor: str, start: int, stop: int) -> PackedRows | None:
        """Returns rows [start, stop) of a tensor in its own format; see HasPackedRows."""
        stored = self.blocks.get(tensor)
        if stored is None:
            return None
        found: PackedRows = self._mapped(stored.packed, np.uint8, stored.shape)[start:stop].copy()
        return found

    def unfolded(self, tensor: str) -> Array | None:
        """Returns a whole tensor, dequantised and without µP; None where it is not stored here."""
        stored = self.blocks.get(tensor) or self.matrices.get(tensor)
        return None if stored is None else self.unfolded_rows(tensor, 0, stored.shape[0])

    def unfolded_rows(self, tensor: str, start: int, stop: int) -> Array:
        """Returns rows [start, stop) of a tensor, dequantised and without µP."""
        stored = self.blocks.get(tensor)
        if stored is None:
            return self.rows(tensor, start, stop).unfolded()
        return stored.own.of_rows(slice(start, stop)).unfolded(
            self._mapped(stored.packed, np.uint8, stored.shape)[start:stop]
        )

    def errors_of(self, name: str) -> Errors:
        """Returns the errors that the guard has found for ``name``."""
        return self._mapped(self.errors[name], np.float64, (ERRORS,)).copy()

    @property
    def guard(self) -> GuardRecord:
        """What the guard has found, once all is written."""
        errors = {name: self.errors_of(name) for name in self.errors}
        return GuardRecord(self.held, {name: found for name, found in errors.items() if is_worse(found)})

    def _mapped(self, extent: Extent, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return np.asarray(np.memmap(self.folder / extent.file, dtype, "r", extent.offset, shape))
