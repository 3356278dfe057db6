"""Resolves a function to steps once: names to slots, constants to arrays, ops to functions with their attributes at hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.constants import (
    Constant,
    Meaning,
    State,
    arguments_of,
    constant,
    converted,
    meaning_of,
    op_of,
)
from h1export.targets.coreml.evaluator.dtypes import FP16, Array
from h1export.targets.coreml.evaluator.ops.base import Op
from h1export.targets.coreml.evaluator.package import Package
from h1export.targets.coreml.evaluator.program import DAMAGED, Block, Function, Operation, TensorType, Value
from h1export.targets.coreml.evaluator.steps import (
    Body,
    Branch,
    Computed,
    OpStep,
    Output,
    ReadState,
    Step,
    WhileLoop,
    WriteState,
)

Names = dict[str, Meaning]
LARGE = 4096  # elements of a constant that a hollow program goes without


class Compiler:
    """Compiles one function of a package; all that it finds is in its attributes afterwards.

    ``hollow``: large float constants are zeros that take no memory, for a run that only has to show shapes and bounds.

    Raises:
        H1ExportError: an op or input that the evaluator does not have, a name that nothing computes, a broken constant.
    """

    def __init__(self, package: Package, function: Function, hollow: bool = False) -> None:
        self._package = package
        self._hollow = hollow
        self._control = {
            "read_state": self._read,
            "write_state": self._write,
            "while_loop": self._loop,
            "cond": self._branch,
        }
        self._types: list[TensorType] = []  # by slot, as declared
        self.outputs: list[Output] = []  # of every op that runs
        self.constants: dict[int, Array] = {}  # by slot, those that stand beside computed tensors
        self.inputs = {name: self._slot(kind) for name, kind in function.inputs.items()}
        names: Names = {**self.inputs, **{name: State(name, kind) for name, kind in function.states.items()}}
        where = f"{package.path}: function {function.name!r}"
        self.steps, self.returned = self._block(function.block, names, where)

    @property
    def slots(self) -> int:
        """How many values a run holds."""
        return len(self._types)

    def _slot(self, kind: TensorType) -> int:
        self._types.append(kind)
        return len(self._types) - 1

    def _block(self, block: Block, names: Names, where: str) -> tuple[tuple[Step, ...], tuple[int, ...]]:
        """A block's steps, and the slots of its outputs; ``names`` gets its own."""
        steps: list[Step] = []
        for operation in block.operations:
            if operation.constant:
                names |= dict.fromkeys((name for name, _ in operation.outputs), operation)
            else:
                steps.append(self._control.get(operation.type, self._step)(operation, names))
        return tuple(steps), tuple(self._tensor(meaning_of(name, names, where), names, where) for name in block.outputs)

    def _step(self, operation: Operation, names: Names) -> Step:
        op = op_of(operation)
        fixed = _defaults(operation, op)
        computed: list[Computed] = []
        for name, arguments in arguments_of(operation, op).items():
            parameter = op.parameters[name]
            meanings = [
                item if isinstance(item, Value) else meaning_of(item, names, operation.where) for item in arguments
            ]
            known = [self._constant(item, names) for item in meanings if isinstance(item, Constant)]
            if len(known) == len(meanings):
                fixed[name] = (
                    tuple(known) if parameter.many else converted(known[0], parameter, name, where=operation.where)
                )
            else:
                slots = tuple(self._tensor(item, names, operation.where) for item in meanings)
                computed.append(Computed(name, slots, parameter.convert, many=parameter.many))
        return OpStep(
            op, fixed, tuple(computed), outputs=self._outputs(operation, names, op.moves), where=operation.where
        )

    def _outputs(self, operation: Operation, names: Names, moves: bool) -> tuple[Output, ...]:
        made = tuple(
            Output(self._slot(kind), name, kind, op=operation.type, moves=moves) for name, kind in operation.outputs
        )
        names |= {output.name: output.slot for output in made}
        self.outputs += made
        return made

    def _tensor(self, meaning: Meaning | Value, names: Names, where: str) -> int:
        """The slot that holds a tensor; a constant gets one."""
        if isinstance(meaning, int):
            return meaning
        if isinstance(meaning, State):
            raise H1ExportError(where, f"takes state {meaning.name!r} as a tensor", "read it with read_state first")
        slot = self._slot(_declared(meaning))
        self.constants[slot] = self._constant(meaning, names)
        return slot

    def _constant(self, meaning: Constant, names: Names) -> Array:
        kind = _declared(meaning)
        shape = tuple(size or 0 for size in kind.shape)
        if self._hollow and kind.dtype.array.kind == "f" and prod(shape) >= LARGE:
            return np.broadcast_to(np.zeros((), np.float32), shape)
        return constant(self._package, meaning, names)

    def _tensors(self, operation: Operation, name: str, names: Names) -> tuple[int, ...]:
        meanings = [
            argument if isinstance(argument, Value) else meaning_of(argument, names, operation.where)
            for argument in operation.inputs.get(name, ())
        ]
        return tuple(self._tensor(meaning, names, operation.where) for meaning in meanings)

    def _read(self, operation: Operation, names: Names) -> Step:
        state = _state(operation, names)
        outputs = self._outputs(operation, names, moves=True)
        _count(operation, (outputs, 1))
        return ReadState(state.name, outputs[0], operation.where)

    def _write(self, operation: Operation, names: Names) -> Step:
        state = _state(operation, names)
        slots = self._tensors(operation, "data", names)
        _count(operation, (slots, 1), (operation.outputs, 0))
        self._same(operation, slots, [state.type])
        return WriteState(state.name, state.type, slots[0], where=operation.where)

    def _body(self, block: Block, names: Names, where: str) -> Body:
        slots = tuple(self._slot(kind) for _, kind in block.inputs)
        inner: Names = {**names, **{name: slot for (name, _), slot in zip(block.inputs, slots, strict=True)}}
        return Body(slots, *self._block(block, inner, where))

    def _loop(self, operation: Operation, names: Names) -> Step:
        variables = self._tensors(operation, "loop_vars", names)
        _count(operation, (operation.blocks, 2), (operation.outputs, len(variables)))
        condition, body = (self._body(block, names, operation.where) for block in operation.blocks)
        _count(
            operation,
            (condition.outputs, 1),
            *((items, len(variables)) for items in (condition.inputs, body.inputs, body.outputs)),
        )
        outputs = self._outputs(operation, names, moves=True)
        for slots in (variables, condition.inputs, body.inputs, body.outputs):
            self._same(operation, slots, [output.type for output in outputs])
        return WhileLoop(variables, condition, body, outputs=outputs, where=operation.where)

    def _branch(self, operation: Operation, names: Names) -> Step:
        predicate = self._tensors(operation, "pred", names)
        _count(operation, (predicate, 1), (operation.blocks, 2))
        first, second = (self._body(block, names, operation.where) for block in operation.blocks)
        outputs = self._outputs(operation, names, moves=True)
        _count(
            operation,
            (first.inputs, 0),
            (second.inputs, 0),
            (first.outputs, len(outputs)),
            (second.outputs, len(outputs)),
        )
        for block in (first, second):
            self._same(operation, block.outputs, [output.type for output in outputs])
        return Branch(predicate[0], (first, second), outputs, where=operation.where)

    def _same(self, operation: Operation, slots: Sequence[int], declared: Sequence[TensorType]) -> None:
        """Raises H1ExportError where a value that is handed on as it is has another element type than the place it goes to."""
        for slot, kind in zip(slots, declared, strict=True):
            if self._types[slot].dtype is not kind.dtype:
                raise H1ExportError(operation.where, f"hands on {self._types[slot]} as {kind}", "cast it first")


def _declared(meaning: Constant) -> TensorType:
    return meaning.type if isinstance(meaning, Value) else meaning.outputs[0][1]


def _defaults(operation: Operation, op: Op) -> dict[str, Any]:
    """Floats that an fp16 op leaves out, as fp16 has them: there an epsilon of 1e-12 is zero."""
    if not any(kind.dtype is FP16 for _, kind in operation.outputs):
        return {}
    floats = {
        name: parameter.default for name, parameter in op.parameters.items() if isinstance(parameter.default, float)
    }
    return {name: float(np.float16(value)) for name, value in floats.items()}


def _state(operation: Operation, names: Names) -> State:
    arguments = operation.inputs.get("input", ())
    found = (
        meaning_of(arguments[0], names, operation.where)
        if len(arguments) == 1 and isinstance(arguments[0], str)
        else None
    )
    if not isinstance(found, State):
        raise H1ExportError(operation.where, "takes no state as its input", DAMAGED)
    return found


def _count(operation: Operation, *expected: tuple[Sequence[object], int]) -> None:
    """Raises H1ExportError unless each sequence is as long as it must be."""
    for items, count in expected:
        if len(items) != count:
            raise H1ExportError(
                operation.where, f"has {len(items)} inputs, outputs or blocks where {count} belong", DAMAGED
            )
