"""Integers: the one place where a target takes precisions and integers from, so that all targets hold the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr, WeightPart
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor

QuantizedBlock = Callable[[], list[QuantizedTensor]]
Rounding = Callable[
    [Array, Precision, Array, str], QuantizedTensor
]  # weight [rows, columns], precision, multiplier [rows], name


class QuantizedWeights(Protocol):
    """What each checkpoint tensor is stored in.

    Attributes:
        precisions: of the tensors that are stored in integers; all others stay float32.
    """

    @property
    def precisions(self) -> Mapping[str, Precision]: ...

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        """The integers of rows [start, stop) of one of these tensors, with a multiplier of 1. Called on any thread."""
        ...


@dataclass(frozen=True)
class Rounded:
    """Integers that ``rounding`` computes from the checkpoint's rows when they are asked for: rows do not influence each other."""

    store: WeightStore
    precisions: Mapping[str, Precision]
    rounding: Rounding

    def rows(self, tensor: str, start: int, stop: int) -> QuantizedTensor:
        weight = self.store.rows(tensor, start, stop)
        return self.rounding(weight, self.precisions[tensor], np.ones(len(weight), np.float32), tensor)


def quantized_blocks(
    expr: WeightExpr, store: WeightStore, integers: QuantizedWeights, *, max_bytes: int, multiple: int = 1
) -> Iterator[QuantizedBlock]:
    """The integers of an expression by row blocks from the top; in each, the parts that lie side by side.

    A block is read and computed when it is called, on any thread; it stands for at most ``max_bytes`` of float32, and a multiple of
    ``multiple`` rows. Every part has its own integers, and its multiplier stays beside them.
    """
    for strip in expr.strips:
        if changed := [part.tensor for part in strip if part.functions]:
            raise ValueError(f"{changed[0]}: only plain tensors are quantised")
        if apart := [part.tensor for part in strip if part.sorted != bool(store.order_name(part.tensor))]:
            raise ValueError(f"{apart[0]}: its integers have their columns in another order than the graph")
        for start, stop in store.row_ranges([part.tensor for part in strip], max_bytes, multiple):
            yield partial(_block, strip, store, integers, start, stop)


def _block(
    strip: tuple[WeightPart, ...], store: WeightStore, integers: QuantizedWeights, start: int, stop: int
) -> list[QuantizedTensor]:
    return [integers.rows(part.tensor, start, stop).times(part.factors(store)[start:stop]) for part in strip]
