"""A Core ML program as plain data: functions, blocks, operations and values (MIL.proto of coremltools).

Tensors are decoded when ``Value.array`` is called.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.dtypes import BY_MIL, STRING, Array, DType, decode

DAMAGED = "the package is damaged: build it again"
# field of TensorValue -> kinds of numpy types that it may fill
FIELDS: Mapping[str, str] = {
    "floats": "f",
    "doubles": "f",
    "ints": "iu",
    "longInts": "iu",
    "bools": "b",
    "strings": "O",
}


@dataclass(frozen=True)
class TensorType:
    """An element type and a shape; None stands for a dimension that is known at run time only."""

    dtype: DType
    shape: tuple[int | None, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Return whether an array of ``shape`` has this type."""
        return len(shape) == len(self.shape) and all(
            declared in (None, size) for declared, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class BlobReference:
    """The place of a tensor in a file of the package: the name that the program gives the file, and a byte offset."""

    file: str
    offset: int


class ReadBlob(Protocol):
    """A function that reads the tensor of a reference; it raises H1ExportError if the reference is broken."""

    def __call__(self, reference: BlobReference, dtype: DType, count: int, *, where: str) -> Array: ...


class Value:
    """A constant of the program; ``where`` names its operation in error messages."""

    __slots__ = ("_message", "_read", "where")

    def __init__(self, message: Any, read: ReadBlob, where: str) -> None:
        self._message = message
        self._read = read
        self.where = where

    @property
    def type(self) -> TensorType:
        """The type of the value.

        Raises:
            H1ExportError: the value is not a tensor of a known type and shape.
        """
        found = tensor_type(self._message.type, self.where)
        if None in found.shape:
            raise H1ExportError(self.where, f"holds a constant of unknown shape {found}", DAMAGED)
        return found

    @property
    def blob(self) -> BlobReference | None:
        """The place of the value in a file, or None if the program itself stores it."""
        if self._message.WhichOneof("value") != "blobFileValue":
            return None
        return BlobReference(self._message.blobFileValue.fileName, self._message.blobFileValue.offset)

    @property
    def key(self) -> Hashable:
        """A key that is equal for values of the same type and content."""
        return (self.blob and (self.blob, self.type)) or self._message.SerializeToString(deterministic=True)

    def array(self) -> Array:
        """Return the value in its own type and shape.

        int4 is returned as int8, other types narrower than a byte as uint8, and strings as objects.

        Raises:
            H1ExportError: the value is not a tensor, a reference is broken, or the number of elements does not fit the
                shape.
        """
        dtype = self.type.dtype
        shape = tuple(size or 0 for size in self.type.shape)
        count = prod(shape)
        flat = self._read(self.blob, dtype, count, where=self.where) if self.blob else self._immediate(dtype, count)
        return flat.reshape(shape)

    def _immediate(self, dtype: DType, count: int) -> Array:
        immediate = self._message.immediateValue
        if immediate.WhichOneof("value") != "tensor" or not (field := immediate.tensor.WhichOneof("value")):
            raise H1ExportError(self.where, "holds a constant that is not a tensor", DAMAGED)
        values = getattr(immediate.tensor, field).values
        if field == "bytes":
            if dtype is STRING or len(values) != dtype.nbytes(count):
                raise H1ExportError(self.where, f"holds {len(values)} bytes for {count} elements of {dtype}", DAMAGED)
            return decode(np.frombuffer(values, np.uint8), dtype, count)
        if len(values) != count:
            raise H1ExportError(self.where, f"holds {len(values)} values for {count} elements of {dtype}", DAMAGED)
        if dtype.array.kind not in FIELDS[field]:
            raise H1ExportError(self.where, f"holds {field} for elements of {dtype}", DAMAGED)
        try:
            return np.array(values, dtype.array)
        except OverflowError as error:
            raise H1ExportError(self.where, f"holds values outside {dtype}", DAMAGED) from error


Argument = str | Value  # the name of another operation's output or of an input, or a constant


@dataclass(frozen=True)
class Operation:
    """One operation of a block.

    Attributes:
        type: the name of the MIL op.
        name: the name of the first output, or "".
        inputs: the arguments of each input; only an input that takes a tuple (the values of concat) has several.
        attributes: the constants that the operation itself stores.
        outputs: the name and declared type of each output.
        blocks: the nested blocks of while_loop and cond.
        where: the operation's description for error messages.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[Argument, ...]]
    attributes: Mapping[str, Value]
    outputs: tuple[tuple[str, TensorType], ...]
    blocks: tuple[Block, ...]
    where: str

    @property
    def constant(self) -> bool:
        """Whether the operation is a constant, which depends on no input of the program."""
        return self.type == "const" or self.type.startswith("constexpr_")


@dataclass(frozen=True)
class Block:
    """A list of operations in order, with the types of its inputs and the names of its outputs."""

    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
        """Yield the operations of the block and of the blocks nested in it."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Function:
    """An entry point of the program; ``outputs`` has the types that the operations of the block declare."""

    name: str
    opset: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    block: Block


def tensor_type(message: Any, where: str) -> TensorType:
    """Parse a ValueType message that must be a tensor.

    Raises:
        H1ExportError: the message is not a tensor, or has an unknown element type or no fixed rank.
    """
    if message.WhichOneof("type") != "tensorType":
        raise H1ExportError(
            where, f"is of {message.WhichOneof('type') or 'no type'}, not a tensor", "only tensors are supported"
        )
    tensor = message.tensorType
    if tensor.dataType not in BY_MIL:
        raise H1ExportError(
            where, f"has elements of MIL type {tensor.dataType}, which is unknown", "use fp16, fp32 or integers"
        )
    shape: list[int | None] = []
    for dimension in tensor.dimensions:
        fixed = dimension.WhichOneof("dimension") == "constant"
        if not fixed and dimension.unknown.variadic:
            raise H1ExportError(where, "has no fixed rank", "give every tensor a rank")
        shape.append(int(dimension.constant.size) if fixed else None)
    return TensorType(BY_MIL[tensor.dataType], tuple(shape))
