"""The definition of an op: a function whose signature is the op's schema.

The parameters have the names of the MIL specification. The annotation of a parameter decides what it takes:

- int, float, bool, str, Ints: a scalar or vector, constant or computed, converted to that type;
- Arrays: a tuple of tensors;
- Array: a tensor.

fp16 tensors are passed as float32 arrays, and results are rounded to their declared types afterwards. A function
returns one array or a list of arrays, leaves its arguments unchanged, and raises OpError for inputs that the
specification excludes.
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
    """An error in an op's inputs; the evaluator adds the operation and the function to the message."""


def _integers(array: Array) -> Ints:
    if array.dtype.kind not in "iub":
        raise OpError(f"takes {array.dtype} instead of integers")
    return tuple(int(item) for item in array.ravel())


def _scalar(kind: type, kinds: str) -> Callable[[Array], Any]:
    def convert(array: Array) -> Any:
        if array.size != 1 or array.dtype.kind not in kinds:
            raise OpError(f"takes {array.dtype} of shape {array.shape} instead of one {kind.__name__}")
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
    """An input of an op.

    Attributes:
        convert: converts an array to the argument of the function; None passes the array itself.
        many: whether the argument is a tuple of tensors.
        default: the default of the function's parameter, or REQUIRED.
    """

    convert: Callable[[Array], Any] | None
    many: bool
    default: Any

    @property
    def required(self) -> bool:
        """Whether the input must be given."""
        return self.default is REQUIRED


@dataclass(frozen=True)
class Op:
    """An op.

    Attributes:
        function: computes the results.
        moves: whether every value of the result is a value of an input or a constant, so that none needs rounding and
            none can overflow.
    """

    function: Callable[..., Result]
    moves: bool

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The schema, from the signature of the function."""
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
    """Define an op whose results are new values."""
    return Op(function, moves=False)


def moves(function: Callable[..., Result]) -> Op:
    """Define an op that only moves, selects or repeats values."""
    return Op(function, moves=True)


def axis_of(axis: int, rank: int) -> int:
    """Return a non-negative axis; raise OpError if it is outside the rank."""
    if not -rank <= axis < rank:
        raise OpError(f"has axis {axis} of a tensor of rank {rank}")
    return axis % rank


def axes_of(axes: Ints | None, rank: int) -> Ints:
    """Return non-negative axes; None stands for all axes."""
    return tuple(range(rank)) if axes is None else tuple(axis_of(axis, rank) for axis in axes)


def check_indices(indices: Array, size: int, axis: int) -> None:
    """Raise OpError for an index outside ``[0, size)``; on devices its result is undefined since iOS 17."""
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        wrong = indices[(indices < 0) | (indices >= size)].flat[0]
        raise OpError(
            f"has index {int(wrong)} of axis {axis}, which has {size} elements; the result on a device is undefined"
        )


def require_floats(x: Array) -> Array:
    """Return ``x``; raise OpError unless it is a float tensor, as the specification requires."""
    if x.dtype.kind != "f":
        raise OpError(f"takes {x.dtype}, and the specification allows floats only")
    return x


def broadcastable(vector: Array, rank: int, axis: int) -> Array:
    """Reshape a vector to a tensor of ``rank`` that broadcasts along all axes but ``axis``."""
    shape = [1] * rank
    shape[axis] = vector.size
    return np.reshape(vector, shape)
