"""Write the file: gguf's own writer makes the header, and the tensors follow by rows; a killed build goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from h1export.artifact.stage import Stage
from h1export.artifact.weight_file import WeightFile
from h1export.checkpoint.store import WeightStore
from h1export.quantize.source import QuantizedWeights
from h1export.targets.gguf import sdk
from h1export.targets.gguf.names import ARCHITECTURE
from h1export.targets.gguf.tensors import GgufTensor

MODEL = "model.gguf"


def write(
    stage: Stage,
    tensors: Sequence[GgufTensor],
    add_keys: Callable[[Any], None],
    *,
    store: WeightStore,
    integers: QuantizedWeights,
) -> None:
    """Write ``MODEL`` into ``stage``; ``add_keys`` adds the keys to gguf's writer."""
    head = _header(tensors, add_keys)
    align = sdk.gguf().GGUF_DEFAULT_ALIGNMENT
    with WeightFile(stage, MODEL) as file:
        file.write([file.reserve("header", len(head), 1)], [lambda: (np.frombuffer(head, np.uint8),)])
        for tensor in tensors:
            extent = file.reserve(tensor.name, tensor.nbytes, align)
            file.write([extent], tensor.row_blocks(store, integers))
        file.reserve("end", 0, align)  # the last tensor is padded, as all are


def _header(tensors: Sequence[GgufTensor], add_keys: Callable[[Any], None]) -> bytes:
    """Return what comes before the tensors: the keys, and the tensors' names, shapes, types and places."""
    gguf = sdk.gguf()
    with tempfile.TemporaryDirectory(prefix="h1export-gguf-") as folder:
        path = Path(folder) / MODEL
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        add_keys(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()
