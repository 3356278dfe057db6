"""QuantizedWeights: the one source of precisions and integers, so that all targets store the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr, WeightPart
from h1export.model.falcon_h1.states import Array
from h1export.quantize.grid import PackedRows
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor

QuantizedBlock = Callable[[], list[QuantizedTensor]]


class Rounding(Protocol):
    """A method that chooses the integers of each row on its own, such as ``quantize_rows``."""

    def __call__(self, weight: Array, precision: Precision, row_scale: Array, *, name: str) -> QuantizedTensor:
        """Returns the integers of ``weight`` [rows, columns].

        ``row_scale`` [rows] becomes that of the result; errors name the tensor by ``name``.
        """
        ...


class QuantizedWeights(Protocol):
    """The integers that checkpoint tensors are stored in.

    Attributes:
        precisions: checkpoint tensor -> its precision; a tensor that is missing here stays float32.
    """

    @property
    def precisions(self) -> Mapping[str, Precision]: ...

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        """Returns the integers of rows [start, stop) of one of these tensors, with row scales of 1.

        It may be called on any thread.
        """
        ...


@runtime_checkable
class HasPackedRows(Protocol):
    """QuantizedWeights that a method has solved, some tensors in a target's own format."""

    def packed_rows(self, tensor: str, start: int, stop: int) -> PackedRows | None:
        """Returns rows [start, stop) as the target stores them, µP included; None: the method has not solved it so.

        It may be called on any thread.
        """
        ...


@dataclass(frozen=True)
class Rounded:
    """QuantizedWeights that ``rounding`` computes from the checkpoint's rows when they are needed."""

    store: WeightStore
    precisions: Mapping[str, Precision]
    rounding: Rounding

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        weight = self.store.rows(tensor, start, stop)
        return self.rounding(weight, self.precisions[tensor], np.ones(len(weight), np.float32), name=tensor)


def quantized_blocks(
    expr: WeightExpr, store: WeightStore, integers: QuantizedWeights, *, max_bytes: int, multiple: int = 1
) -> Iterator[QuantizedBlock]:
    """Yield the integers of an expression in blocks of rows from the top; a block has all parts that are side by side.

    A block is read and computed when it is called, on any thread. It stands for at most ``max_bytes`` of float32 and
    for a multiple of ``multiple`` rows. Every part keeps its own integers, and its µP multiplier becomes their row
    scales.

    Raises:
        ValueError: an expression that has functions, or columns in another order than the integers.
    """
    for strip in expr.strips:
        if changed := [part.tensor for part in strip if part.functions]:
            raise ValueError(f"{changed[0]}: only plain tensors are quantised")
        if apart := [part.tensor for part in strip if part.sorted != bool(store.order_name(part.tensor))]:
            raise ValueError(f"{apart[0]}: its integers have their columns in another order than the graph")
        for start, stop in store.row_ranges([part.tensor for part in strip], max_bytes, multiple):
            yield partial(_block, strip, store, integers, start=start, stop=stop)


def _block(
    strip: tuple[WeightPart, ...], store: WeightStore, integers: QuantizedWeights, *, start: int, stop: int
) -> list[QuantizedTensor]:
    return [integers.rows(part.tensor, start, stop).times(part.factors(store)[start:stop]) for part in strip]
