"""The steps that a function is compiled to; they work on a flat list of values.

An fp16 value is held as a float32 array of values that fp16 can represent. A step that computes rounds its results to
them. Steps never change arrays in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.dtypes import FP16, Array, largest_magnitude, narrow, round_half, widen
from h1export.targets.coreml.evaluator.ops.base import Op, OpError
from h1export.targets.coreml.evaluator.program import TensorType

UNRUNNABLE = "this program is invalid on a device too, or uses a feature that the evaluator does not have"
FAILURES = (OpError, ValueError, TypeError, IndexError, ArithmeticError, RuntimeError, AttributeError, MemoryError)


@dataclass
class Frame:
    """The data of one run.

    Attributes:
        values: the value of each slot.
        states: the states by name, in their declared types.
        widened: the states as the steps use them, float32 if they are fp16.
    """

    values: list[Any]
    states: dict[str, Array]
    widened: dict[str, Array]


class Step(Protocol):
    """A function that reads and writes a frame; it raises H1ExportError if it fails."""

    def __call__(self, frame: Frame) -> None: ...


@dataclass
class Output:
    """An output of an operation.

    Attributes:
        slot: the slot that it is stored in.
        name: its name in the program.
        type: its declared type.
        op: the type of the operation.
        moves: whether the operation only moves values.
        maximum: the largest magnitude so far, before rounding; None if it is not fp16 or was never computed.
        half: whether it is fp16.
        shape: its declared shape; None if a dimension is known at run time only.
        array: the dtype of its array.
    """

    slot: int
    name: str
    type: TensorType
    op: str
    moves: bool
    maximum: float | None = None
    half: bool = field(init=False)
    shape: tuple[int, ...] | None = field(init=False)
    array: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.half = self.type.dtype is FP16
        self.array = np.dtype(np.float32) if self.half else self.type.dtype.array
        self.shape = None if None in self.type.shape else tuple(size or 0 for size in self.type.shape)

    def finalize(self, result: Array) -> Array:
        """Return ``result`` rounded to the declared type; raise OpError if it has another shape or kind of dtype."""
        if result.shape != self.shape and not self.type.accepts(result.shape):
            raise OpError(f"computes shape {list(result.shape)} for {self.name!r}, which is declared as {self.type}")
        if result.dtype != self.array:
            kinds = result.dtype.kind + self.array.kind
            if kinds != "ff" and not {*kinds} <= {"i", "u"}:
                raise OpError(f"computes {result.dtype} for {self.name!r}, which is declared as {self.type}")
            result = result.astype(self.array)
        if not self.half or self.moves:
            return result if isinstance(result, np.ndarray) else np.asarray(result)
        result = np.asarray(result)
        largest = largest_magnitude(result)
        if self.maximum is None or not largest <= self.maximum:  # a NaN stays
            self.maximum = largest if self.maximum is None or not math.isnan(self.maximum) else self.maximum
        return round_half(result)


@dataclass(frozen=True)
class Computed:
    """An argument of an op that another step computes.

    Attributes:
        name: the parameter of the op.
        slots: the slots of its values.
        convert: converts the array to the argument; None passes the array itself.
        many: whether the argument is a tuple of tensors.
    """

    name: str
    slots: tuple[int, ...]
    convert: Callable[[Array], Any] | None
    many: bool

    def value(self, values: Sequence[Any]) -> Any:
        """Return the argument that the op's function is called with."""
        if self.many:
            return tuple(values[slot] for slot in self.slots)
        array = values[self.slots[0]]
        return array if self.convert is None else self.convert(array)


@dataclass(frozen=True)
class OpStep:
    """Calls the function of an op and stores its rounded results."""

    op: Op
    fixed: dict[str, Any]
    computed: tuple[Computed, ...]
    outputs: tuple[Output, ...]
    where: str

    def __call__(self, frame: Frame) -> None:
        values = frame.values
        try:
            arguments = {argument.name: argument.value(values) for argument in self.computed}
            result = self.op.function(**self.fixed, **arguments)
            results = result if isinstance(result, (list, tuple)) else (result,)
            if len(results) != len(self.outputs):
                raise OpError(f"computes {len(results)} results where {len(self.outputs)} are declared")
            for output, array in zip(self.outputs, results, strict=True):
                values[output.slot] = output.finalize(array)
        except FAILURES as error:
            raise op_failure(self.where, error) from error


@dataclass(frozen=True)
class ReadState:
    """Stores the current value of a state in a slot."""

    state: str
    output: Output
    where: str

    def __call__(self, frame: Frame) -> None:
        if self.state not in frame.widened:
            frame.widened[self.state] = widen(frame.states[self.state])
        try:
            frame.values[self.output.slot] = self.output.finalize(frame.widened[self.state])
        except OpError as error:
            raise op_failure(self.where, error) from error


@dataclass(frozen=True)
class WriteState:
    """Replaces the array of a state by a new one, which is read-only so that ``Frame.widened`` stays equal to it."""

    state: str
    type: TensorType
    slot: int
    where: str

    def __call__(self, frame: Frame) -> None:
        data = frame.values[self.slot]
        if not self.type.accepts(data.shape):
            raise op_failure(
                self.where, OpError(f"writes shape {list(data.shape)} to state {self.state!r}, which is {self.type}")
            )
        frame.states[self.state] = written = narrow(data, self.type.dtype)
        written.flags.writeable = False
        frame.widened[self.state] = data


@dataclass(frozen=True)
class Body:
    """A compiled nested block: the slots of its inputs, its steps and the slots of its outputs."""

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def run(self, frame: Frame, arguments: Sequence[Array]) -> list[Array]:
        """Run the steps on ``arguments`` and return the outputs."""
        for slot, argument in zip(self.inputs, arguments, strict=True):
            frame.values[slot] = argument
        for step in self.steps:
            step(frame)
        return [frame.values[slot] for slot in self.outputs]


@dataclass(frozen=True)
class WhileLoop:
    """The op while_loop of the MIL specification.

    The first block decides whether to go on, and the second computes the next loop variables.
    """

    variables: tuple[int, ...]
    condition: Body
    body: Body
    outputs: tuple[Output, ...]
    where: str

    def __call__(self, frame: Frame) -> None:
        current = [frame.values[slot] for slot in self.variables]
        while single_bool(self.condition.run(frame, current)[0], self.where):
            current = self.body.run(frame, current)
        store_results(frame, self.outputs, current, where=self.where)


@dataclass(frozen=True)
class Branch:
    """The op cond of the MIL specification: it runs the first block if the predicate is true, else the second."""

    predicate: int
    blocks: tuple[Body, Body]
    outputs: tuple[Output, ...]
    where: str

    def __call__(self, frame: Frame) -> None:
        chosen = self.blocks[0 if single_bool(frame.values[self.predicate], self.where) else 1]
        store_results(frame, self.outputs, chosen.run(frame, ()), where=self.where)


def store_results(frame: Frame, outputs: Sequence[Output], results: Sequence[Array], *, where: str) -> None:
    """Store the results of a nested block as the outputs of its operation."""
    for output, array in zip(outputs, results, strict=True):
        try:
            frame.values[output.slot] = output.finalize(array)
        except OpError as error:
            raise op_failure(where, error) from error


def single_bool(array: Array, where: str) -> bool:
    """Return the value of a bool scalar; raise H1ExportError for any other array."""
    if array.dtype != np.bool_ or array.size != 1:
        raise op_failure(
            where, OpError(f"has a condition of {array.dtype} with shape {list(array.shape)} instead of one bool")
        )
    return bool(array.item())


def op_failure(where: str, error: Exception) -> H1ExportError:
    """Return the error to raise for an exception in the operation ``where``."""
    what = str(error) if isinstance(error, OpError) else f"fails: {error}"
    return H1ExportError(where, what, UNRUNNABLE)
