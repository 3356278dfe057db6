"""CompressedMatrix: a weight of a checkpoint in compressed-tensors' "pack-quantized" format.

For a linear layer X with a weight [rows, columns] = [out_features, in_features] the file holds

    X.weight_packed      int32 [rows, columns * bits / 32]     codes, packed along the columns
    X.weight_scale       float [rows, groups]
    X.weight_shape       int64 [2]                             [rows, columns]
    X.weight_zero_point  int32 [rows * bits / 32, groups]      zero points, packed along the rows; if asymmetric
    X.weight_zero_point  int8 [rows, groups]                   as older releases wrote it: signed, and not packed
    X.weight_g_idx       int32 [columns]                       the group of each column; -1 everywhere: neighbours

Numbers of words are rounded up. Codes and zero points are stored as unsigned numbers, the middle of their range added.
The first code of a 32-bit word is stored in its lowest bits.

Source: compressed-tensors, ``PackedQuantizationCompressor``, ``pack_to_int32`` and ``dequantize``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from h1export.checkpoint.compressed_format import CompressedFormat
from h1export.checkpoint.packed_format import (
    DOWNLOAD_AGAIN,
    GET_MATCHING_FILES,
    INTEGERS,
    SCALE_DTYPES,
    Columns,
    PackedMatrix,
    Unsigned,
    checked_groups,
    part_name,
)
from h1export.checkpoint.safetensors_header import TensorEntry
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

GROUPS_PART = "weight_g_idx"
SIGNED = "I8"


class CompressedMatrix(PackedMatrix[CompressedFormat]):
    """One weight in compressed-tensors' "pack-quantized" format."""

    all_parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", GROUPS_PART)
    main_part = "weight_packed"
    scales_part = "weight_scale"
    zeros_part = "weight_zero_point"

    @classmethod
    def open(
        cls, name: str, shape: tuple[int, ...], packed_format: CompressedFormat, *, entries: Mapping[str, TensorEntry]
    ) -> PackedMatrix[CompressedFormat]:
        zeros = entries.get(part_name(name, cls.zeros_part))
        if cls is CompressedMatrix and zeros is not None and zeros.dtype == SIGNED:
            return SignedZeros.open(name, shape, packed_format, entries=entries)
        return super().open(name, shape, packed_format, entries=entries)

    @classmethod
    def expected(
        cls, shape: tuple[int, int], packed_format: CompressedFormat, *, where: str
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        rows, columns = shape
        groups = packed_format.groups(columns)
        if groups * packed_format.group_size not in (-1, columns):
            what = f"has {columns} columns, which groups of {packed_format.group_size} do not divide"
            raise H1ExportError(where, what, GET_MATCHING_FILES)
        parts = {
            "weight_packed": ((rows, packed_format.words(columns)), INTEGERS),
            "weight_scale": ((rows, groups), SCALE_DTYPES),
            "weight_shape": ((2,), ("I64", "I32")),
            GROUPS_PART: ((columns,), INTEGERS),
        }
        return parts if packed_format.sym else parts | {cls.zeros_part: ((packed_format.words(rows), groups), INTEGERS)}

    @classmethod
    def optional_parts(cls) -> frozenset[str]:
        return frozenset({GROUPS_PART})

    @classmethod
    def column_groups(
        cls, shape: tuple[int, int], packed_format: CompressedFormat, *, parts: Mapping[str, TensorEntry]
    ) -> Columns:
        stored = parts["weight_shape"]
        if tuple(stored.values().tolist()) != shape:
            what = f"is {stored.values().tolist()}, and config.json asks for {list(shape)}"
            raise H1ExportError(f'{stored.file}: tensor "{stored.name}"', what, GET_MATCHING_FILES)
        entry = parts.get(GROUPS_PART)
        if entry is None or (entry.values() == -1).all():
            return super().column_groups(shape, packed_format, parts=parts)
        groups = packed_format.groups(shape[1])
        group_of = checked_groups(entry, groups)
        # The library divides the sorted columns into equal groups, whatever the numbers are.
        if len(set(np.bincount(group_of, minlength=groups).tolist())) > 1:
            raise H1ExportError(f'{entry.file}: tensor "{entry.name}"', "has groups of different sizes", DOWNLOAD_AGAIN)
        return group_of

    def unsigned_codes(self, start: int, stop: int) -> Unsigned:
        return self.unpacked(self.parts["weight_packed"].values(slice(start, stop)), self.shape[1])

    def unsigned_zeros(self, start: int, stop: int) -> Unsigned:
        rows = min(stop, self.shape[0]) - start
        if self.packed_format.sym:
            groups = self.packed_format.groups(self.shape[1])
            return np.full((rows, groups), self.packed_format.middle, np.uint8)
        first, end, begin = self.word_range(start, stop)
        words = self.parts[self.zeros_part].values(slice(first, end)).T
        return self.unpacked(words, stop - begin)[:, start - begin :].T

    def stored_scales(self, start: int, stop: int) -> Array:
        return self.parts["weight_scale"].floats(slice(start, stop))


class SignedZeros(CompressedMatrix):
    """A weight whose zero points are int8 [rows, groups], not packed; symmetric weights may have them too, as zeros."""

    @classmethod
    def expected(
        cls, shape: tuple[int, int], packed_format: CompressedFormat, *, where: str
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        zeros = ((shape[0], packed_format.groups(shape[1])), (SIGNED,))
        return super().expected(shape, packed_format, where=where) | {cls.zeros_part: zeros}

    def unsigned_zeros(self, start: int, stop: int) -> Unsigned:
        middle = self.packed_format.middle
        zeros = self.parts[self.zeros_part].values(slice(start, stop)).astype(np.int64) + middle
        if zeros.size and (zeros.min() < 0 or zeros.max() >= 2 * middle):
            what = f"holds zero points from {zeros.min() - middle} to {zeros.max() - middle}"
            raise self.error(self.zeros_part, what, f"{self.packed_format.bits} bits hold {-middle} to {middle - 1}")
        return zeros.astype(np.uint8)
