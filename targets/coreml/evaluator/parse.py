"""The parser from the messages of MIL.proto to the dataclasses of program.py.

It checks the structure of a program, so that the rest of the evaluator can rely on it.
"""

from __future__ import annotations

from typing import Any

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.program import (
    DAMAGED,
    Argument,
    Block,
    Function,
    Operation,
    ReadBlob,
    TensorType,
    Value,
    tensor_type,
)

NamedTypes = tuple[tuple[str, TensorType], ...]


def parse_function(name: str, message: Any, opset: str, *, read: ReadBlob, where: str) -> Function:
    """Parse a function of a program.

    Args:
        name: the name of the function.
        message: its Function message.
        opset: the opset that it must be written for.
        read: reads a tensor from a file of the package.
        where: the package, for error messages.

    Raises:
        H1ExportError: the function is written for another opset, or has a type, constant or operation that cannot be
            read.
    """
    where = f"{where}: function {name!r}"
    if message.opset != opset or opset not in message.block_specializations:
        raise H1ExportError(where, f"is written for {message.opset or 'no opset'}, not {opset}", "build it for iOS 18")
    inputs: dict[str, TensorType] = {}
    states: dict[str, TensorType] = {}
    for item in message.inputs:
        at = f"{where}, input {item.name!r}"
        if item.name in inputs or item.name in states:
            raise H1ExportError(at, "appears twice", DAMAGED)
        if item.type.WhichOneof("type") == "stateType":
            states[item.name] = tensor_type(item.type.stateType.wrappedType, at)
        else:
            inputs[item.name] = tensor_type(item.type, at)
    block = _block(message.block_specializations[opset], read, where)
    types = {**inputs, **{output: kind for operation in block.operations for output, kind in operation.outputs}}
    for output in block.outputs:
        if output not in types:
            raise H1ExportError(where, f"returns {output!r}, which no operation computes", DAMAGED)
    for state, kind in states.items():
        if None in kind.shape:
            raise H1ExportError(where, f"state {state!r} has no fixed shape: {kind}", "give states fixed shapes")
    outputs = {output: types[output] for output in block.outputs}
    return Function(name, opset, inputs, states=states, outputs=outputs, block=block)


def _block(message: Any, read: ReadBlob, where: str) -> Block:
    inputs: NamedTypes = tuple(
        (item.name, tensor_type(item.type, f"{where}, {item.name!r}")) for item in message.inputs
    )
    return Block(inputs, tuple(message.outputs), tuple(_operation(item, read, where) for item in message.operations))


def _operation(message: Any, read: ReadBlob, where: str) -> Operation:
    first = message.outputs[0].name if message.outputs else ""
    at = f"{where}, op {message.type} {first!r}" if first else f"{where}, op {message.type}"
    attributes = {str(name): Value(value, read, at) for name, value in message.attributes.items()}
    if message.type == "const" and ("val" not in attributes or len(message.outputs) != 1):
        raise H1ExportError(at, "is a const without a value", DAMAGED)
    inputs = {
        str(name): tuple(_argument(item, read, at) for item in argument.arguments)
        for name, argument in message.inputs.items()
    }
    if empty := [name for name, arguments in inputs.items() if not arguments]:
        raise H1ExportError(at, f"has an input {empty[0]!r} without a value", DAMAGED)
    outputs = tuple((item.name, tensor_type(item.type, at)) for item in message.outputs)
    blocks = tuple(_block(item, read, where) for item in message.blocks)
    return Operation(message.type, first, inputs, attributes=attributes, outputs=outputs, blocks=blocks, where=at)


def _argument(message: Any, read: ReadBlob, where: str) -> Argument:
    kind = message.WhichOneof("binding")
    if kind is None:
        raise H1ExportError(where, "has an input without a value", DAMAGED)
    return str(message.name) if kind == "name" else Value(message.value, read, where)
