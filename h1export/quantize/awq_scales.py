"""AwqScales: factors that move between a projection's columns and what produces its input.

They leave the model's function as it is, and make the projection's weight easier to round (see methods/awq.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.progress import Progress
from h1export.quantize.methods.guard import GuardRecord

SCALING = "scaling.safetensors"  # the file in an artifact that was built with AWQ
COLUMNS = "columns:"
ROWS = "rows:"


@dataclass(frozen=True)
class AwqScales:
    """Factors by checkpoint name.

    Attributes:
        columns: float32 [columns] by which the columns of a projection's weight are multiplied.
        rows: float32 [rows] by which the rows of what produces that projection's input are divided.
        guard: what the guard has found; None for factors that were not searched here.
    """

    columns: Mapping[str, Array]
    rows: Mapping[str, Array]
    guard: GuardRecord | None = None

    @classmethod
    def load(cls, folder: Path) -> AwqScales:
        """Read the factors of the artifact in ``folder``; there are none where it has no such file.

        Raises:
            H1ExportError: a damaged file.
        """
        file = folder / SCALING
        if not file.is_file():
            return cls({}, {})
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise H1ExportError(file, f"cannot be read ({error})", "build the artifact again") from None
        columns, rows = (
            {name[len(kind) :]: found[name] for name in found if name.startswith(kind)} for kind in (COLUMNS, ROWS)
        )
        return cls(columns, rows)

    def save(self, folder: Path) -> None:
        """Write the file that ``load`` reads."""
        named = {COLUMNS + name: factors for name, factors in self.columns.items()}
        # not save_file, whose errors are none of the system's
        (folder / SCALING).write_bytes(save(named | {ROWS + name: factors for name, factors in self.rows.items()}))

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the tensors that the factors change."""
        return frozenset((*self.columns, *self.rows))

    def applied(self, name: str, block: Array, start: int) -> Array:
        """Returns ``block``, rows from ``start`` on of checkpoint tensor ``name``, as the scaled model has it."""
        if name in self.columns:
            block = block * self.columns[name]
        if name in self.rows:
            block = block / self.rows[name][start : start + len(block)].reshape(-1, *[1] * (block.ndim - 1))
        return block

    def undone(self, name: str, weight: Array) -> Array:
        """Returns a whole weight [rows, columns] of the scaled model as the checkpoint has it."""
        ones = np.ones(1, np.float32)
        found: Array = weight * self.rows.get(name, ones)[:, None] / self.columns.get(name, ones)
        return found


class ScaledStore(WeightStore):
    """The tensors of another store as the model scaled by some factors has them."""

    def __init__(self, store: WeightStore, factors: AwqScales, progress: Progress) -> None:
        entries = {entry.name: entry for entry in store.entries}
        super().__init__(entries, progress, store.packed_format, packed=store.packed, adapters=store.adapters)
        self._factors = factors

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Returns rows [start, stop) of a tensor in float32, scaled."""
        return self._factors.applied(name, super().rows(name, start, stop), start)
