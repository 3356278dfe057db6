"""Constants of a program as arrays, computed once for a package; and an op's inputs checked against its schema."""

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
from h1export.targets.coreml.evaluator.steps import FAILURES, failure

IGNORED = ("name", "val")  # attributes that say nothing about what an op computes


@dataclass(frozen=True)
class State:
    """What a name stands for that is bound to a state."""

    name: str
    type: TensorType


Constant = Value | Operation  # the operation is a const or a constexpr one
Meaning = int | State | Operation  # what a name stands for: a slot, a state, or a constant
Scope = Mapping[str, Meaning]


def meaning_of(name: str, scope: Scope, where: str) -> Meaning:
    """Raises H1ExportError for a name that nothing before it defines."""
    if name not in scope:
        raise H1ExportError(where, f"takes {name!r}, which nothing before it computes", DAMAGED)
    return scope[name]


def op_of(operation: Operation) -> Op:
    """Raises H1ExportError for an op that the evaluator does not have."""
    if operation.type not in TABLE:
        known = ", ".join(sorted({*TABLE, *CONTROL}))
        raise H1ExportError(operation.where, "is an op that the evaluator does not have", f"it has {known}")
    return TABLE[operation.type]


def arguments_of(operation: Operation, op: Op) -> dict[str, tuple[Argument, ...]]:
    """An operation's inputs and attributes by name.

    Raises:
        H1ExportError: some are unknown to the op's schema, missing, or tuples where one belongs.
    """
    found = {
        **operation.inputs,
        **{name: (value,) for name, value in operation.attributes.items() if name not in IGNORED},
    }
    if unknown := sorted(found.keys() - op.parameters.keys()):
        raise H1ExportError(
            operation.where, f"has inputs that the evaluator does not know: {', '.join(unknown)}", "leave them out"
        )
    for name, parameter in op.parameters.items():
        if parameter.required and name not in found:
            raise H1ExportError(operation.where, f"lacks {name}", "give it")
        if not parameter.many and len(found.get(name, (name,))) != 1:
            raise H1ExportError(operation.where, f"has {len(found[name])} values for {name}", DAMAGED)
    return found


def converted(array: Array, parameter: Parameter, name: str, where: str) -> Any:
    """What an op's function takes for a constant."""
    try:
        return array if parameter.convert is None else parameter.convert(array)
    except OpError as error:
        raise H1ExportError(where, f"{name}: {error}", DAMAGED) from error


def constant(package: Package, meaning: Constant, scope: Scope) -> Array:
    """The array of a constant, float32 where it is fp16: one array for the same bytes, in whichever function of the package.

    Raises:
        H1ExportError: see ``Value.array``; a constexpr op that fails, or whose result is not what it declares.
    """

    def make() -> Array:
        array = widen(_stored(meaning, scope))
        return (
            array.copy() if array.dtype == np.float32 and not array.flags.writeable else array
        )  # torch would copy it at every use

    return package.memoised(_key(meaning, scope), make)


def _stored(meaning: Constant, scope: Scope) -> Array:
    """In its own type, but for the result of a constexpr op: float32 where it is fp16."""
    if isinstance(meaning, Value):
        return meaning.array()
    if meaning.type == "const":
        value = meaning.attributes["val"]
        if value.type != meaning.outputs[0][1]:
            raise H1ExportError(
                meaning.where, f"holds {value.type}, and is declared as {meaning.outputs[0][1]}", DAMAGED
            )
        return value.array()
    op = op_of(meaning)
    inputs = {}
    for name, (argument, *_) in arguments_of(meaning, op).items():
        found = argument if isinstance(argument, Value) else meaning_of(argument, scope, meaning.where)
        if not isinstance(found, Constant):
            raise H1ExportError(meaning.where, f"takes {name} from {argument!r}, which is computed when run", DAMAGED)
        inputs[name] = converted(_stored(found, scope), op.parameters[name], name, where=meaning.where)
    try:
        result = np.asarray(op.function(**inputs))
    except FAILURES as error:
        raise failure(meaning.where, error) from error
    if len(meaning.outputs) != 1 or not meaning.outputs[0][1].holds(result.shape):
        raise H1ExportError(meaning.where, f"computes shape {list(result.shape)}, not what is declared", DAMAGED)
    return _of_type(result, meaning.outputs[0][1], meaning.where)


def _of_type(result: Array, declared: TensorType, where: str) -> Array:
    target = declared.dtype.array
    if result.dtype.kind != target.kind:
        raise H1ExportError(where, f"computes {result.dtype}, and is declared as {declared}", DAMAGED)
    if declared.dtype is not FP16:
        return result.astype(target)
    return round_half(result) if result.dtype == np.float32 else widen(result)


def _key(meaning: Constant, scope: Scope) -> Hashable:
    """Equal for constants that are the same in type and bytes, whatever they are called."""
    if isinstance(meaning, Value):
        return meaning.key
    if meaning.type == "const":
        return (meaning.outputs[0][1], meaning.attributes["val"].key)
    values: list[Hashable] = [meaning.type, tuple(kind for _, kind in meaning.outputs)]
    for name, (argument, *_) in sorted(meaning.inputs.items()):
        found = argument if isinstance(argument, Value) else meaning_of(argument, scope, meaning.where)
        values += [name, _key(found, scope) if isinstance(found, Constant) else argument]
    return (*values, *((name, value.key) for name, value in sorted(meaning.attributes.items()) if name not in IGNORED))
