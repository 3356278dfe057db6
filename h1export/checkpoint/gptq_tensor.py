"""PackedMatrix: a weight that the checkpoint stores in integers itself.

Of a product X the file has ``X.qweight`` int32 [columns * bits / 32, rows], ``X.qzeros`` int32 [groups, rows * bits / 32], ``X.scales``
[groups, rows] and ``X.g_idx`` int32 [columns]; the first code of a word lies in its lowest bits. Then

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n])   with g = g_idx[k]

Source: GPTQModel and AutoGPTQ. Format "gptq" takes 1 from each zero point as one subtraction of int32 words, so that a zero point of 0
borrows from its neighbour; one addition of words undoes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.checkpoint.gptq_format import KEY, GptqLayout
from h1export.checkpoint.safetensors_header import FLOATS, TensorEntry
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ORDER = "columns."  # how the names of orders begin
WORD = 32  # bits of what codes are packed into
DIFFERENT = "config and weights are of two different models"

Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.float16]
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Where the integers of one weight [rows, columns] lie.

    Attributes:
        name: of the weight that they stand for.
        layout: of its checkpoint.
        shape: of the weight.
        parts: PARTS -> where each lies.
        group_of: int64 [columns], g_idx.
        order: int64 [columns], the columns group by group, within a group as they come.
    """

    name: str
    layout: GptqLayout
    shape: tuple[int, int]
    parts: Mapping[str, TensorEntry]
    group_of: Columns
    order: Columns

    @classmethod
    def open(
        cls, name: str, shape: tuple[int, ...], layout: GptqLayout, entries: Mapping[str, TensorEntry]
    ) -> PackedMatrix:
        """Check the parts of weight ``name`` among a checkpoint's ``entries``, qweight for one; of their values only g_idx is read.

        Raises:
            H1ExportError: a part that is missing or has another shape or dtype, or a column in no group.
        """
        rows, columns = shape
        if (columns * layout.bits) % WORD or (rows * layout.bits) % WORD:
            what = f"of {rows} x {columns} does not fill words of {WORD} bits with codes of {layout.bits}"
            raise H1ExportError(f'{entries[part_name(name, PARTS[0])].file}: tensor "{name}"', what, DIFFERENT)
        parts = dict(_claimed(name, (rows, columns), layout, entries=entries))
        entry = parts["g_idx"]
        group_of = entry.values().astype(np.int64)
        groups = layout.groups(columns)
        if group_of.min() < 0 or group_of.max() >= groups:
            what = f"names groups from {group_of.min()} to {group_of.max()}, and there are {groups}"
            raise H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, "the file is damaged, download it again")
        return cls(
            name, layout, (rows, columns), parts=parts, group_of=group_of, order=np.argsort(group_of, kind="stable")
        )

    @property
    def order_name(self) -> str:
        """Names ``order`` by its content; empty where the columns lie so already."""
        if np.array_equal(self.order, np.arange(len(self.order))):
            return ""
        return f"{ORDER}{hashlib.sha256(self.order.astype('<i4').tobytes()).hexdigest()[:16]}"

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.parts.values())

    def codes(self, start: int, stop: int) -> Codes:
        """int8 [rows, columns] of rows [start, stop), less the middle of the codes."""
        words = self.parts["qweight"].values()[:, start:stop]
        return self._signed(self._unpacked(np.ascontiguousarray(words.T)))

    def zeros(self, start: int, stop: int) -> Codes:
        """int8 [rows, groups], less the middle of the codes.

        Raises:
            H1ExportError: they are not all in the middle, and config.json says so.
        """
        each = WORD // self.layout.bits
        first = start // each
        end = -(-stop // each)
        words = np.ascontiguousarray(self.parts["qzeros"].values()[:, first:end]).view(np.uint32)
        ones = (2**WORD - 1) // (2**self.layout.bits - 1)  # a 1 for each code of a word
        codes = self._unpacked(words + np.uint32(self.layout.zero_offset * ones))[
            :, start - first * each : stop - first * each
        ]
        zeros = self._signed(codes.T)
        if self.layout.sym and zeros.any():
            found = sorted({int(zero) + self.layout.middle for zero in np.unique(zeros)})
            what = f"has zero points {str(found)[:40]}, and {KEY} says sym, which is {self.layout.middle}"
            raise self._error("qzeros", what, "correct its keys sym and checkpoint_format")
        return zeros

    def scales(self, start: int, stop: int) -> Scales:
        """float16 [rows, groups].

        Raises:
            H1ExportError: scales that are not positive and finite, or that float16 does not have.
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
                f"of dtype {self.parts['scales'].dtype} holds values that float16 does not have",
                "convert it to F16",
            )
        return scales

    def dense(self, start: int, stop: int) -> Array:
        """Rows [start, stop) of the weight in float32, which holds every product of a code and a scale exactly."""
        codes = self.codes(start, stop)
        zeros = self.zeros(start, stop)
        scales = self.scales(start, stop)
        difference = codes.astype(np.float32) - zeros.astype(np.float32)[:, self.group_of]
        difference *= scales.astype(np.float32)[:, self.group_of]
        return difference

    def _unpacked(self, words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Words [n, words] -> codes [n, words * codes of a word]."""
        packed = words.view(np.uint8)
        if self.layout.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)

    def _signed(self, codes: npt.NDArray[np.uint8]) -> Codes:
        return np.ascontiguousarray(codes - np.uint8(self.layout.middle)).view(np.int8)  # wraps like two's complement

    def _error(self, part: str, what: str, next_step: str) -> H1ExportError:
        entry = self.parts[part]
        return H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, next_step)


def part_name(weight: str, part: str) -> str:
    """``X.weight`` -> ``X.qweight`` and so on."""
    return f"{weight.removesuffix('weight')}{part}"


def _claimed(
    weight: str, shape: tuple[int, int], layout: GptqLayout, *, entries: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    (rows, columns) = shape
    groups = layout.groups(shape[1])
    shapes = {
        "qweight": (columns * layout.bits // WORD, rows),
        "qzeros": (groups, rows * layout.bits // WORD),
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
            raise H1ExportError(where, what, DIFFERENT)
        wanted = FLOATS if part == "scales" else ("I32",)
        if entry.dtype not in wanted:
            raise H1ExportError(where, f"has dtype {entry.dtype!r}", f"expected {', '.join(wanted)}")
        yield part, entry
