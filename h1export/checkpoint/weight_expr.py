"""WeightExpr: the expression of checkpoint tensors that gives one initializer of an exported graph.

Graph passes change expressions and never bytes. Folding a µP multiplier into a projection, for example, changes its
expression; the bytes are computed once, in blocks of rows, while the artifact is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

Function = Literal["neg", "exp"]

# exp is computed in float64, so that a folded -exp(A_log) is rounded once.
FUNCTIONS: Mapping[Function, Callable[[Array], Array]] = {
    "neg": lambda x: -x,
    "exp": lambda x: np.exp(x.astype(np.float64)).astype(np.float32),
}


@dataclass(frozen=True)
class Multiplier:
    """The float32 factor of each row of a weight, run-length coded.

    A multiplier carries µP beside the weights and never inside fp16 scales.

    Attributes:
        runs: (number of rows, factor) from the top; a single run of 0 rows applies to all rows.
    """

    runs: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def __post_init__(self) -> None:
        if not self.runs or (len(self.runs) > 1 and any(rows == 0 for rows, _ in self.runs)):
            raise ValueError("a multiplier without runs, or with a run of no rows")

    @classmethod
    def scalar(cls, factor: float) -> Multiplier:
        """Return the multiplier that has one factor for all rows."""
        return cls(((0, factor),))

    @property
    def is_scalar(self) -> bool:
        """Whether one factor applies to all rows."""
        return self.runs[0][0] == 0

    @property
    def factor(self) -> float:
        """The factor of all rows.

        Raises:
            ValueError: rows have factors of their own.
        """
        if not self.is_scalar:
            raise ValueError(f"{len(self.runs)} runs of rows have no single factor")
        return self.runs[0][1]

    def times(self, other: Multiplier) -> Multiplier:
        """Return the product with ``other``, row by row.

        Raises:
            ValueError: both have runs of rows, of different lengths.
        """
        if self.is_scalar:
            return Multiplier(tuple((rows, factor * self.factor) for rows, factor in other.runs))
        if other.is_scalar:
            return other.times(self)
        if [rows for rows, _ in self.runs] != [rows for rows, _ in other.runs]:
            raise ValueError("two row multipliers with different parts")
        return Multiplier(tuple((rows, a * b) for (rows, a), (_, b) in zip(self.runs, other.runs, strict=True)))

    def rows(self, count: int) -> Array:
        """Return the factor of each of ``count`` rows, float32 [count].

        Raises:
            ValueError: the runs have another number of rows.
        """
        if self.is_scalar:
            return np.full(count, self.factor, np.float32)
        expanded = np.concatenate([np.full(rows, factor, np.float32) for rows, factor in self.runs])
        if len(expanded) != count:
            raise ValueError(f"multiplier of {len(expanded)} rows on a tensor of {count}")
        return expanded


@dataclass(frozen=True)
class WeightPart:
    """One checkpoint tensor, transformed element by element.

    Attributes:
        tensor: name of the checkpoint tensor.
        functions: functions that are applied to it, in order.
        multiplier: the factor of each row, applied after the functions.
        sorted: whether the columns are put into the order of ``PackedMatrix.order``.
    """

    tensor: str
    functions: tuple[Function, ...] = ()
    multiplier: Multiplier = Multiplier()
    sorted: bool = False

    def apply(self, function: Function) -> WeightPart:
        """Return this part with ``function`` applied.

        Raises:
            ValueError: the part has a multiplier already, which functions must precede.
        """
        if self.multiplier != Multiplier():
            raise ValueError(f"{self.tensor}: a function after a multiplier has no place in a WeightPart")
        return replace(self, functions=(*self.functions, function))

    def times(self, multiplier: Multiplier) -> WeightPart:
        """Return this part with every row multiplied by ``multiplier``."""
        return replace(self, multiplier=self.multiplier.times(multiplier))

    def factors(self, store: WeightStore) -> Array:
        """Return the factor of each row of the tensor, float32 [rows]."""
        return self.multiplier.rows(store.shape(self.tensor)[0])

    def rows(self, store: WeightStore, start: int, stop: int) -> Array:
        """Compute rows [start, stop) in float32.

        Raises:
            H1ExportError: a value is NaN or infinite.
        """
        block = store.rows(self.tensor, start, stop)
        if self.sorted:
            block = block[:, store.packed[self.tensor].order]
        for function in self.functions:
            block = FUNCTIONS[function](block)
        if not np.isfinite(block).all():
            raise H1ExportError(
                f'tensor "{self.tensor}"', "holds values that are not finite", "download the checkpoint again"
            )
        if self.multiplier == Multiplier():
            return block
        return block * self.factors(store)[start:stop].reshape(-1, *[1] * (block.ndim - 1))


@dataclass(frozen=True)
class WeightExpr:
    """The concatenation of parts: one above the other along axis 0, or side by side along axis 1."""

    parts: tuple[WeightPart, ...]
    axis: Literal[0, 1] = 0

    @classmethod
    def of(cls, tensor: str) -> WeightExpr:
        """Return the expression that is the checkpoint tensor ``tensor`` itself."""
        return cls((WeightPart(tensor),))

    @classmethod
    def concatenated(cls, exprs: Sequence[WeightExpr], axis: Literal[0, 1]) -> WeightExpr:
        """Concatenate expressions that have one part each."""
        return cls(tuple(expr.only for expr in exprs), axis)

    @property
    def only(self) -> WeightPart:
        """The part of an expression that has exactly one.

        Raises:
            ValueError: there are several parts.
        """
        (part,) = self.parts
        return part

    @property
    def strips(self) -> tuple[tuple[WeightPart, ...], ...]:
        """The parts from the top, as strips of rows: the parts of one strip are side by side."""
        return (self.parts,) if self.axis else tuple((part,) for part in self.parts)

    def apply(self, function: Function) -> WeightExpr:
        """Return the expression with ``function`` applied to every part."""
        return replace(self, parts=tuple(part.apply(function) for part in self.parts))

    def times(self, multiplier: Multiplier) -> WeightExpr:
        """Return the expression with every row multiplied by ``multiplier``.

        Raises:
            ValueError: rows have factors of their own, and the expression has several parts.
        """
        if not multiplier.is_scalar and len(self.parts) != 1:
            raise ValueError("a row multiplier on a concatenation")
        return replace(self, parts=tuple(part.times(multiplier) for part in self.parts))

    def sort(self) -> WeightExpr:
        """Return the expression with the columns of every part in the order of ``PackedMatrix.order``."""
        return replace(self, parts=tuple(replace(part, sorted=True) for part in self.parts))

    def shape(self, tensor_shape: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """Return the initializer's shape; ``tensor_shape`` gives the shape of a checkpoint tensor."""
        shapes = [tensor_shape(part.tensor) for part in self.parts]
        size = sum(shape[self.axis] for shape in shapes)
        return (*shapes[0][: self.axis], size, *shapes[0][self.axis + 1 :])

    def lazy_blocks(self, store: WeightStore, max_bytes: int) -> Iterator[Callable[[], Array]]:
        """Yield functions that compute the initializer's next rows in float32, each at most ``max_bytes`` bytes.

        Rows are read and computed when a function is called, on any thread. A call raises H1ExportError for NaN and
        infinity.
        """
        for strip in self.strips:
            for start, stop in store.row_ranges([part.tensor for part in strip], max_bytes):
                yield partial(_rows, strip, store, start=start, stop=stop)

    def blocks(self, store: WeightStore, max_bytes: int) -> Iterator[Array]:
        """Yield the blocks of ``lazy_blocks``, computed one after the other."""
        return (block() for block in self.lazy_blocks(store, max_bytes))

    def dense(self, store: WeightStore) -> Array:
        """Compute the whole initializer in float32; memory holds all of it, so this is for small tensors."""
        return np.concatenate(list(self.blocks(store, 1 << 24)))


def _rows(strip: tuple[WeightPart, ...], store: WeightStore, *, start: int, stop: int) -> Array:
    blocks = [part.rows(store, start, stop) for part in strip]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
