"""The integers that an ONNX artifact stores, read back from its external data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.targets.onnx import graph_messages as messages
from h1export.targets.onnx.graph_file import AGAIN, read_graph

DTYPES = {
    messages.FLOAT: np.dtype(np.float32),
    messages.UINT8: np.dtype(np.uint8),
    messages.INT8: np.dtype(np.int8),
    messages.INT32: np.dtype(np.int32),
    messages.INT64: np.dtype(np.int64),
    messages.FLOAT16: np.dtype(np.float16),
    messages.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# An initializer's name -> the key of its array; None: it is not read.
Key = Callable[[str], str | None]
# (entry of the manifest, key -> array, checkpoint tensor -> its number of columns) -> the integers of each tensor.
ReadStored = Callable[[StoredWeight, Mapping[str, Any], Callable[[str], int]], Iterator[tuple[str, QuantizedTensor]]]


class StoredWeights(Mapping[str, Array]):
    """Checkpoint tensor -> its stored integers, dequantised without µP when they are read, float32 [rows, columns].

    ``read_stored`` gets the arrays of ``model`` by ``key``.
    """

    def __init__(self, artifact: Artifact, model: str, key: Key, *, read_stored: ReadStored) -> None:
        self._read_stored = read_stored
        self._model = artifact.folder / model
        self._columns = {name: shape[-1] for name, shape in tensor_shapes(artifact.config).items()}
        self._tensors = external_arrays(artifact, model, key)
        self._weights = {part.tensor: weight for weight in artifact.manifest.weights for part in weight.parts}
        self._orders = {part.tensor: part.order for weight in artifact.manifest.weights for part in weight.parts}

    def quantized(self, name: str) -> QuantizedTensor:
        """Return the integers of checkpoint tensor ``name``, which are the same on every target."""
        try:
            return dict(self._read_stored(self._weights[name], self._tensors, self._columns.__getitem__))[name]
        except (LookupError, ValueError, TypeError) as error:
            what = f'holds tensor "{name}" in another form than the manifest says ({type(error).__name__})'
            raise H1ExportError(self._model, what, AGAIN) from None

    def __getitem__(self, name: str) -> Array:
        order = self._orders[name]
        return self.quantized(name).unfolded(self._tensors[order] if order else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def external_arrays(artifact: Artifact, model: str, key: Key) -> dict[str, Any]:
    """Return memory-mapped arrays of the initializers of ``model``, by ``key``; int4 is flat bytes.

    Raises:
        H1ExportError: data outside the artifact's files, or of a type that DTYPES lacks.
    """
    arrays: dict[str, Any] = {}
    inside = model[: model.rfind("/") + 1]
    for tensor in read_graph(artifact.folder / model, artifact.manifest.files, inside).graph.initializer:
        kept = key(tensor.name)
        if tensor.data_location != messages.EXTERNAL or kept is None:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location, offset = inside + entries["location"], int(entries.get("offset", 0))
        shape = tuple(tensor.dims)
        if tensor.data_type == messages.INT4:  # two to a byte
            shape, dtype = (prod(shape) // 2,), np.dtype(np.uint8)
        elif tensor.data_type in DTYPES:
            dtype = DTYPES[tensor.data_type]
        else:
            what = f"initializer {tensor.name!r} has a type that no artifact has ({tensor.data_type})"
            raise H1ExportError(artifact.folder / model, what, AGAIN)
        if offset + prod(shape) * dtype.itemsize > artifact.manifest.files[location][1]:
            raise H1ExportError(
                artifact.folder / model,
                f"initializer {tensor.name!r} is outside {location}",
                AGAIN,
            )
        arrays[kept] = np.memmap(artifact.folder / location, dtype, mode="r", offset=offset, shape=shape)
    return arrays
