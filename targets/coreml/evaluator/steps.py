"""What a function is resolved to: steps over a flat list of values.

A value of fp16 is a float32 array of values that fp16 has. A step that computes rounds its results; arrays are never changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.dtypes import FP16, Array, narrow, peak, round_half, widen
from h1export.targets.coreml.evaluator.ops.base import Op, OpError
from h1export.targets.coreml.evaluator.program import TensorType

UNRUNNABLE = "this program is invalid on a device too, or uses what the evaluator does not have"
FAILURES = (OpError, ValueError, TypeError, IndexError, ArithmeticError, RuntimeError, AttributeError, MemoryError)


@dataclass
class Frame:
    """One run: ``values`` by slot; ``states`` by name in their declared types, and ``held`` as the evaluator holds values."""

    values: list[Any]
    states: dict[str, Array]
    held: dict[str, Array]


class Step(Protocol):
    """Reads and writes a frame; raises H1ExportError where it cannot."""

    def __call__(self, frame: Frame) -> None: ...


@dataclass
class Output:
    """A result's slot and declared type, and the largest magnitude computed for it, before rounding, where it is fp16."""

    slot: int
    name: str
    type: TensorType
    op: str
    moves: bool
    maximum: float | None = None
    half: bool = field(init=False)
    shape: tuple[int, ...] | None = field(init=False)  # None: has a dimension known only when run
    array: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.half = self.type.dtype is FP16
        self.array = np.dtype(np.float32) if self.half else self.type.dtype.array
        self.shape = None if None in self.type.shape else tuple(size or 0 for size in self.type.shape)

    def finish(self, result: Array) -> Array:
        """``result`` in the declared type; raises OpError where its shape or kind is another."""
        if result.shape != self.shape and not self.type.holds(result.shape):
            raise OpError(f"computes shape {list(result.shape)} for {self.name!r}, which is declared as {self.type}")
        if result.dtype != self.array:
            kinds = result.dtype.kind + self.array.kind
            if kinds != "ff" and not {*kinds} <= {"i", "u"}:
                raise OpError(f"computes {result.dtype} for {self.name!r}, which is declared as {self.type}")
            result = result.astype(self.array)
        if not self.half or self.moves:
            return result if isinstance(result, np.ndarray) else np.asarray(result)
        result = np.asarray(result)
        largest = peak(result)
        if self.maximum is None or not largest <= self.maximum:  # a NaN stays
            self.maximum = largest if self.maximum is None or not math.isnan(self.maximum) else self.maximum
        return round_half(result)


@dataclass(frozen=True)
class Computed:
    """An argument that another step computes: its slots, and what the op takes instead of the array."""

    name: str
    slots: tuple[int, ...]
    convert: Callable[[Array], Any] | None
    many: bool

    def value(self, values: Sequence[Any]) -> Any:
        """What the op's function is called with."""
        if self.many:
            return tuple(values[slot] for slot in self.slots)
        array = values[self.slots[0]]
        return array if self.convert is None else self.convert(array)


@dataclass(frozen=True)
class OpStep:
    """Call an op's function and finish its results."""

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
                values[output.slot] = output.finish(array)
        except FAILURES as error:
            raise failure(self.where, error) from error


@dataclass(frozen=True)
class ReadState:
    """The state as the steps before left it."""

    state: str
    output: Output
    where: str

    def __call__(self, frame: Frame) -> None:
        if self.state not in frame.held:
            frame.held[self.state] = widen(frame.states[self.state])
        try:
            frame.values[self.output.slot] = self.output.finish(frame.held[self.state])
        except OpError as error:
            raise failure(self.where, error) from error


@dataclass(frozen=True)
class WriteState:
    """Puts a new array in the place of a state's; read-only, so that ``held`` stays the same values."""

    state: str
    type: TensorType
    slot: int
    where: str

    def __call__(self, frame: Frame) -> None:
        data = frame.values[self.slot]
        if not self.type.holds(data.shape):
            raise failure(
                self.where, OpError(f"writes shape {list(data.shape)} to state {self.state!r}, which is {self.type}")
            )
        frame.states[self.state] = written = narrow(data, self.type.dtype)
        written.flags.writeable = False
        frame.held[self.state] = data


@dataclass(frozen=True)
class Body:
    """A nested block: where its inputs go, its steps, where its outputs are."""

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def run(self, frame: Frame, arguments: Sequence[Array]) -> list[Array]:
        for slot, argument in zip(self.inputs, arguments, strict=True):
            frame.values[slot] = argument
        for step in self.steps:
            step(frame)
        return [frame.values[slot] for slot in self.outputs]


@dataclass(frozen=True)
class WhileLoop:
    """Core ML MIL specification, op while_loop: the first block decides, the second computes the next loop variables."""

    variables: tuple[int, ...]
    condition: Body
    body: Body
    outputs: tuple[Output, ...]
    where: str

    def __call__(self, frame: Frame) -> None:
        current = [frame.values[slot] for slot in self.variables]
        while truth(self.condition.run(frame, current)[0], self.where):
            current = self.body.run(frame, current)
        place(frame, self.outputs, current, self.where)


@dataclass(frozen=True)
class Branch:
    """Core ML MIL specification, op cond: the first block where the predicate is true, else the second."""

    predicate: int
    blocks: tuple[Body, Body]
    outputs: tuple[Output, ...]
    where: str

    def __call__(self, frame: Frame) -> None:
        chosen = self.blocks[0 if truth(frame.values[self.predicate], self.where) else 1]
        place(frame, self.outputs, chosen.run(frame, ()), self.where)


def place(frame: Frame, outputs: Sequence[Output], results: Sequence[Array], where: str) -> None:
    """A nested block's results as outputs of its op."""
    for output, array in zip(outputs, results, strict=True):
        try:
            frame.values[output.slot] = output.finish(array)
        except OpError as error:
            raise failure(where, error) from error


def truth(array: Array, where: str) -> bool:
    """Raises H1ExportError for anything but one bool."""
    if array.dtype != np.bool_ or array.size != 1:
        raise failure(where, OpError(f"decides by {array.dtype} of shape {list(array.shape)}, not by one bool"))
    return bool(array.item())


def failure(where: str, error: Exception) -> H1ExportError:
    """The error that a user reads: which op of which function, and what it cannot do."""
    what = str(error) if isinstance(error, OpError) else f"fails: {error}"
    return H1ExportError(where, what, UNRUNNABLE)
