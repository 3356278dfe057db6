"""The weights that an mlx-lm folder stores, read back from its shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

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


class _Shards:
    """The tensors of the folder of ``artifact``."""

    def __init__(self, artifact: Artifact) -> None:
        self.config = artifact.config
        self._folder = artifact.folder
        self.dtype = DTYPES[MlxOptions.read(artifact).compute]
        self.entries = stored_entries(artifact)

    def floats(self, name: str) -> Array:
        """Return a tensor of floats as float32."""
        return unrounded(self.entries[name].values(), self.dtype)

    def factors(self, name: str, rows: int) -> npt.NDArray[np.float64]:
        """Return the factor of each of ``rows`` rows of a checkpoint tensor."""
        return multiplier_of(name, self.config).rows(rows).astype(np.float64)

    @contextmanager
    def as_the_manifest_says(self, name: str) -> Iterator[None]:
        """Turn what a tensor of another form raises into an error about the folder."""
        try:
            yield
        except (LookupError, ValueError, TypeError) as error:
            what = f'holds tensor "{name}" in another form than the manifest says ({type(error).__name__})'
            raise H1ExportError(self._folder, what, "build the artifact again") from None


class StoredWeights(Mapping[str, Array]):
    """Checkpoint tensor -> its integers, dequantised without µP when they are read, float32 [rows, columns]."""

    def __init__(self, artifact: Artifact) -> None:
        self._shards = _Shards(artifact)
        self._weights = {weight.parts[0].tensor: weight for weight in artifact.manifest.weights}

    def __getitem__(self, name: str) -> Array:
        weight = self._weights[name]
        if self._shards.dtype == "F32":  # such a scale determines the fp16 scale of the integers
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

    def _read(
        self, name: str, weight: StoredWeight
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return codes [rows, columns], and scales without µP and zero points [rows, groups of MLX]."""
        stem = name.removesuffix("weight")
        middle = 1 << (weight.bits - 1)
        with self._shards.as_the_manifest_says(name):
            codes = unpacked(self._shards.entries[name].values(), weight.bits)
            scales = self._shards.floats(f"{stem}scales").astype(np.float64)
            biases = self._shards.floats(f"{stem}biases")
            with np.errstate(all="ignore"):
                zeros = np.rint(-biases / scales) - middle
            scales = scales / self._shards.factors(name, len(codes))[:, None]
            codes.reshape(len(codes), scales.shape[1], -1)
        return codes, scales, zeros

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class StoredFloats(Mapping[str, Array]):
    """Checkpoint tensor without integers -> its float32 value without µP, in the checkpoint's shape; none in fp32."""

    def __init__(self, artifact: Artifact) -> None:
        self._shards = _Shards(artifact)
        packed = {part.tensor for weight in artifact.manifest.weights for part in weight.parts}
        rounded = self._shards.dtype != "F32"
        self._names = [name for name in tensor_shapes(self._shards.config) if rounded and name not in packed]

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        with self._shards.as_the_manifest_says(name):
            value = self._shards.floats(name).astype(np.float64)
            value = value.swapaxes(1, 2) if name.endswith(CONVOLUTION) else value
            factors = self._shards.factors(name, len(value)).reshape(-1, *[1] * (value.ndim - 1))
            found: Array = (value / factors).astype(np.float32)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
