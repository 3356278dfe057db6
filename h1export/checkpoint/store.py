"""WeightStore: a checkpoint's tensors, checked against the architecture and read lazily, row block by row block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path

import numpy as np

from h1export.checkpoint.gptq_format import KEY, GptqLayout
from h1export.checkpoint.gptq_tensor import DIFFERENT, PARTS, PackedMatrix, part_name
from h1export.checkpoint.safetensors_header import FLOATS, TensorEntry, read_header
from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import EMBEDDING, LM_HEAD, projection_of, tensor_layout
from h1export.progress import SILENT, Progress

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class WeightStore:
    """The tensors of one checkpoint folder. Nothing is read until asked for, and then only the rows asked for.

    Attributes:
        layout: how the weights of a checkpoint that is quantised already are stored; None: all are floats.
        packed: those weights, by the name that the architecture has for each. They are read like the others, and then in floats.
    """

    def __init__(
        self,
        entries: dict[str, TensorEntry],
        progress: Progress,
        layout: GptqLayout | None = None,
        *,
        packed: Mapping[str, PackedMatrix] | None = None,
    ) -> None:
        self._entries = entries
        self._progress = progress
        self.layout = layout
        self.packed = packed or {}

    @classmethod
    def open(cls, folder: Path, config: FalconH1Config, progress: Progress = SILENT) -> WeightStore:
        """Open ``folder``'s safetensors file or shards and claim every tensor for ``spec``; ``progress`` sees the bytes read.

        Raises:
            H1ExportError: no safetensors, a damaged file, a tensor that is missing, unclaimed or mis-shaped, or a quantisation that
                cannot be read exactly.
        """
        layout = GptqLayout.load(folder)
        entries: dict[str, TensorEntry] = {}
        for file in _shards(folder):
            for entry in read_header(file):
                if entry.name in entries:
                    other = entries[entry.name].file.name
                    raise H1ExportError(
                        f'{file}: tensor "{entry.name}"', f"is in {other} too", "remove one of the two shards"
                    )
                entries[entry.name] = entry
        store = cls(entries, progress, layout)
        store._claim(folder, config)
        return store

    def _claim(self, folder: Path, config: FalconH1Config) -> None:
        shapes = tensor_layout(config)
        self.packed = self._claim_packed(folder, shapes)
        for name, shape in shapes.items():
            entry = self._entries.get(name)
            if name in self.packed:
                if entry is not None:
                    raise H1ExportError(
                        f'{entry.file}: tensor "{name}"', "is there in integers too", "remove one of the two"
                    )
                continue
            if entry is None:
                integers = part_name(name, PARTS[0]) in self._entries
                next_step = (
                    f"put what quantize_config.json says into config.json as {KEY}"
                    if integers
                    else "download the checkpoint again"
                )
                raise H1ExportError(
                    f'{folder}: tensor "{name}"', f"is missing{', but for its integers' if integers else ''}", next_step
                )
            if entry.shape != shape:
                what = f"has shape {list(entry.shape)}, and config.json asks for {list(shape)}"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, DIFFERENT)
            if entry.dtype not in FLOATS:
                what = f"has dtype {entry.dtype!r}"
                wanted = f"only {', '.join(FLOATS)} checkpoints can be exported"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, wanted)
        claimed = shapes.keys() | {part_name(name, part) for name in self.packed for part in PARTS}
        for name, entry in self._entries.items():
            if name not in claimed and not self._repeats(name):
                what = "has no place in the architecture that config.json describes"
                if name == LM_HEAD:
                    what = "is not the embedding, and config.json ties the two (tie_word_embeddings)"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, DIFFERENT)

    def _claim_packed(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PackedMatrix]:
        """Open the matrices that are stored in integers. The embedding is never packed: nothing is multiplied by it."""
        if self.layout is None:
            return {}
        products = {
            name: shape for name, shape in shapes.items() if projection_of(name) is not None and name != EMBEDDING
        }
        packed = [name for name in products if part_name(name, "qweight") in self._entries]
        if not packed:
            what = f"has {KEY}, and no tensor is in integers"
            raise H1ExportError(folder / CONFIG, what, "remove the key, or download the checkpoint again")
        return {name: PackedMatrix.open(name, products[name], self.layout, self._entries) for name in packed}

    def _repeats(self, name: str) -> bool:
        """Whether a tensor that has no place says nothing: the head of a tied model, or a bias of zeros that some GPTQ writers add."""
        if name == LM_HEAD:
            return EMBEDDING in self._entries and self._repeats_embedding()
        entry = self._entries[name]
        return (
            f"{name.removesuffix('bias')}weight" in self.packed
            and entry.dtype in FLOATS
            and not entry.floats(...).any()
        )

    def _repeats_embedding(self) -> bool:
        """A tied checkpoint may store its head all the same, as long as it is the embedding."""
        head = self._entries[LM_HEAD]
        embedding = self._entries[EMBEDDING]
        if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
            return False
        pairs = zip(self.blocks(LM_HEAD, 1 << 24), self.blocks(EMBEDDING, 1 << 24), strict=True)
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    def entry(self, name: str) -> TensorEntry:
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the architecture."""
        return self.packed[name].shape if name in self.packed else self._entries[name].shape

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(self._entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor as float32 (exact for every source dtype, and for integers times their scales).

        Raises:
            H1ExportError: scales or zero points of a packed tensor that mean no weight.
        """
        if name in self.packed:
            matrix = self.packed[name]
            self.advance(name, start, stop)
            return matrix.dense(start, stop)
        entry = self._entries[name]
        found = entry.floats(slice(start, stop))
        self._progress.advance(entry.nbytes * len(found) // max(1, entry.shape[0]))
        return found

    def order_name(self, name: str) -> str:
        """Names the order that a packed tensor's integers have their columns in; empty where that is the tensor's own."""
        return self.packed[name].order_name if name in self.packed else ""

    def advance(self, name: str, start: int, stop: int) -> None:
        """Tell that rows [start, stop) of a packed tensor were read."""
        matrix = self.packed[name]
        self._progress.advance(matrix.nbytes * (min(stop, matrix.shape[0]) - start) // matrix.shape[0])

    def row_ranges(self, names: Sequence[str], max_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """[start, stop) over the rows of tensors side by side: at most ``max_bytes`` of float32 together, in multiples of some rows."""
        rows = self.shape(names[0])[0]
        nbytes = sum(4 * prod(self.shape(name)) for name in names)
        step = max(1, max_bytes * rows // max(1, nbytes) // multiple) * multiple
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def blocks(self, name: str, max_bytes: int) -> Iterator[Array]:
        """The tensor in blocks of whole rows, each at most ``max_bytes`` of float32 (but at least one row)."""
        for start, stop in self.row_ranges([name], max_bytes):
            yield self.rows(name, start, stop)

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes, and what their integers mean: what a build was made from."""
        digest = hashlib.sha256(b"" if self.layout is None else json.dumps(asdict(self.layout)).encode())
        for name in sorted(self._entries):
            entry = self._entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            data = np.memmap(entry.file, np.uint8, mode="r", offset=entry.start, shape=(entry.nbytes,))
            for start in range(0, entry.nbytes, 1 << 24):
                digest.update(data[start : start + (1 << 24)].data)
                self._progress.advance(min(1 << 24, entry.nbytes - start))
        return digest.hexdigest()


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; shard names may not leave the folder."""
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            what = f"only pickle weights ({pickles[0]}), which can run code when opened"
            raise H1ExportError(folder, what, "convert the checkpoint to safetensors where you trust it")
        raise H1ExportError(folder, f"neither {SINGLE} nor {INDEX}", "give a checkpoint folder in Hugging Face layout")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise H1ExportError(index, f"not a safetensors index ({error!r})", "download it again") from None
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise H1ExportError(
                index, f"names the shard {name!r}", "a shard is a .safetensors file in the checkpoint's own folder"
            )
        if not _is_file(folder / name):
            raise H1ExportError(folder / name, "no such shard", f"{index.name} lists it; download it again")
    return [folder / name for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False
