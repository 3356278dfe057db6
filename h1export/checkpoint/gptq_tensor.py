"""PackedMatrix: a weight that a prequantized checkpoint stores as integer codes, scales and zero points.

For a linear layer X with a weight [rows, columns] = [out_features, in_features] the file holds

    X.qweight  int32 [columns * bits / 32, rows]     codes, packed along the columns
    X.qzeros   int32 [groups, rows * bits / 32]      zero points, packed along the rows
    X.scales   float [groups, rows]
    X.g_idx    int32 [columns]                       the group of each column

The first code of a 32-bit word is stored in its lowest bits. The weight is

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n])   with g = g_idx[k]

Source: GPTQModel and AutoGPTQ. Writers of checkpoint_format "gptq" subtract 1 from each zero point with one subtraction
of int32 words, so a zero point of 0 borrows from its neighbour. One addition of words restores all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.checkpoint.gptq_format import QUANTIZATION_CONFIG, GptqFormat
from h1export.checkpoint.safetensors_header import FLOATS, TensorEntry
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

PARTS = ("qweight", "qzeros", "scales", "g_idx")  # a weight is packed where the file has the first of them
ORDER = "columns."  # prefix of the names of column orders
WORD = 32  # bits of the words that codes are packed into
# The next step where config.json and a tensor contradict each other.
GET_MATCHING_FILES = "config.json and the weights belong to different models; download the checkpoint again"

Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float16]
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """One packed weight [rows, columns]: where its parts are stored, and which group each column belongs to.

    Attributes:
        name: name of the weight, which ends in ".weight".
        gptq_format: the storage format of the checkpoint.
        shape: [rows, columns] of the weight.
        parts: each of PARTS -> its entry in the safetensors file.
        group_of: int64 [columns], the group of each column (g_idx).
        order: int64 [columns], the columns sorted by group; columns of one group keep their order.
    """

    name: str
    gptq_format: GptqFormat
    shape: tuple[int, int]
    parts: Mapping[str, TensorEntry]
    group_of: Columns
    order: Columns

    @classmethod
    def open(
        cls, name: str, shape: tuple[int, ...], gptq_format: GptqFormat, *, entries: Mapping[str, TensorEntry]
    ) -> PackedMatrix:
        """Find and check the parts of weight ``name`` among a checkpoint's ``entries``; of values only g_idx is read.

        ``entries`` must hold the qweight of ``name``.

        Raises:
            H1ExportError: a part is missing or has another shape or dtype, or a column has a group that does not exist.
        """
        rows, columns = shape
        bits = gptq_format.bits
        if (columns * bits) % WORD or (rows * bits) % WORD:
            what = f"of {rows} x {columns} does not fill words of {WORD} bits with codes of {bits}"
            raise H1ExportError(f'{entries[part_name(name, PARTS[0])].file}: tensor "{name}"', what, GET_MATCHING_FILES)
        parts = dict(_claimed(name, (rows, columns), gptq_format, entries=entries))
        entry = parts["g_idx"]
        group_of = entry.values().astype(np.int64)
        groups = gptq_format.groups(columns)
        if group_of.min() < 0 or group_of.max() >= groups:
            what = f"names groups from {group_of.min()} to {group_of.max()}, and there are {groups}"
            raise H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, "the file is damaged, download it again")
        order = np.argsort(group_of, kind="stable")
        return cls(name, gptq_format, (rows, columns), parts=parts, group_of=group_of, order=order)

    @property
    def order_name(self) -> str:
        """A name for ``order`` that depends on its content; empty where the columns are in this order already."""
        if np.array_equal(self.order, np.arange(len(self.order))):
            return ""
        return f"{ORDER}{hashlib.sha256(self.order.astype('<i4').tobytes()).hexdigest()[:16]}"

    @property
    def nbytes(self) -> int:
        """Bytes of all parts as stored."""
        return sum(entry.nbytes for entry in self.parts.values())

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop) minus the middle of their range, int8 [rows, columns]."""
        words = self.parts["qweight"].values()[:, start:stop]
        return self._signed(self._unpacked(np.ascontiguousarray(words.T)))

    def zeros(self, start: int, stop: int) -> Codes:
        """Return the zero points of rows [start, stop) minus the middle of the codes' range, int8 [rows, groups].

        Raises:
            H1ExportError: config.json says ``sym``, and a zero point is not the middle of the range.
        """
        per_word = WORD // self.gptq_format.bits
        first = start // per_word
        end = -(-stop // per_word)
        words = np.ascontiguousarray(self.parts["qzeros"].values()[:, first:end]).view(np.uint32)
        ones = (2**WORD - 1) // (2**self.gptq_format.bits - 1)  # the value 1 in each code of a word
        unpacked = self._unpacked(words + np.uint32(self.gptq_format.zero_offset * ones))
        codes = unpacked[:, start - first * per_word : stop - first * per_word]
        zeros = self._signed(codes.T)
        if self.gptq_format.sym and zeros.any():
            found = sorted({int(zero) + self.gptq_format.middle for zero in np.unique(zeros)})
            middle = self.gptq_format.middle
            what = f"has zero points {str(found)[:40]}, and {QUANTIZATION_CONFIG} says sym, which is {middle}"
            raise self._error("qzeros", what, "correct its keys sym and checkpoint_format")
        return zeros

    def scales(self, start: int, stop: int) -> Scales:
        """Return the scales of rows [start, stop), float16 [rows, groups].

        Raises:
            H1ExportError: a scale is not positive and finite, or float16 cannot hold it exactly.
        """
        stored = self.parts["scales"].floats((slice(None), slice(start, stop))).T
        if not (np.isfinite(stored).all() and (stored > 0).all()):
            raise self._error(
                "scales", "holds scales that are not positive and finite", "the file is damaged, download it again"
            )
        scales: Scales = np.clip(stored, 0, np.finfo(np.float16).max).astype(np.float16)
        if not np.array_equal(scales.astype(np.float32), stored):
            raise self._error(
                "scales",
                f"of dtype {self.parts['scales'].dtype} holds values that float16 cannot hold exactly",
                "convert it to F16",
            )
        return scales

    def dense(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the weight, float32 [rows, columns].

        The values are exact: float32 can hold every product of an integer code and a float16 scale.
        """
        codes = self.codes(start, stop)
        zeros = self.zeros(start, stop)
        scales = self.scales(start, stop)
        difference = codes.astype(np.float32) - zeros.astype(np.float32)[:, self.group_of]
        difference *= scales.astype(np.float32)[:, self.group_of]
        return difference

    def _unpacked(self, words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Unpack words [n, words] to codes [n, words * codes per word]."""
        packed = words.view(np.uint8)
        if self.gptq_format.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)

    def _signed(self, codes: npt.NDArray[np.uint8]) -> Codes:
        # The unsigned difference wraps around, which is its two's complement.
        return np.ascontiguousarray(codes - np.uint8(self.gptq_format.middle)).view(np.int8)

    def _error(self, part: str, what: str, next_step: str) -> H1ExportError:
        entry = self.parts[part]
        return H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, next_step)


def part_name(weight: str, part: str) -> str:
    """Return the name of a weight's part: ``X.weight`` and "qweight" give ``X.qweight``."""
    return f"{weight.removesuffix('weight')}{part}"


def _claimed(
    weight: str, shape: tuple[int, int], gptq_format: GptqFormat, *, entries: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield each part with its entry, after checking its shape and dtype."""
    rows, columns = shape
    bits = gptq_format.bits
    groups = gptq_format.groups(columns)
    shapes = {
        "qweight": (columns * bits // WORD, rows),
        "qzeros": (groups, rows * bits // WORD),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for part in PARTS:
        name = part_name(weight, part)
        entry = entries.get(name)
        if entry is None:
            beside = entries[part_name(weight, PARTS[0])].file
            raise H1ExportError(f'{beside}: tensor "{name}"', "is missing", "download the checkpoint again")
        where = f'{entry.file}: tensor "{name}"'
        if entry.shape != shapes[part]:
            what = f"has shape {list(entry.shape)}, and config.json asks for {list(shapes[part])}"
            raise H1ExportError(where, what, GET_MATCHING_FILES)
        wanted = FLOATS if part == "scales" else ("I32",)
        if entry.dtype not in wanted:
            raise H1ExportError(where, f"has dtype {entry.dtype!r}", f"expected {', '.join(wanted)}")
        yield part, entry
