"""The integers that an mlx-lm folder stores, read back from its shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.checkpoint.safetensors_header import TensorEntry
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.targets.hf_folder.floats import unrounded
from h1export.targets.hf_folder.shards import stored_entries
from h1export.targets.hf_folder.words import unpacked
from h1export.targets.mlx.fold import multiplier_of
from h1export.targets.mlx.options import MlxOptions
from h1export.targets.mlx.weights import DTYPES


class StoredWeights(Mapping[str, Array]):
    """Checkpoint tensor -> its integers, dequantised without µP when they are read, float32 [rows, columns]."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._config = artifact.config
        self._dtype = DTYPES[MlxOptions.read(artifact).compute]
        self._entries = stored_entries(artifact)
        self._weights = {weight.parts[0].tensor: weight for weight in artifact.manifest.weights}

    def __getitem__(self, name: str) -> Array:
        weight = self._weights[name]
        if self._dtype == "F32":  # such a scale determines the fp16 scale of the integers
            return self.quantized(name).unfolded()
        codes, scales, zeros = self._read(name, weight)
        groups = codes.reshape(len(codes), scales.shape[1], -1) - zeros[..., None]
        found: Array = (groups * scales[..., None]).reshape(codes.shape).astype(np.float32)
        return found

    def quantized(self, name: str) -> QuantizedTensor:
        """Return the integers of a tensor; scales of 16 bits contain µP and are near those of other targets only."""
        weight = self._weights[name]
        codes, scales, zeros = self._read(name, weight)
        each = (weight.group_size or codes.shape[1]) // (codes.shape[1] // scales.shape[1])
        return QuantizedTensor(
            codes,
            scales[:, ::each].astype(np.float16),
            np.ones(len(codes), np.float32),
            zeros=zeros[:, ::each].astype(np.int8) if zeros.any() else None,
        )

    def _read(self, name: str, weight: StoredWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        """Return codes int8 [rows, columns], and scales without µP float64 and zero points [rows, groups] of MLX."""
        stem = name.removesuffix("weight")
        middle = 1 << (weight.bits - 1)
        try:
            codes = unpacked(self._entry(name).values(), weight.bits)
            scales = unrounded(self._entry(f"{stem}scales").values(), self._dtype).astype(np.float64)
            biases = unrounded(self._entry(f"{stem}biases").values(), self._dtype)
            with np.errstate(all="ignore"):
                zeros = np.rint(-biases / scales) - middle
            factors = multiplier_of(name, self._config).rows(len(codes))
            codes.reshape(len(codes), scales.shape[1], -1)
        except (KeyError, ValueError, TypeError) as error:
            what = f'holds tensor "{name}" in another form than the manifest says ({type(error).__name__})'
            raise H1ExportError(self._artifact.folder, what, "build the artifact again") from None
        return codes, scales / factors[:, None], zeros

    def _entry(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
