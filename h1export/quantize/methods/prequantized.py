"""Ready: the integers of a checkpoint that is quantised already, as runtimes take them, value by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from h1export.checkpoint.gptq_tensor import PackedMatrix
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.quantize.scheme import GROUP_SIZES
from h1export.quantize.source import QuantizedWeights


@dataclass(frozen=True)
class Prequantized:
    """The packed tensors of ``store``; the others come from ``rest``.

    Columns are in the order of ``PackedMatrix.order``, so that those of a group are neighbours, and a group is cut into blocks that
    runtimes have.
    """

    store: WeightStore
    rest: QuantizedWeights
    precisions: Mapping[str, Precision]

    @classmethod
    def of(cls, store: WeightStore, rest: QuantizedWeights) -> Prequantized:
        """Raises H1ExportError for groups that runtimes have no blocks for."""
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


def precision_of(matrix: PackedMatrix) -> Precision:
    """The largest blocks that the groups of ``matrix`` can be cut into; for int8, a scale per row where there is one group.

    Raises:
        H1ExportError: groups that no block divides.
    """
    sizes = np.unique(matrix.group_of, return_counts=True)[1]
    layout = matrix.gptq_format
    if layout.bits == 8 and len(sizes) == 1:
        return Precision(8, 0, not layout.sym)
    for block in reversed(GROUP_SIZES):
        if not (sizes % block).any():
            return Precision(layout.bits, block, not layout.sym)
    what = f"has groups of {', '.join(map(str, sorted(set(sizes.tolist()))))} columns, which no block of {GROUP_SIZES} columns divides"
    raise H1ExportError(
        f'tensor "{matrix.name}"',
        what,
        f"quantise it in groups of a multiple of {GROUP_SIZES[0]}, or give the unquantised checkpoint",
    )


def need_symmetric(integers: QuantizedWeights, runtime: str) -> None:
    """For a runtime that has no zero points. Raises H1ExportError where ``integers`` have some."""
    for name, precision in integers.precisions.items():
        if precision.zeros:
            what = f"has zero points of its own, and {runtime} takes symmetric integers only"
            raise H1ExportError(
                f'tensor "{name}"',
                what,
                "use --target ort or coreml, or give a checkpoint with sym true, or the unquantised one",
            )
