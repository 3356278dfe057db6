"""Write the safetensors shards of a folder in Hugging Face layout, block by block, with the index of all tensors.

Source: the safetensors format specification (a little-endian u64 header size, a JSON header, then the data without
holes), and the layout of ``model.safetensors.index.json`` that transformers writes. The sizes of all tensors are known
before the first one is computed, so every header is written first, and a build that was killed continues after it.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.journal import Extent
from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import Block, WeightFile
from h1export.checkpoint.safetensors_header import DTYPES, TensorEntry, read_header
from h1export.checkpoint.shards import INDEX

SHARD_BYTES = 5_000_000_000  # of the tensors of a shard; a single larger weight has a shard of its own
ALIGN = 8  # of the first tensor in the file; larger items precede smaller ones, so all tensors are aligned
HEADER = "__header__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the folder: its name, its dtype as a key of ``DTYPES``, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stored:
    """Tensors that are computed together, such as the codes and scales of a weight.

    Attributes:
        specs: the tensors.
        blocks: gives the functions that compute them, each one array a tensor; see ``WeightFile.write``.
    """

    specs: tuple[TensorSpec, ...]
    blocks: Callable[[], Iterable[Block]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def write_shards(
    stage: Stage, tensors: Sequence[Stored], metadata: Mapping[str, str], *, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write every tensor into ``stage.folder`` and the index after them; return the name of the first shard.

    ``metadata`` is written into the header of every shard. In a dry stage files get their sizes, and nothing is
    computed.

    Raises:
        H1ExportError: what computing a tensor raises.
        OSError: the disk is full.
    """
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(stage, name, shard, metadata=metadata)
        weight_map |= {spec.name: name for stored in shard for spec in stored.specs}
    index = {"metadata": {"total_size": sum(stored.nbytes for stored in tensors)}, "weight_map": weight_map}
    (stage.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return names[0]


def _shards(tensors: Sequence[Stored], shard_bytes: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        if shards[-1] and size + stored.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += stored.nbytes
    return shards


def _write_shard(stage: Stage, name: str, shard: Sequence[Stored], *, metadata: Mapping[str, str]) -> None:
    specs = [spec for stored in shard for spec in stored.specs]
    specs.sort(key=lambda spec: -DTYPES[spec.dtype].itemsize)  # stable
    header = _header(specs, metadata)
    with WeightFile(stage, name) as file:
        place = file.reserve(HEADER, len(header), 1)
        extents: dict[str, Extent] = {spec.name: file.reserve(spec.name, spec.nbytes, 1) for spec in specs}
        file.write([place], [partial(_header_block, header)])
        for stored in shard:
            file.write([extents[spec.name] for spec in stored.specs], stored.blocks())


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        described[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return struct.pack("<Q", len(text)) + text


def _header_block(header: bytes) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    return (np.frombuffer(header, np.uint8),)


def stored_entries(artifact: Artifact) -> dict[str, TensorEntry]:
    """Return the tensors of the shards of ``artifact`` by name.

    Raises:
        H1ExportError: a damaged shard.
    """
    files = [artifact.folder / name for name in sorted(artifact.manifest.files) if is_shard(name)]
    return {entry.name: entry for file in files for entry in read_header(file)}


def is_shard(name: str) -> bool:
    """Return whether a file of an artifact is one that ``write_shards`` has written."""
    return name.startswith("model-") and name.endswith(".safetensors")


def dtype_counts(artifact: Artifact) -> dict[str, dict[str, int]]:
    """Return what ``Target.operations`` gives for a folder without a graph: its stored tensors by dtype."""
    return {"tensors": dict(Counter(entry.dtype for entry in stored_entries(artifact).values()))}
