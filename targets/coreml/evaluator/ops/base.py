"""What an op is to the evaluator: a function whose signature is its schema.

A parameter annotated int, float, bool, str or Ints takes a constant or a computed scalar or vector, an ``Arrays`` one a tuple of tensors,
any other a tensor. fp16 tensors arrive as float32 arrays; a result is rounded to the declared type afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array

Ints = tuple[int, ...]
Arrays = tuple[Array, ...]
Result = Array | list[Array] | tuple[Array, ...]
REQUIRED = inspect.Parameter.empty


class OpError(Exception):
    """What is wrong with an op's inputs; the evaluator adds which op of which function it is."""


def _integers(array: Array) -> Ints:
    if array.dtype.kind not in "iub":
        raise OpError(f"takes {array.dtype} where integers belong")
    return tuple(int(item) for item in array.ravel())


def _scalar(kind: type, kinds: str) -> Callable[[Array], Any]:
    def convert(array: Array) -> Any:
        if array.size != 1 or array.dtype.kind not in kinds:
            raise OpError(f"takes {array.dtype} of shape {array.shape} where one {kind.__name__} belongs")
        return kind(array.item())

    return convert


CONVERTERS: Mapping[object, Callable[[Array], Any]] = {
    Ints: _integers,
    int: _scalar(int, "iu"),
    float: _scalar(float, "fiu"),
    bool: _scalar(bool, "b"),
    str: _scalar(str, "O"),
}


@dataclass(frozen=True)
class Parameter:
    """An input of an op: ``convert`` makes of an array what the function takes (None: the array itself)."""

    convert: Callable[[Array], Any] | None
    many: bool
    default: Any

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


@dataclass(frozen=True)
class Op:
    """``moves``: every value of the result is one of an input's, or a constant: nothing to round, nothing new to overflow."""

    function: Callable[..., Result]
    moves: bool

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The schema, read off the signature."""
        hints = get_type_hints(self.function)
        found = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            hint = hints[name]
            choices = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            kind = next((kind for kind in choices if kind in CONVERTERS or kind == Arrays), None)
            found[name] = Parameter(CONVERTERS.get(kind), kind == Arrays, parameter.default)
        return found


Table = Mapping[str, Op]


def computes(function: Callable[..., Result]) -> Op:
    """An op whose results are new values."""
    return Op(function, moves=False)


def moves(function: Callable[..., Result]) -> Op:
    """An op that only moves, selects or repeats values."""
    return Op(function, moves=True)


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis; raises OpError outside the rank."""
    if not -rank <= axis < rank:
        raise OpError(f"has axis {axis} of a tensor of rank {rank}")
    return axis % rank


def axes_of(axes: Ints | None, rank: int) -> Ints:
    """Non-negative axes; None: all of them."""
    return tuple(range(rank)) if axes is None else tuple(axis_of(axis, rank) for axis in axes)


def check_indices(indices: Array, size: int, axis: int) -> None:
    """Raises OpError for an index outside ``[0, size)``: undefined on a device, negative ones included (iOS 17 on)."""
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        wrong = indices[(indices < 0) | (indices >= size)].flat[0]
        raise OpError(
            f"has index {int(wrong)} of axis {axis}, which has {size} elements; what a device does then is undefined"
        )


def floats(x: Array) -> Array:
    """``x``; raises OpError for integers where the specification takes floats only."""
    if x.dtype.kind != "f":
        raise OpError(f"takes {x.dtype}, where the specification has floats")
    return x


def broadcastable(vector: Array, rank: int, axis: int) -> Array:
    """A vector as a tensor of ``rank`` that broadcasts along all axes but ``axis``."""
    shape = [1] * rank
    shape[axis] = vector.size
    return np.reshape(vector, shape)
