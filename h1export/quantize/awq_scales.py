"""Scaling: factors between a product and what makes its input, which leave the model as it is and ease the rounding of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.progress import Progress

SCALING = "scaling.safetensors"  # in an artifact that was built with one
COLUMNS = "columns:"
ROWS = "rows:"


@dataclass(frozen=True)
class AwqScales:
    """Factors by checkpoint name.

    Attributes:
        columns: float32 [columns], which a weight's columns are multiplied by.
        rows: float32 [rows], which the rows of what makes that weight's input are divided by.
    """

    columns: Mapping[str, Array]
    rows: Mapping[str, Array]

    @classmethod
    def load(cls, folder: Path) -> AwqScales:
        """That of an artifact; an empty one where it has none.

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
        """The inverse of load."""
        named = {COLUMNS + name: factors for name, factors in self.columns.items()}
        save_file(named | {ROWS + name: factors for name, factors in self.rows.items()}, folder / SCALING)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of those that it changes."""
        return frozenset((*self.columns, *self.rows))

    def applied(self, name: str, block: Array, start: int) -> Array:
        """``block``, rows from ``start`` on of a checkpoint tensor, as the scaled model has it."""
        if name in self.columns:
            block = block * self.columns[name]
        if name in self.rows:
            block = block / self.rows[name][start : start + len(block)].reshape(-1, *[1] * (block.ndim - 1))
        return block

    def undone(self, name: str, weight: Array) -> Array:
        """The inverse of ``applied``, for a whole weight [rows, columns]."""
        ones = np.ones(1, np.float32)
        found: Array = weight * self.rows.get(name, ones)[:, None] / self.columns.get(name, ones)
        return found


class ScaledStore(WeightStore):
    """The tensors of ``store`` as ``scaling`` makes them."""

    def __init__(self, store: WeightStore, scaling: AwqScales, progress: Progress) -> None:
        super().__init__({entry.name: entry for entry in store.entries}, progress, store.gptq_format)
        self.packed = store.packed
        self._scaling = scaling

    def rows(self, name: str, start: int, stop: int) -> Array:
        """As the parent does, scaled."""
        return self._scaling.applied(name, super().rows(name, start, stop), start)
