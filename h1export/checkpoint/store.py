"""WeightStore: a checkpoint's tensors, checked against the architecture and read lazily, row block by row block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from h1export.checkpoint.lora import LoraAdapter, check_no_other, open_adapters
from h1export.checkpoint.packed_format import (
    GET_MATCHING_FILES,
    QUANTIZATION_CONFIG,
    PackedFormat,
    PackedMatrix,
    part_name,
)
from h1export.checkpoint.packed_formats import (
    ALL_PARTS,
    is_packed,
    load_format,
    open_matrix,
    packed_somehow,
    part_names,
)
from h1export.checkpoint.safetensors_header import FLOATS, TensorEntry
from h1export.checkpoint.shards import read_entries
from h1export.checkpoint.tensor_names import missing, second_copy
from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, projection_of, tensor_shapes
from h1export.progress import SILENT, Progress


class WeightStore:
    """The tensors of one checkpoint folder. Rows are read from the files only when they are requested.

    Attributes:
        packed_format: the storage format of a prequantized checkpoint; None where all weights are floats.
        packed: the prequantized weights, by the architecture's name of each. ``rows`` reads them like the others, as
            floats.
        adapters: what ``rows`` adds to the weights of the files, in order.
        ignored: names of tensors of the files that are no part of the model: computed buffers, and other heads.
    """

    def __init__(
        self,
        entries: dict[str, TensorEntry],
        progress: Progress,
        packed_format: PackedFormat | None = None,
        *,
        packed: Mapping[str, PackedMatrix[Any]] | None = None,
        adapters: tuple[LoraAdapter, ...] = (),
        ignored: tuple[str, ...] = (),
    ) -> None:
        self._entries = entries
        self._progress = progress
        self.packed_format = packed_format
        self.packed = packed or {}
        self.adapters = adapters
        self.ignored = ignored

    @classmethod
    def open(
        cls,
        folder: Path,
        config: FalconH1Config,
        progress: Progress = SILENT,
        *,
        adapters: Sequence[Path] = (),
    ) -> WeightStore:
        """Open the safetensors file or shards of ``folder`` and check their tensors against ``config``.

        ``progress`` receives the bytes that are read from then on. ``adapters`` are folders of LoRA adapters, which
        are merged into the rows in this order.

        Raises:
            H1ExportError: there is no safetensors file or a file is damaged, a tensor is missing, unknown or has
                another shape, or the checkpoint has a quantisation that cannot be read exactly.
        """
        check_no_other(folder, adapters)
        packed_format = load_format(folder)
        entries, ignored = read_entries(folder, _used(config))
        store = cls(entries, progress, packed_format, ignored=ignored)
        store._claim(folder, config)
        store.adapters = open_adapters(adapters, store, tensor_shapes(config))
        return store

    def _claim(self, folder: Path, config: FalconH1Config) -> None:
        """Find the tensor of every weight of the architecture, and refuse tensors that are left over."""
        shapes = tensor_shapes(config)
        self.packed = self._claim_packed(folder, shapes)
        for name, shape in shapes.items():
            entry = self._entries.get(name)
            if name in self.packed:
                if entry is not None:
                    raise H1ExportError(
                        f'{entry.file}: tensor "{name}"', "is stored in integers too", "remove one of the two"
                    )
                continue
            if entry is None:
                if packed_somehow(name, self._entries):
                    raise H1ExportError(
                        f'{folder}: tensor "{name}"',
                        "is stored in integers, and config.json does not say how",
                        f"copy the content of quantize_config.json into config.json as {QUANTIZATION_CONFIG}",
                    )
                raise missing(folder, name, {*self._entries, *self.ignored})
            if entry.shape != shape:
                what = f"has shape {list(entry.shape)}, and config.json asks for {list(shape)}"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, GET_MATCHING_FILES)
            if entry.dtype not in FLOATS:
                what = f"has dtype {entry.dtype!r}"
                wanted = f"only {', '.join(FLOATS)} checkpoints can be exported"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, wanted)
        claimed = shapes.keys() | {part for matrix in self.packed.values() for part in part_names(matrix)}
        for name, entry in self._entries.items():
            if name not in claimed and not self._repeats(name):
                if (error := second_copy(entry.file, name, shapes)) is not None:
                    raise error
                what = "has no place in the architecture that config.json describes"
                if name == LM_HEAD:
                    what = "is not the embedding, and config.json ties the two (tie_word_embeddings)"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, GET_MATCHING_FILES)

    def _claim_packed(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PackedMatrix[Any]]:
        """Return the packed weights. Only weights of linear layers may be packed; an embedding is a table of floats."""
        if self.packed_format is None:
            return {}
        products = {
            name: shape for name, shape in shapes.items() if projection_of(name) is not None and name != EMBEDDING
        }
        packed = [name for name in products if is_packed(name, self.packed_format, self._entries)]
        if not packed:
            what = f"has {QUANTIZATION_CONFIG}, and no tensor is stored in integers"
            raise H1ExportError(folder / CONFIG, what, "remove the key, or download the checkpoint again")
        return {name: open_matrix(name, products[name], self.packed_format, entries=self._entries) for name in packed}

    def _repeats(self, name: str) -> bool:
        """Return whether a tensor outside the architecture is redundant.

        The head of a tied model repeats the embedding, and some GPTQ writers add a bias of zeros to every packed
        weight.
        """
        if name == LM_HEAD:
            return EMBEDDING in self._entries and self._repeats_embedding()
        entry = self._entries[name]
        return (
            f"{name.removesuffix('bias')}weight" in self.packed and entry.dtype in FLOATS and not entry.floats().any()
        )

    def _repeats_embedding(self) -> bool:
        """Return whether the head that a tied checkpoint stores equals its embedding."""
        head = self._entries[LM_HEAD]
        embedding = self._entries[EMBEDDING]
        if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
            return False
        pairs = zip(self.blocks(LM_HEAD, 1 << 24), self.blocks(EMBEDDING, 1 << 24), strict=True)
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of a tensor of the files; a packed weight has no entry under its own name."""
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the architecture, packed or not."""
        return self.packed[name].shape if name in self.packed else self._entries[name].shape

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The entries of all tensors of the files, parts of packed weights included."""
        return tuple(self._entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Return rows [start, stop) of a tensor as float32, exact for every stored dtype and for packed weights.

        Raises:
            H1ExportError: the scales or zero points of a packed weight are invalid.
        """
        if name in self.packed:
            matrix = self.packed[name]
            self.advance(name, start, stop)
            return matrix.dense(start, stop)
        entry = self._entries[name]
        found = entry.floats(slice(start, stop))
        self._progress.advance(entry.nbytes * len(found) // max(1, entry.shape[0]))
        for adapter in self.adapters:
            found = adapter.applied(name, found, start)
        return found

    def order_name(self, name: str) -> str:
        """Return the name of the column order of a packed weight's integers; empty for the weight's own order."""
        return self.packed[name].order_name if name in self.packed else ""

    def advance(self, name: str, start: int, stop: int) -> None:
        """Report to ``progress`` that rows [start, stop) of a packed weight were read."""
        matrix = self.packed[name]
        self._progress.advance(matrix.nbytes * (min(stop, matrix.shape[0]) - start) // matrix.shape[0])

    def row_ranges(self, names: Sequence[str], max_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Yield [start, stop) over the common rows of tensors.

        The rows of all tensors together take at most ``max_bytes`` bytes of float32. Their number is a multiple of
        ``multiple``, and at least ``multiple``, except in the last range.
        """
        rows = self.shape(names[0])[0]
        nbytes = sum(4 * prod(self.shape(name)) for name in names)
        step = max(1, max_bytes * rows // max(1, nbytes) // multiple) * multiple
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def blocks(self, name: str, max_bytes: int) -> Iterator[Array]:
        """Yield the tensor as float32 in blocks of whole rows, each at most ``max_bytes`` bytes or a single row."""
        for start, stop in self.row_ranges([name], max_bytes):
            yield self.rows(name, start, stop)

    def fingerprint(self) -> str:
        """Return the sha256 over the storage format and over every tensor's name, dtype, shape and bytes.

        A manifest records it as the source of a build.
        """
        digest = hashlib.sha256(b"" if self.packed_format is None else json.dumps(asdict(self.packed_format)).encode())
        for name in sorted(self._entries):
            entry = self._entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            for block in entry.blocks():
                digest.update(block.data)
                self._progress.advance(len(block))
        return digest.hexdigest()


def weight_files(folder: Path, config: FalconH1Config) -> tuple[Path, ...]:
    """Return the safetensors files that hold the tensors of a checkpoint, sorted by name.

    Raises:
        H1ExportError: there are none, or one is damaged.
    """
    entries, _ = read_entries(folder, _used(config))
    return tuple(sorted({entry.file for entry in entries.values()}))


def _used(config: FalconH1Config) -> frozenset[str]:
    """Return the names of all tensors that the model may use, stored as floats or as integers."""
    names = tensor_shapes(config).keys()
    return frozenset({*names, *(part_name(name, part) for name in names for part in ALL_PARTS)})
