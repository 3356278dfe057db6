"""Decides which safetensors files of a folder count, and which file holds a tensor, as transformers does.

``model.safetensors`` goes before the index. In an index, ``weight_map`` says which shard holds a tensor. transformers
reads every tensor of every listed shard, the last shard by name winning; where that gives other bytes than
``weight_map``, or where a single file and an index disagree, the checkpoint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from h1export.checkpoint.safetensors_header import TensorEntry, read_header
from h1export.checkpoint.tensor_names import is_extra
from h1export.errors import H1ExportError, listed
from h1export.forms import read_bytes
from h1export.model.config_reader import shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
KEEP_ONE = "delete the one that is out of date"

Entries = dict[str, TensorEntry]


def read_entries(folder: Path, used: Collection[str]) -> tuple[Entries, tuple[str, ...]]:
    """Return the tensors of a checkpoint by name, and the names of those that were ignored, sorted.

    Args:
        folder: the checkpoint's folder.
        used: names that the model uses; of tensors beside the index's, only these count.

    Raises:
        H1ExportError: no weights, a damaged file, or files that disagree about a tensor of ``used``.
    """
    single = folder / SINGLE
    if is_file(single):
        entries = {entry.name: entry for entry in read_header(single, is_extra)}
        if is_file(folder / INDEX):
            _refuse_other_bytes(entries, _stale(folder, used), used)
    elif (folder / INDEX).exists():
        entries = _indexed(folder, used)
    else:
        raise _no_weights(folder)
    ignored = tuple(sorted(name for name in entries if is_extra(name) and name not in used))
    return {name: entry for name, entry in entries.items() if name not in ignored}, ignored


def _stale(folder: Path, used: Collection[str]) -> Entries:
    """Return the tensors that the index beside a single file gives; none where it leads to no sound shards."""
    try:
        return _indexed(folder, used)
    except H1ExportError:
        return {}


def _indexed(folder: Path, used: Collection[str]) -> Entries:
    weight_map = _weight_map(folder / INDEX)
    by_file = {
        name: {entry.name: entry for entry in read_header(folder / name, is_extra)}
        for name in sorted(set(weight_map.values()))
    }
    found: Entries = {}
    for entries in by_file.values():
        _refuse_other_bytes(found, entries, used)
        found |= {name: entry for name, entry in entries.items() if name in weight_map or name in used}
    for name, file in weight_map.items():
        if name in by_file[file]:
            found[name] = by_file[file][name]
    return found


def _refuse_other_bytes(
    first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry], used: Collection[str]
) -> None:
    for name in sorted(first.keys() & second.keys()):
        one = first[name]
        two = second[name]
        if name in used and not _same(one, two):
            raise H1ExportError(
                f'{two.file}: tensor "{name}"', f"is in {one.file.name} too, with other values", KEEP_ONE
            )


def _same(one: TensorEntry, two: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return all(np.array_equal(first, second) for first, second in zip(one.blocks(), two.blocks(), strict=True))


def _no_weights(folder: Path) -> H1ExportError:
    if (folder / SINGLE).is_symlink():
        return H1ExportError(folder / SINGLE, "a link to a file that is not there", "download the checkpoint again")
    if (folder / SINGLE).exists():
        return H1ExportError(folder / SINGLE, "not a regular file", "give a checkpoint folder in Hugging Face layout")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        what = f"neither {SINGLE} nor {INDEX}, but {', '.join(others[:3])}"
        return H1ExportError(folder, what, f"rename the file to {SINGLE} if it holds the weights to export")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        what = f"only pickle weights ({pickles[0]}), which can run code when opened"
        return H1ExportError(folder, what, "convert the checkpoint to safetensors where you trust it")
    return H1ExportError(folder, f"neither {SINGLE} nor {INDEX}", "give a checkpoint folder in Hugging Face layout")


def _weight_map(index: Path) -> Mapping[str, str]:
    """Return tensor -> shard. A shard's name must not lead out of the folder."""
    try:
        weight_map = json.loads(read_bytes(index))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"not a safetensors index ({type(error).__name__})"
        raise H1ExportError(index, what, "download it again") from None
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise H1ExportError(
                index, f"names the shard {shown(name)}", "a shard is a .safetensors file in the checkpoint's own folder"
            )
        if not is_file(index.parent / name):
            raise H1ExportError(
                listed(index.parent, name), "no such shard", f"{index.name} lists it; download it again"
            )
    return dict(weight_map)


def is_file(path: Path) -> bool:
    """Return whether a path leads to a regular file, through links too."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no file system accepts the name
        return False
