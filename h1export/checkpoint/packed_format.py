"""PackedFormat and PackedMatrix: what every prequantized format has in common, whatever its layout in the file is.

A format is two small classes: a PackedFormat, read from ``quantization_config`` in config.json, and a PackedMatrix,
which reads one weight. The registry in ``packed_formats.py`` lists them.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from h1export.checkpoint.safetensors_header import FLOATS, TensorEntry
from h1export.errors import H1ExportError
from h1export.model.config_reader import ConfigReader
from h1export.model.falcon_h1.states import Array

QUANTIZATION_CONFIG = "quantization_config"  # the key of config.json
UNQUANTISED = "give the unquantised checkpoint, or one in GPTQ, AWQ or compressed-tensors format with 4 or 8 bits"
# The next step where config.json and a tensor contradict each other.
GET_MATCHING_FILES = "config.json and the weights belong to different models; download the checkpoint again"
DOWNLOAD_AGAIN = "the file is damaged, download it again"
ORDER = "columns."  # prefix of the names of column orders
WORD = 32  # bits of the words that codes are packed into

# Keys by whose name it is plain that they describe a file and not its integers, whatever the writer.
INFORMATION = re.compile(r"(.*_)?(version|provider|date|author|license|description|comment|url|uri)")

Codes = npt.NDArray[np.int8]
Unsigned = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedFormat:
    """The storage format that all packed tensors of a checkpoint share.

    Attributes:
        bits: bits of a code, 4 or 8.
        group_size: columns that share a scale and a zero point; -1: all columns of a row.
        sym: whether every zero point is the middle of the range of codes.
        used_keys: of the class: the keys of quantization_config that are read.
    """

    bits: int
    group_size: int
    sym: bool

    used_keys: ClassVar[frozenset[str]]

    @classmethod
    def ignored_keys(cls, config: Mapping[str, Any]) -> list[str]:
        """Return the keys of a quantization_config that was read and that decide nothing."""
        return ignored_in(config, cls.used_keys)

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes: 8 for 4 bits, 128 for 8 bits."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Return the number of groups in a row of ``columns`` columns."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def words(self, codes: int) -> int:
        """Return how many words of 32 bits hold ``codes`` codes; the last one may have a rest that means nothing."""
        return -(-codes * self.bits // WORD)


def read_bits(read: ConfigReader, key: str) -> int:
    """Return the bits of a code. Raises H1ExportError unless they are 4 or 8."""
    bits = read.size(key, 0, limit=32)
    if bits not in (4, 8):
        raise read.error(key, f"is {bits}, and runtimes have kernels for 4 and 8", UNQUANTISED)
    return bits


def read_group_size(read: ConfigReader, key: str) -> int:
    """Return the group size, or -1 for a scale a row."""
    return -1 if read.config.get(key, 128) == -1 else read.size(key, 128)


def check_keys(read: ConfigReader, used: frozenset[str], ignored: Mapping[str, str]) -> None:
    """Refuse every key that might change what the integers mean.

    A key passes that is used, that is known to be ``ignored`` for a reason, whose name says that it is information, or
    whose value is null, an empty list or an empty object.

    Raises:
        H1ExportError: any other key.
    """
    for key, value in read.config.items():
        if key in used or key in ignored or says_nothing(value):
            continue
        if INFORMATION.fullmatch(key) and isinstance(value, (str, int, float)):
            continue
        raise read.error(
            str(key)[:80],
            "is unknown",
            "remove it if it does not change the weights, or report it so that it can be supported",
        )


def says_nothing(value: object) -> bool:
    """Return whether a value of quantization_config is null, an empty list or an empty object."""
    return value is None or value in ([], {})


def ignored_in(config: Mapping[str, Any], used: frozenset[str]) -> list[str]:
    """Return the keys of ``config`` that say something and are not ``used``."""
    return [key for key, value in config.items() if key not in used and not says_nothing(value)]


def check_dynamic(read: ConfigReader) -> None:
    """Refuse rules that give tensors bits or groups of their own.

    Rules of exclusion ("-:...") need no check, because the file shows which tensors are packed.
    """
    rules = read.config.get("dynamic")
    if rules and not (isinstance(rules, dict) and all(str(rule).startswith("-:") for rule in rules)):
        raise read.error(
            "dynamic", "gives tensors bits or groups of their own", "give a checkpoint with the same for all"
        )


FormatT = TypeVar("FormatT", bound=PackedFormat)


@dataclass(frozen=True, eq=False)
class PackedMatrix(ABC, Generic[FormatT]):
    """One packed weight [rows, columns]: where its parts are stored, and which group each column belongs to.

    weight[n, k] = scales[n, g] * (code[n, k] - zero[n, g])   with g = group_of[k]

    Attributes:
        name: name of the weight, which ends in ".weight".
        packed_format: the storage format of the checkpoint.
        shape: [rows, columns] of the weight.
        parts: name of a part -> its entry in the safetensors file.
        group_of: int64 [columns], the group of each column.
        order: int64 [columns], the columns sorted by group; columns of one group keep their order.
        all_parts: of the class: every part that a weight can have.
        main_part: of the class: a weight is packed where the file has this part of it.
        scales_part: of the class: the part that holds the scales.
        zeros_part: of the class: the part that holds the zero points.
    """

    name: str
    packed_format: FormatT
    shape: tuple[int, int]
    parts: Mapping[str, TensorEntry]
    group_of: Columns
    order: Columns

    all_parts: ClassVar[tuple[str, ...]]
    main_part: ClassVar[str]
    scales_part: ClassVar[str]
    zeros_part: ClassVar[str]

    @classmethod
    def open(
        cls, name: str, shape: tuple[int, ...], packed_format: FormatT, *, entries: Mapping[str, TensorEntry]
    ) -> PackedMatrix[FormatT]:
        """Find and check the parts of weight ``name`` among a checkpoint's ``entries``; of values only groups are read.

        ``entries`` must hold the main part of ``name``.

        Raises:
            H1ExportError: a part is missing or has another shape or dtype, or a column has a group that does not exist.
        """
        rows, columns = shape
        main = entries[part_name(name, cls.main_part)]
        expected = cls.expected((rows, columns), packed_format, where=f'{main.file}: tensor "{name}"')
        parts = dict(_claimed(name, expected, optional=cls.optional_parts(), main=main, entries=entries))
        group_of = cls.column_groups((rows, columns), packed_format, parts=parts)
        order = np.argsort(group_of, kind="stable")
        return cls(name, packed_format, (rows, columns), parts=parts, group_of=group_of, order=order)

    @classmethod
    @abstractmethod
    def expected(
        cls, shape: tuple[int, int], packed_format: FormatT, *, where: str
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Return part -> (shape, dtypes) of a weight of ``shape``.

        Raises:
            H1ExportError: the format cannot store such a weight; the error names ``where``.
        """

    @classmethod
    def optional_parts(cls) -> frozenset[str]:
        """Return the parts of ``expected`` that a file may lack."""
        return frozenset()

    @classmethod
    def column_groups(
        cls, shape: tuple[int, int], packed_format: FormatT, *, parts: Mapping[str, TensorEntry]
    ) -> Columns:
        """Return the group of each column, int64 [columns]: neighbours, where no part says otherwise."""
        columns = shape[1]
        size = columns if packed_format.group_size == -1 else packed_format.group_size
        return np.arange(columns) // size

    @abstractmethod
    def unsigned_codes(self, start: int, stop: int) -> Unsigned:
        """Return the codes of rows [start, stop) as stored, uint8 [rows, columns]."""

    @abstractmethod
    def unsigned_zeros(self, start: int, stop: int) -> Unsigned:
        """Return the zero points of rows [start, stop) in the range of the codes, uint8 [rows, groups]."""

    @abstractmethod
    def stored_scales(self, start: int, stop: int) -> Array:
        """Return the scales of rows [start, stop), float32 [rows, groups]."""

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
        return self._signed(self.unsigned_codes(start, stop))

    def zeros(self, start: int, stop: int) -> Codes:
        """Return the zero points of rows [start, stop) minus the middle of the codes' range, int8 [rows, groups].

        Raises:
            H1ExportError: config.json says that codes are symmetric, and a zero point is not the middle of the range.
        """
        zeros = self._signed(self.unsigned_zeros(start, stop))
        middle = self.packed_format.middle
        if self.packed_format.sym and zeros.any():
            found = sorted({int(zero) + middle for zero in np.unique(zeros)})
            what = f"has zero points {str(found)[:40]}, and {QUANTIZATION_CONFIG} says {self.says_symmetric}"
            raise self.error(self.zeros_part, f"{what}, which is {middle}", self.correct_zeros)
        return zeros

    says_symmetric: ClassVar[str] = "sym"
    correct_zeros: ClassVar[str] = "correct its keys sym and checkpoint_format"

    def scales(self, start: int, stop: int) -> Scales:
        """Return the scales of rows [start, stop), float16 [rows, groups].

        Raises:
            H1ExportError: a scale is not positive and finite, or float16 cannot hold it exactly.
        """
        stored = self.stored_scales(start, stop)
        if not (np.isfinite(stored).all() and (stored > 0).all()):
            raise self.error(self.scales_part, "holds scales that are not positive and finite", DOWNLOAD_AGAIN)
        scales: Scales = np.clip(stored, 0, np.finfo(np.float16).max).astype(np.float16)
        if not np.array_equal(scales.astype(np.float32), stored):
            dtype = self.parts[self.scales_part].dtype
            raise self.error(
                self.scales_part,
                f"of dtype {dtype} holds values that float16 cannot hold exactly",
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

    def unpacked(self, words: npt.NDArray[Any], count: int) -> Unsigned:
        """Unpack the first ``count`` codes of each row of ``words`` [n, words]; a word's lowest bits come first."""
        packed = np.ascontiguousarray(words).view(np.uint8)
        if self.packed_format.bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
        return packed[:, :count]

    def word_range(self, start: int, stop: int) -> tuple[int, int, int]:
        """Return the words [first, end) that hold codes [start, stop) of a run, and the first code in them."""
        per_word = WORD // self.packed_format.bits
        first = start // per_word
        return first, -(-stop // per_word), first * per_word

    def error(self, part: str, what: str, next_step: str) -> H1ExportError:
        """Return an error that names a part of this weight and its file."""
        entry = self.parts[part]
        return H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, next_step)

    def _signed(self, codes: Unsigned) -> Codes:
        # The unsigned difference wraps around, which is its two's complement.
        return np.ascontiguousarray(codes - np.uint8(self.packed_format.middle)).view(np.int8)


def part_name(weight: str, part: str) -> str:
    """Return the name of a weight's part: ``X.weight`` and "qweight" give ``X.qweight``."""
    return f"{weight.removesuffix('weight')}{part}"


def checked_groups(entry: TensorEntry, groups: int) -> Columns:
    """Return the group of each column that ``entry`` stores.

    Raises:
        H1ExportError: a column has a group that does not exist.
    """
    group_of = entry.values().astype(np.int64)
    if group_of.size and (group_of.min() < 0 or group_of.max() >= groups):
        what = f"names groups from {group_of.min()} to {group_of.max()}, and there are {groups}"
        raise H1ExportError(f'{entry.file}: tensor "{entry.name}"', what, DOWNLOAD_AGAIN)
    return group_of


def _claimed(
    weight: str,
    expected: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
    *,
    optional: frozenset[str],
    main: TensorEntry,
    entries: Mapping[str, TensorEntry],
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield each part with its entry, after checking its shape and dtype."""
    for part, (shape, dtypes) in expected.items():
        name = part_name(weight, part)
        entry = entries.get(name)
        if entry is None:
            if part in optional:
                continue
            raise H1ExportError(f'{main.file}: tensor "{name}"', "is missing", "download the checkpoint again")
        where = f'{entry.file}: tensor "{name}"'
        if entry.shape != shape:
            what = f"has shape {list(entry.shape)}, and config.json asks for {list(shape)}"
            raise H1ExportError(where, what, GET_MATCHING_FILES)
        if entry.dtype not in dtypes:
            raise H1ExportError(where, f"has dtype {entry.dtype!r}", f"expected {', '.join(dtypes)}")
        yield part, entry


INTEGERS = ("I32",)
SCALE_DTYPES = FLOATS
