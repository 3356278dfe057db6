"""The tensor types of GGUF that this target writes, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from h1export.quantize.precision import Precision


class TensorType(StrEnum):
    """A type; the value is its name in the options, and in upper case in gguf's GGMLQuantizationType."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q4_0 = "q4_0"
    Q4_K = "q4_k"
    Q5_0 = "q5_0"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    Q8_0 = "q8_0"

    @property
    def block(self) -> Block:
        """The block that rows of this type are made of."""
        return BLOCKS[self]

    @property
    def integers(self) -> bool:
        """Whether it stores codes and scales."""
        return self.block.columns > 1

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row. The block must divide the columns."""
        assert columns % self.block.columns == 0, f"{columns} columns in {self}"
        return columns // self.block.columns * self.block.nbytes


@dataclass(frozen=True)
class Block:
    """The columns of a block, and its bytes."""

    columns: int
    nbytes: int


BLOCKS = {
    TensorType.F32: Block(1, 4),
    TensorType.F16: Block(1, 2),
    TensorType.BF16: Block(1, 2),
    TensorType.Q4_0: Block(32, 18),
    TensorType.Q4_K: Block(256, 144),
    TensorType.Q5_0: Block(32, 22),
    TensorType.Q5_K: Block(256, 176),
    TensorType.Q6_K: Block(256, 210),
    TensorType.Q8_0: Block(32, 34),
}
# The types of the precisions that every target's --embedding names.
OF_CHOICE = {"int4": TensorType.Q4_0, "int8": TensorType.Q8_0, "fp16": TensorType.F16}
OF_BITS = {4: TensorType.Q4_0, 8: TensorType.Q8_0}  # the type whose blocks hold the integers of a build, by their bits


def integer_type(precision: Precision) -> TensorType:
    """Return the type whose blocks hold integers of ``precision``; scales of longer groups and of rows are repeated."""
    return OF_BITS[precision.bits]
