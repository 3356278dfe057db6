"""The constants of a program as arrays, computed once per package, and the check of inputs against an op's schema."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.dtypes import FP16, Array, round_half, widen
from h1export.targets.coreml.evaluator.ops import CONTROL, TABLE
from h1export.targets.coreml.evaluator.ops.base import Op, OpError, Parameter
from h1export.targets.coreml.evaluator.package import Package
from h1export.targets.coreml.evaluator.program import DAMAGED, Argument, Operation, TensorType, Value
from h1export.targets.coreml.evaluator.steps import FAILURES, op_failure

IGNORED = ("name", "val")  # attributes that are not inputs of an op


@dataclass(frozen=True)
class State:
    """The definition of a name that is bound to a state."""

    name: str
    type: TensorType


Constant = Value | Operation  # the operation is a const or constexpr operation
Definition = int | State | Operation  # what a name refers to: a slot, a state, or a constant
Scope = Mapping[str, Definition]


def definition_of(name: str, scope: Scope, where: str) -> Definition:
    """Return the definition of ``name``, or raise H1ExportError if no earlier operation defines it."""
    if name not in scope:
        raise H1ExportError(where, f"takes {name!r}, which no earlier operation computes", DAMAGED)
    return scope[name]


def find_op(operation: Operation) -> Op:
    """Return the op of an operation, or raise H1ExportError if the evaluator does not have it."""
    if operation.type not in TABLE:
        known = ", ".join(sorted({*TABLE, *CONTROL}))
        raise H1ExportError(operation.where, "is an op that the evaluator does not have", f"it has {known}")
    return TABLE[operation.type]


def checked_arguments(operation: Operation, op: Op) -> dict[str, tuple[Argument, ...]]:
    """Return an operation's inputs and attributes by name, checked against the schema of the op.

    Raises:
        H1ExportError: an input is not in the schema, is missing, or has several values where the schema has one.
    """
    found = {
        **operation.inputs,
        **{name: (value,) for name, value in operation.attributes.items() if name not in IGNORED},
    }
    if unknown := sorted(found.keys() - op.parameters.keys()):
        raise H1ExportError(
            operation.where, f"has inputs that the evaluator does not know: {', '.join(unknown)}", "omit them"
        )
    for name, parameter in op.parameters.items():
        if parameter.required and name not in found:
            raise H1ExportError(operation.where, f"lacks {name}", "add it")
        if not parameter.many and len(found.get(name, (name,))) != 1:
            raise H1ExportError(operation.where, f"has {len(found[name])} values for {name}", DAMAGED)
    return found


def converted_argument(array: Array, parameter: Parameter, name: str, *, where: str) -> Any:
    """Convert a constant to the argument of an op's function; raise H1ExportError if it has another type or size."""
    try:
        return array if parameter.convert is None else parameter.convert(array)
    except OpError as error:
        raise H1ExportError(where, f"{name}: {error}", DAMAGED) from error


def constant_array(package: Package, definition: Constant, scope: Scope) -> Array:
    """Return the array of a constant, float32 if the constant is fp16.

    Constants of the same type and bytes share one array in all functions of the package.

    Raises:
        H1ExportError: the value cannot be read (see ``Value.array``), or a constexpr op fails or has another result
            than it declares.
    """

    def make() -> Array:
        array = widen(_stored_array(definition, scope))
        # torch would copy a read-only array at every use
        return array.copy() if array.dtype == np.float32 and not array.flags.writeable else array

    return package.cached(_content_key(definition, scope), make)


def _stored_array(definition: Constant, scope: Scope) -> Array:
    """Return a constant in its own type; an fp16 result of a constexpr op is returned as float32."""
    if isinstance(definition, Value):
        return definition.array()
    if definition.type == "const":
        value = definition.attributes["val"]
        if value.type != definition.outputs[0][1]:
            raise H1ExportError(
                definition.where, f"holds {value.type}, and is declared as {definition.outputs[0][1]}", DAMAGED
            )
        return value.array()
    op = find_op(definition)
    inputs = {}
    for name, (argument, *_) in checked_arguments(definition, op).items():
        found = argument if isinstance(argument, Value) else definition_of(argument, scope, definition.where)
        if not isinstance(found, Constant):
            raise H1ExportError(
                definition.where, f"takes {name} from {argument!r}, which is computed at run time", DAMAGED
            )
        inputs[name] = converted_argument(
            _stored_array(found, scope), op.parameters[name], name, where=definition.where
        )
    try:
        result = np.asarray(op.function(**inputs))
    except FAILURES as error:
        raise op_failure(definition.where, error) from error
    if len(definition.outputs) != 1 or not definition.outputs[0][1].accepts(result.shape):
        declared = ", ".join(str(kind) for _, kind in definition.outputs)
        raise H1ExportError(
            definition.where, f"computes shape {list(result.shape)}, and declares {declared or 'no output'}", DAMAGED
        )
    return _of_type(result, definition.outputs[0][1], definition.where)


def _of_type(result: Array, declared: TensorType, where: str) -> Array:
    target = declared.dtype.array
    if result.dtype.kind != target.kind:
        raise H1ExportError(where, f"computes {result.dtype}, and is declared as {declared}", DAMAGED)
    if declared.dtype is not FP16:
        return result.astype(target)
    return round_half(result) if result.dtype == np.float32 else widen(result)


def _content_key(definition: Constant, scope: Scope) -> Hashable:
    """Return a key that is equal for constants of the same type and bytes, whatever their names."""
    if isinstance(definition, Value):
        return definition.key
    if definition.type == "const":
        return (definition.outputs[0][1], definition.attributes["val"].key)
    values: list[Hashable] = [definition.type, tuple(kind for _, kind in definition.outputs)]
    for name, (argument, *_) in sorted(definition.inputs.items()):
        found = argument if isinstance(argument, Value) else definition_of(argument, scope, definition.where)
        values += [name, _content_key(found, scope) if isinstance(found, Constant) else argument]
    return (
        *values,
        *((name, value.key) for name, value in sorted(definition.attributes.items()) if name not in IGNORED),
    )
