"""Describe a checkpoint or an artifact as JSON values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.artifact.state_bytes import state_bytes
from h1export.checkpoint.packed_formats import ignored_packed_keys
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.tokenizer import TOKENIZER, load_tokenizer
from h1export.checkpoint.vocabulary import tokens_without_rows
from h1export.commands.load import read_options
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec
from h1export.model.falcon_h1.tensors import tensor_shapes

CONTEXTS = (0, 2048, 16384)  # tokens at which the bytes of a sequence's states are given: a checkpoint's in float32


def describe(folder: Path) -> dict[str, Any]:
    """Describe a finished artifact or a checkpoint.

    An artifact's hashes are checked; a checkpoint's tensors are matched to the architecture.

    Raises:
        H1ExportError: neither of the two, or damaged.
    """
    return _artifact(folder) if (folder / MANIFEST).is_file() else _checkpoint(folder)


def _checkpoint(folder: Path) -> dict[str, Any]:
    config = FalconH1Config.load(folder)
    store = WeightStore.open(folder, config)
    by_dtype: Counter[str] = Counter()
    for entry in store.entries:
        by_dtype[entry.dtype] += entry.nbytes
    return {
        "kind": "checkpoint",
        "tensors": len(store.entries),
        "parameters": sum(prod(shape) for shape in tensor_shapes(config).values()),
        "bytes_by_dtype": dict(by_dtype),
        "quantised": None
        if store.packed_format is None
        else {**dataclasses.asdict(store.packed_format), "tensors": len(store.packed)},
        "state_bytes": {str(past): StateSpec.of(config).nbytes(1, past) for past in CONTEXTS},
        "ignored_keys": list(FalconH1Config.ignored(folder)),
        "ignored_quantization_keys": list(ignored_packed_keys(folder)),
        "ignored_tensors": list(store.ignored),
        "tokens_without_rows": _tokens_without_rows(folder, config),
        "config": dataclasses.asdict(config),
    }


def _tokens_without_rows(folder: Path, config: FalconH1Config) -> dict[str, int]:
    """Return token -> id of those that `build` refuses; none where there is no tokenizer."""
    if not (folder / TOKENIZER).is_file():
        return {}
    return tokens_without_rows(load_tokenizer(folder), config.vocab_size)


def _artifact(folder: Path) -> dict[str, Any]:
    artifact = Artifact.open(folder)
    artifact.check_hashes()
    options = read_options(artifact)
    manifest = artifact.manifest
    return {
        "kind": "artifact",
        "target": manifest.target,
        "scheme": dict(manifest.scheme),
        "options": dataclasses.asdict(options),
        "toolchain": dict(manifest.toolchain),
        "source": manifest.source,
        **({"requirements": dict(manifest.requirements)} if manifest.requirements else {}),
        "files": {name: size for name, (_, size) in manifest.files.items()},
        "hashes": "verified",
        "quantised_tensors": sum(len(weight.parts) for weight in manifest.weights),
        "inputs": dict(manifest.inputs),
        "outputs": dict(manifest.outputs),
        "state_bytes": {str(past): state_bytes(manifest, artifact.config, past) for past in CONTEXTS},
        "config": dict(manifest.config),
    }
