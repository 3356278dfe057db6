"""AwqMatrix: a weight of a checkpoint in AWQ's "gemm" format.

For a linear layer X with a weight [rows, columns] = [out_features, in_features] the file holds

    X.qweight  int32 [columns, rows / 8]     codes, packed along the rows
    X.qzeros   int32 [groups, rows / 8]      zero points, packed along the rows
    X.scales   float [groups, rows]

Nibble i of a word, counted from its lowest bits, belongs to row ROWS_OF_NIBBLES[i] of the word's eight rows.

Source: AutoAWQ, ``WQLinear_GEMM`` and ``dequantize_gemm``.
"""

from __future__ import annotations

import numpy as np

from h1export.checkpoint.awq_format import AwqFormat
from h1export.checkpoint.packed_format import (
    GET_MATCHING_FILES,
    INTEGERS,
    SCALE_DTYPES,
    PackedMatrix,
    Unsigned,
)
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

ROWS_OF_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLES_OF_ROWS = np.argsort(ROWS_OF_NIBBLES)
ROWS_A_WORD = len(ROWS_OF_NIBBLES)


class AwqMatrix(PackedMatrix[AwqFormat]):
    """One weight in AWQ's "gemm" format."""

    all_parts = ("qweight", "qzeros", "scales")
    main_part = "qweight"
    scales_part = "scales"
    zeros_part = "qzeros"
    says_symmetric = "zero_point false"
    correct_zeros = "correct its key zero_point"

    @classmethod
    def expected(
        cls, shape: tuple[int, int], packed_format: AwqFormat, *, where: str
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        rows, columns = shape
        if rows % ROWS_A_WORD:
            raise H1ExportError(where, f"has {rows} rows, which do not fill words of {ROWS_A_WORD}", GET_MATCHING_FILES)
        groups = packed_format.groups(columns)
        return {
            "qweight": ((columns, rows // ROWS_A_WORD), INTEGERS),
            "qzeros": ((groups, rows // ROWS_A_WORD), INTEGERS),
            "scales": ((groups, rows), SCALE_DTYPES),
        }

    def unsigned_codes(self, start: int, stop: int) -> Unsigned:
        return self._rows("qweight", start, stop)

    def unsigned_zeros(self, start: int, stop: int) -> Unsigned:
        return self._rows("qzeros", start, stop)

    def stored_scales(self, start: int, stop: int) -> Array:
        return self.parts["scales"].floats(columns=slice(start, stop)).T

    def _rows(self, part: str, start: int, stop: int) -> Unsigned:
        """Return rows [start, stop) of a part that is packed along the rows, uint8 [rows, length of the part]."""
        first, end, begin = self.word_range(start, stop)
        words = self.parts[part].values(columns=slice(first, end))
        nibbles = self.unpacked(words, (end - first) * ROWS_A_WORD).reshape(len(words), -1, ROWS_A_WORD)
        rows = nibbles[:, :, NIBBLES_OF_ROWS].reshape(len(words), -1)
        return rows[:, start - begin : stop - begin].T
