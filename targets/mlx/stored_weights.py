"""The weights that an mlx-lm folder stores, read back from its shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import tensor_shapes
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.targets.hf_folder.floats import unrounded
from h1export.targets.hf_folder.shards import stored_entries
from h1export.targets.hf_folder.words import unpacked
from h1export.targets.mlx.fold import CONVOLUTION, multiplier_of
from h1export.targets.mlx.options import MlxOptions
from h1export.targets.mlx.weights import DTYPES


class StoredWeights(Mapping[str, Array]):
    """Checkpoint tensor -> its value without µP, read when it is asked for, float32 in the checkpoint's shape.

    Where the folder has integers, these are the quantised tensors, and in half precision all others too, because those
    are rounded as well: a judge that holds them sees what is left, which is arithmetic. Without integers it is empty.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._config = artifact.config
        self._dtype = DTYPES[MlxOptions.read(artifact).compute]
        self._entries = stored_entries(artifact)
        self._weights = {weight.parts[0].tensor: weight for weight in artifact.manifest.weights}
        everything = bool(self._weights) and self._dtype != "F32"
        self._names = list(tensor_shapes(self._config) if everything else self._weights)

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        weight = self._weights.get(name)
        if weight is None:
            return self._float(name)
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

    def _float(self, name: str) -> Array:
        with self._as_the_manifest_says(name):
            value = unrounded(self._entries[name].values(), self._dtype).astype(np.float64)
            value = value.swapaxes(1, 2) if name.endswith(CONVOLUTION) else value
            factors = multiplier_of(name, self._config).rows(len(value))
            found: Array = (value / factors.reshape(-1, *[1] * (value.ndim - 1))).astype(np.float32)
        return found

    def _read(self, name: str, weight: StoredWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return codes int8 [rows, columns], and scales without µP float64 and zero points [rows, groups] of MLX."""
        stem = name.removesuffix("weight")
        middle = 1 << (weight.bits - 1)
        with self._as_the_manifest_says(name):
            codes = unpacked(self._entries[name].values(), weight.bits)
            scales = unrounded(self._entries[f"{stem}scales"].values(), self._dtype).astype(np.float64)
            biases = unrounded(self._entries[f"{stem}biases"].values(), self._dtype)
            with np.errstate(all="ignore"):
                zeros = np.rint(-biases / scales) - middle
            factors = multiplier_of(name, self._config).rows(len(codes))
            codes.reshape(len(codes), scales.shape[1], -1)
            scales = scales / factors[:, None]
        return codes, scales, zeros

    @contextmanager
    def _as_the_manifest_says(self, name: str) -> Iterator[None]:
        """Turn what a tensor of another form raises into an error about the folder."""
        try:
            yield
        except (LookupError, ValueError, TypeError) as error:
            what = f'holds tensor "{name}" in another form than the manifest says ({type(error).__name__})'
            raise H1ExportError(self._artifact.folder, what, "build the artifact again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
