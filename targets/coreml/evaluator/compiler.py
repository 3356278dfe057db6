"""The compiler of a function to steps: names become slots, constants become arrays, and operations become steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.constants import (
    Constant,
    Definition,
    State,
    checked_arguments,
    constant_array,
    converted_argument,
    definition_of,
    find_op,
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

Names = dict[str, Definition]
LARGE = 4096  # elements from which on a float constant is left out with ``without_weights``


class Compiler:
    """The result of compiling one function of a package.

    Args:
        package: the package.
        function: the function of the package to compile.
        without_weights: replace large float constants by zeros that take no memory, for a run that only checks shapes
            and bounds.

    Attributes:
        steps: the steps of a run, in order.
        input_slots: the slot of each input.
        output_slots: the slot of each output, in the order of ``Function.outputs``.
        op_outputs: every output of every op that runs.
        constants: the constants that have a slot.

    Raises:
        H1ExportError: the function has an op or an input of an op that the evaluator does not have, a name that no
            operation computes, or a broken constant.
    """

    def __init__(self, package: Package, function: Function, without_weights: bool = False) -> None:
        self._package = package
        self._without_weights = without_weights
        self._control = {
            "read_state": self._compile_read_state,
            "write_state": self._compile_write_state,
            "while_loop": self._compile_while_loop,
            "cond": self._compile_cond,
        }
        self._types: list[TensorType] = []  # the declared type of each slot
        self.op_outputs: list[Output] = []
        self.constants: dict[int, Array] = {}
        self.input_slots = {name: self._slot(kind) for name, kind in function.inputs.items()}
        names: Names = {**self.input_slots, **{name: State(name, kind) for name, kind in function.states.items()}}
        where = f"{package.path}: function {function.name!r}"
        self.steps, self.output_slots = self._compile_block(function.block, names, where)

    @property
    def slot_count(self) -> int:
        """The number of slots of a run."""
        return len(self._types)

    def _slot(self, kind: TensorType) -> int:
        self._types.append(kind)
        return len(self._types) - 1

    def _compile_block(self, block: Block, names: Names, where: str) -> tuple[tuple[Step, ...], tuple[int, ...]]:
        """Compile a block to steps and the slots of its outputs; its names are added to ``names``."""
        steps: list[Step] = []
        for operation in block.operations:
            if operation.constant:
                names |= dict.fromkeys((name for name, _ in operation.outputs), operation)
            else:
                steps.append(self._control.get(operation.type, self._compile_op)(operation, names))
        return tuple(steps), tuple(
            self._tensor(definition_of(name, names, where), names, where) for name in block.outputs
        )

    def _compile_op(self, operation: Operation, names: Names) -> Step:
        op = find_op(operation)
        fixed = _defaults(operation, op)
        computed: list[Computed] = []
        for name, arguments in checked_arguments(operation, op).items():
            parameter = op.parameters[name]
            definitions = [
                item if isinstance(item, Value) else definition_of(item, names, operation.where) for item in arguments
            ]
            known = [self._constant(item, names) for item in definitions if isinstance(item, Constant)]
            if len(known) == len(definitions):
                fixed[name] = (
                    tuple(known)
                    if parameter.many
                    else converted_argument(known[0], parameter, name, where=operation.where)
                )
            else:
                slots = tuple(self._tensor(item, names, operation.where) for item in definitions)
                computed.append(Computed(name, slots, parameter.convert, many=parameter.many))
        return OpStep(
            op, fixed, tuple(computed), outputs=self._outputs(operation, names, op.moves), where=operation.where
        )

    def _outputs(self, operation: Operation, names: Names, moves: bool) -> tuple[Output, ...]:
        outputs = tuple(
            Output(self._slot(kind), name, kind, op=operation.type, moves=moves) for name, kind in operation.outputs
        )
        names |= {output.name: output.slot for output in outputs}
        self.op_outputs += outputs
        return outputs

    def _tensor(self, definition: Definition | Value, names: Names, where: str) -> int:
        """Return the slot of a tensor; a constant is given one."""
        if isinstance(definition, int):
            return definition
        if isinstance(definition, State):
            raise H1ExportError(where, f"takes state {definition.name!r} as a tensor", "read it with read_state first")
        slot = self._slot(_declared_type(definition))
        self.constants[slot] = self._constant(definition, names)
        return slot

    def _constant(self, definition: Constant, names: Names) -> Array:
        kind = _declared_type(definition)
        shape = tuple(size or 0 for size in kind.shape)
        if self._without_weights and kind.dtype.array.kind == "f" and prod(shape) >= LARGE:
            return np.broadcast_to(np.zeros((), np.float32), shape)
        return constant_array(self._package, definition, names)

    def _tensors(self, operation: Operation, name: str, names: Names) -> tuple[int, ...]:
        definitions = [
            argument if isinstance(argument, Value) else definition_of(argument, names, operation.where)
            for argument in operation.inputs.get(name, ())
        ]
        return tuple(self._tensor(definition, names, operation.where) for definition in definitions)

    def _compile_read_state(self, operation: Operation, names: Names) -> Step:
        state = _state(operation, names)
        outputs = self._outputs(operation, names, moves=True)
        _check_counts(operation, (outputs, 1))
        return ReadState(state.name, outputs[0], operation.where)

    def _compile_write_state(self, operation: Operation, names: Names) -> Step:
        state = _state(operation, names)
        slots = self._tensors(operation, "data", names)
        _check_counts(operation, (slots, 1), (operation.outputs, 0))
        self._check_same_dtype(operation, slots, [state.type])
        return WriteState(state.name, state.type, slots[0], where=operation.where)

    def _compile_body(self, block: Block, names: Names, where: str) -> Body:
        slots = tuple(self._slot(kind) for _, kind in block.inputs)
        inner: Names = {**names, **{name: slot for (name, _), slot in zip(block.inputs, slots, strict=True)}}
        return Body(slots, *self._compile_block(block, inner, where))

    def _compile_while_loop(self, operation: Operation, names: Names) -> Step:
        variables = self._tensors(operation, "loop_vars", names)
        _check_counts(operation, (operation.blocks, 2), (operation.outputs, len(variables)))
        condition, body = (self._compile_body(block, names, operation.where) for block in operation.blocks)
        _check_counts(
            operation,
            (condition.outputs, 1),
            *((items, len(variables)) for items in (condition.inputs, body.inputs, body.outputs)),
        )
        outputs = self._outputs(operation, names, moves=True)
        for slots in (variables, condition.inputs, body.inputs, body.outputs):
            self._check_same_dtype(operation, slots, [output.type for output in outputs])
        return WhileLoop(variables, condition, body, outputs=outputs, where=operation.where)

    def _compile_cond(self, operation: Operation, names: Names) -> Step:
        predicate = self._tensors(operation, "pred", names)
        _check_counts(operation, (predicate, 1), (operation.blocks, 2))
        first, second = (self._compile_body(block, names, operation.where) for block in operation.blocks)
        outputs = self._outputs(operation, names, moves=True)
        _check_counts(
            operation,
            (first.inputs, 0),
            (second.inputs, 0),
            (first.outputs, len(outputs)),
            (second.outputs, len(outputs)),
        )
        for block in (first, second):
            self._check_same_dtype(operation, block.outputs, [output.type for output in outputs])
        return Branch(predicate[0], (first, second), outputs, where=operation.where)

    def _check_same_dtype(self, operation: Operation, slots: Sequence[int], declared: Sequence[TensorType]) -> None:
        """Raise H1ExportError if a value that is passed on unchanged has another element type than declared."""
        for slot, kind in zip(slots, declared, strict=True):
            if self._types[slot].dtype is not kind.dtype:
                raise H1ExportError(operation.where, f"passes {self._types[slot]} on as {kind}", "cast it first")


def _declared_type(definition: Constant) -> TensorType:
    return definition.type if isinstance(definition, Value) else definition.outputs[0][1]


def _defaults(operation: Operation, op: Op) -> dict[str, Any]:
    """Return the default floats of an fp16 op rounded to fp16, where an epsilon of 1e-12 is zero."""
    if not any(kind.dtype is FP16 for _, kind in operation.outputs):
        return {}
    floats = {
        name: parameter.default for name, parameter in op.parameters.items() if isinstance(parameter.default, float)
    }
    return {name: float(np.float16(value)) for name, value in floats.items()}


def _state(operation: Operation, names: Names) -> State:
    arguments = operation.inputs.get("input", ())
    found = (
        definition_of(arguments[0], names, operation.where)
        if len(arguments) == 1 and isinstance(arguments[0], str)
        else None
    )
    if not isinstance(found, State):
        raise H1ExportError(operation.where, "does not take a state as its input", DAMAGED)
    return found


def _check_counts(operation: Operation, *expected: tuple[Sequence[object], int]) -> None:
    """Raise H1ExportError unless each sequence has the expected length."""
    for items, count in expected:
        if len(items) != count:
            raise H1ExportError(
                operation.where, f"has {len(items)} inputs, outputs or blocks instead of {count}", DAMAGED
            )
