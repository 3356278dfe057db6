"""A CoreML program as plain data: functions, blocks, operations, values; tensors are decoded when asked for."""

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
    """Element type and shape; None is a dimension known only when run."""

    dtype: DType
    shape: tuple[int | None, ...]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of ``shape`` is of this type."""
        return len(shape) == len(self.shape) and all(
            own in (None, other) for own, other in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class BlobReference:
    """Where in which file of the package a tensor lies; ``file`` as the program writes it."""

    file: str
    offset: int


class ReadBlob(Protocol):
    """Reads what a reference points to; raises H1ExportError for a reference that leads nowhere."""

    def __call__(self, reference: BlobReference, dtype: DType, count: int, where: str) -> Array: ...


class Value:
    """A constant of the program; ``where`` names its operation in messages."""

    __slots__ = ("_message", "_read", "where")

    def __init__(self, message: Any, read: ReadBlob, where: str) -> None:
        self._message = message
        self._read = read
        self.where = where

    @property
    def type(self) -> TensorType:
        """Raises H1ExportError where the value is no tensor of a known type and shape."""
        found = tensor_type(self._message.type, self.where)
        if None in found.shape:
            raise H1ExportError(self.where, f"holds a constant of unknown shape {found}", DAMAGED)
        return found

    @property
    def blob(self) -> BlobReference | None:
        """Where the value lies in a file; None: in the program itself."""
        if self._message.WhichOneof("value") != "blobFileValue":
            return None
        return BlobReference(self._message.blobFileValue.fileName, self._message.blobFileValue.offset)

    @property
    def key(self) -> Hashable:
        """Equal for values that are the same in type and content."""
        return (self.blob and (self.blob, self.type)) or self._message.SerializeToString(deterministic=True)

    def array(self) -> Array:
        """In its own type and shape; int4 as int8, other types narrower than a byte as uint8, strings as objects.

        Raises:
            H1ExportError: not a tensor, a broken reference, or another number of elements than its shape has.
        """
        dtype = self.type.dtype
        shape = tuple(size or 0 for size in self.type.shape)
        count = prod(shape)
        flat = self._read(self.blob, dtype, count, self.where) if self.blob else self._immediate(dtype, count)
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
    """One step: ``inputs`` has more than one argument only where an op takes a tuple (``concat``'s values)."""

    type: str
    name: str
    inputs: Mapping[str, tuple[Argument, ...]]
    attributes: Mapping[str, Value]
    outputs: tuple[tuple[str, TensorType], ...]
    blocks: tuple[Block, ...]
    where: str

    @property
    def constant(self) -> bool:
        """Whether the outputs depend on no input of the program."""
        return self.type == "const" or self.type.startswith("constexpr_")


@dataclass(frozen=True)
class Block:
    """Operations in order; ``outputs`` names what it returns."""

    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
        """Its operations and those of the blocks inside them."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Function:
    """An entry point: ``outputs`` has the types that the block's operations declare."""

    name: str
    opset: str
    inputs: Mapping[str, TensorType]
    states: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    block: Block


def tensor_type(message: Any, where: str) -> TensorType:
    """A ValueType message that must be a tensor.

    Raises:
        H1ExportError: it is not, or its element type is not known here, or its rank is not fixed.
    """
    if message.WhichOneof("type") != "tensorType":
        raise H1ExportError(
            where, f"is of {message.WhichOneof('type') or 'no type'}, not a tensor", "this is not supported here"
        )
    tensor = message.tensorType
    if tensor.dataType not in BY_MIL:
        raise H1ExportError(
            where, f"has elements of MIL type {tensor.dataType}, which is not known here", "use fp16, fp32 or integers"
        )
    shape: list[int | None] = []
    for dimension in tensor.dimensions:
        fixed = dimension.WhichOneof("dimension") == "constant"
        if not fixed and dimension.unknown.variadic:
            raise H1ExportError(where, "has no fixed rank", "give every tensor a rank")
        shape.append(int(dimension.constant.size) if fixed else None)
    return TensorType(BY_MIL[tensor.dataType], tuple(shape))
