"""WeightStore: a checkpoint's tensors, checked against the architecture and read lazily, row block by row block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np

from h1export.core.progress import SILENT, Progress
from h1export.core.spec import HybridSpec
from h1export.core.state import Array
from h1export.core.weights.header import DTYPES, TensorEntry, read_header
from h1export.core.weights.layout import EMBEDDING, LM_HEAD, tensor_layout
from h1export.errors import H1ExportError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class WeightStore:
    """The tensors of one checkpoint folder. Nothing is read until asked for, and then only the rows asked for."""

    def __init__(self, entries: dict[str, TensorEntry], progress: Progress) -> None:
        self._entries, self._progress = entries, progress

    @classmethod
    def open(cls, folder: Path, spec: HybridSpec, progress: Progress = SILENT) -> WeightStore:
        """Open ``folder``'s safetensors file or shards and claim every tensor for ``spec``; ``progress`` sees the bytes read.

        Raises:
            H1ExportError: no safetensors, a damaged file, or a tensor that is missing, unclaimed or mis-shaped.
        """
        entries: dict[str, TensorEntry] = {}
        for file in _shards(folder):
            for entry in read_header(file):
                if entry.name in entries:
                    other = entries[entry.name].file.name
                    raise H1ExportError(f'{file}: tensor "{entry.name}"', f"is in {other} too", "remove one of the two shards")
                entries[entry.name] = entry
        store = cls(entries, progress)
        store._claim(folder, spec)
        return store

    def _claim(self, folder: Path, spec: HybridSpec) -> None:
        layout = tensor_layout(spec)
        for name, shape in layout.items():
            entry = self._entries.get(name)
            if entry is None:
                raise H1ExportError(f'{folder}: tensor "{name}"', "is missing", "download the checkpoint again")
            if entry.shape != shape:
                what = f"has shape {list(entry.shape)}, and config.json asks for {list(shape)}"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, "config and weights are of two different models")
        for name, entry in self._entries.items():
            if name not in layout and not (name == LM_HEAD and self._repeats_embedding()):
                what = "has no place in the architecture that config.json describes"
                if name == LM_HEAD:
                    what = "is not the embedding, and config.json ties the two (tie_word_embeddings)"
                raise H1ExportError(f'{entry.file}: tensor "{name}"', what, "config and weights are of two different models")

    def _repeats_embedding(self) -> bool:
        """A tied checkpoint may store its head all the same, as long as it is the embedding."""
        head, embedding = self._entries[LM_HEAD], self._entries[EMBEDDING]
        if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
            return False
        pairs = zip(self.blocks(LM_HEAD, 1 << 24), self.blocks(EMBEDDING, 1 << 24), strict=True)
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    def entry(self, name: str) -> TensorEntry:
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(self._entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor as float32 (exact for every source dtype)."""
        entry = self._entries[name]
        dtype = DTYPES[entry.dtype]
        stored = np.memmap(entry.file, dtype, mode="r", offset=entry.start, shape=entry.shape)[start:stop]
        self._progress.advance(stored.nbytes)
        if entry.dtype == "BF16":
            return (np.asarray(stored).astype(np.uint32) << 16).view(np.float32)
        return np.asarray(stored).astype(np.float32)

    def row_ranges(self, names: Sequence[str], max_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """[start, stop) over the rows of tensors side by side: at most ``max_bytes`` of float32 together, in multiples of some rows."""
        rows = self._entries[names[0]].shape[0]
        nbytes = sum(4 * prod(self._entries[name].shape) for name in names)
        step = max(1, max_bytes * rows // max(1, nbytes) // multiple) * multiple
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def blocks(self, name: str, max_bytes: int) -> Iterator[Array]:
        """The tensor in blocks of whole rows, each at most ``max_bytes`` of float32 (but at least one row)."""
        for start, stop in self.row_ranges([name], max_bytes):
            yield self.rows(name, start, stop)

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes: what a build was made from."""
        digest = hashlib.sha256()
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
            raise H1ExportError(index, f"names the shard {name!r}", "a shard is a .safetensors file in the checkpoint's own folder")
        if not _is_file(folder / name):
            raise H1ExportError(folder / name, "no such shard", f"{index.name} lists it; download it again")
    return [folder / name for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False
