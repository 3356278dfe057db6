"""GptqMatrix: a weight of a checkpoint in GPTQ format.

For a linear layer X with a weight [rows, columns] = [out_features, in_features] the file holds

    X.qweight  int32 [columns * bits / 32, rows]     codes, packed along the columns
    X.qzeros   int32 [groups, rows * bits / 32]      zero points, packed along the rows
    X.scales   float [groups, rows]
    X.g_idx    int32 [columns]                       the group of each column

Numbers of words are rounded up; what the last word holds beyond the last code means nothing. The first code of a 32-bit
word is stored in its lowest bits.

Source: GPTQModel and AutoGPTQ. Writers of checkpoint_format "gptq" subtract 1 from each zero point with one subtraction
of int32 words, so a zero point of 0 borrows from its neighbour. One addition of words restores all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from h1export.checkpoint.gptq_format import GptqFormat
from h1export.checkpoint.packed_format import (
    INTEGERS,
    SCALE_DTYPES,
    WORD,
    Columns,
    PackedMatrix,
    Unsigned,
    checked_groups,
)
from h1export.checkpoint.safetensors_header import TensorEntry
from h1export.model.falcon_h1.states import Array


class GptqMatrix(PackedMatrix[GptqFormat]):
    """One weight in GPTQ format."""

    all_parts = ("qweight", "qzeros", "scales", "g_idx")
    main_part = "qweight"
    scales_part = "scales"
    zeros_part = "qzeros"

    @classmethod
    def expected(
        cls, shape: tuple[int, int], packed_format: GptqFormat, *, where: str
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        rows, columns = shape
        groups = packed_format.groups(columns)
        return {
            "qweight": ((packed_format.words(columns), rows), INTEGERS),
            "qzeros": ((groups, packed_format.words(rows)), INTEGERS),
            "scales": ((groups, rows), SCALE_DTYPES),
            "g_idx": ((columns,), INTEGERS),
        }

    @classmethod
    def column_groups(
        cls, shape: tuple[int, int], packed_format: GptqFormat, *, parts: Mapping[str, TensorEntry]
    ) -> Columns:
        return checked_groups(parts["g_idx"], packed_format.groups(shape[1]))

    def unsigned_codes(self, start: int, stop: int) -> Unsigned:
        return self.unpacked(self.parts["qweight"].values(columns=slice(start, stop)).T, self.shape[1])

    def unsigned_zeros(self, start: int, stop: int) -> Unsigned:
        first, end, begin = self.word_range(start, stop)
        words = self.parts["qzeros"].values(columns=slice(first, end)).view(np.uint32)
        ones = (2**WORD - 1) // (2**self.packed_format.bits - 1)  # the value 1 in each code of a word
        # A borrow moves to higher codes only, so the rest of the last word cannot change the codes below it.
        restored = words + np.uint32(self.packed_format.zero_offset * ones)
        return self.unpacked(restored, stop - begin)[:, start - begin :].T

    def stored_scales(self, start: int, stop: int) -> Array:
        return self.parts["scales"].floats(columns=slice(start, stop)).T
