"""Prequantized: the integers of a checkpoint that is quantised already, in group sizes that runtimes have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.checkpoint.packed_format import PackedMatrix
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.quantize.choices import GROUP_SIZES
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.source import QuantizedWeights


@dataclass(frozen=True)
class Prequantized:
    """QuantizedWeights that takes the packed tensors of a checkpoint as they are.

    Columns are in the order of ``PackedMatrix.order``, so that those of a group are neighbours. A group of the
    checkpoint is divided into groups of a size that runtimes have.

    Attributes:
        store: the checkpoint.
        rest: gives the integers of all other tensors.
        precisions: the precisions of all tensors that are stored in integers, those of ``rest`` included.
    """

    store: WeightStore
    rest: QuantizedWeights
    precisions: Mapping[str, Precision]

    @classmethod
    def of(cls, store: WeightStore, rest: QuantizedWeights) -> Prequantized:
        """Returns the integers of ``store``. Raises H1ExportError for groups that no size of GROUP_SIZES divides."""
        own = {name: precision_of(matrix) for name, matrix in store.packed.items()}
        return cls(store, rest, {**rest.precisions, **own})

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        matrix = self.store.packed.get(tensor)
        if matrix is None:
            return self.rest.rows(tensor, start, stop)
        self.store.advance(tensor, start, stop)
        order = matrix.order
        precision = self.precisions[tensor]
        columns = matrix.shape[1]
        groups = matrix.group_of[order[:: precision.columns_per_group(columns)]]
        zeros = matrix.zeros(start, stop)[:, groups]
        codes = matrix.codes(start, stop)[:, order]
        scales = matrix.scales(start, stop)[:, groups]
        return QuantizedTensor(codes, scales, np.ones(len(codes), np.float32), zeros=zeros if precision.zeros else None)


def precision_of(matrix: PackedMatrix[Any]) -> Precision:
    """Returns the precision of ``matrix``, with the largest group size that divides its groups.

    An int8 matrix with a single group has a scale per row.

    Raises:
        H1ExportError: groups that no size of GROUP_SIZES divides.
    """
    sizes = np.unique(matrix.group_of, return_counts=True)[1]
    packed_format = matrix.packed_format
    if packed_format.bits == 8 and len(sizes) == 1:
        return Precision(8, 0, not packed_format.sym)
    for group_size in reversed(GROUP_SIZES):
        if not (sizes % group_size).any():
            return Precision(packed_format.bits, group_size, not packed_format.sym)
    found = ", ".join(map(str, sorted(set(sizes.tolist()))))
    what = f"has groups of {found} columns, which no group size of {GROUP_SIZES} divides"
    raise H1ExportError(
        f'tensor "{matrix.name}"',
        what,
        f"quantise it in groups of a multiple of {GROUP_SIZES[0]}, or give the unquantised checkpoint",
    )


def need_symmetric(integers: QuantizedWeights, runtime: str, *, next_step: str) -> None:
    """Refuse zero points, for a runtime that has none.

    Raises:
        H1ExportError: ``integers`` have zero points; ``next_step`` is the advice to the user.
    """
    for name, precision in integers.precisions.items():
        if precision.zeros:
            what = f"has zero points of its own, and {runtime} takes symmetric integers only"
            raise H1ExportError(f'tensor "{name}"', what, next_step)
