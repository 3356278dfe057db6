"""The tensors of a file, read back: its integers, and a copy of the file in which every matrix is in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.projections import EMBED_TOKENS, Projection
from h1export.model.falcon_h1.states import Array
from h1export.model.falcon_h1.tensors import projection_of, tensor_shapes
from h1export.quantize.quantized_tensor import MIN_SCALE, QuantizedTensor
from h1export.targets.gguf import blocks, sdk
from h1export.targets.gguf.grids import FORMATS, parts_of
from h1export.targets.gguf.names import place_of
from h1export.targets.gguf.types import BLOCKS, TensorType
from h1export.targets.gguf.writer import MODEL

AGAIN = "build the artifact again"
ROW_BYTES = 16 << 20  # float32 bytes that are dequantised at a time
HALF_STEP = 2.0**-11  # the largest relative error of rounding to a normal fp16
HALF_SUBNORMAL = 2.0**-25  # the largest error of rounding to a subnormal one
Parts = Callable[[blocks.Bytes], tuple[blocks.Codes, blocks.Scales]]
PARTS: Mapping[TensorType, Parts] = {
    TensorType.Q4_0: blocks.q4_0_parts,
    TensorType.Q8_0: blocks.q8_0_parts,
}
ALL_PARTS: Mapping[TensorType, Parts] = {**PARTS, **{kind: partial(parts_of, kind) for kind in FORMATS}}


class GgufFile:
    """The tensors of the GGUF file ``path``, which is mapped into memory.

    Raises:
        H1ExportError: the file is damaged, or gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        gguf = sdk.gguf()
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # of any kind: gguf unpacks without checks
            what = f"cannot be read as GGUF ({type(error).__name__})"
            raise H1ExportError(path, what, AGAIN) from None
        self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}

    @property
    def kinds(self) -> dict[str, TensorType]:
        """The type of every tensor. Raises H1ExportError for one that h1export does not write."""
        return {name: self.kind(name) for name in self._tensors}

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors of each type there are."""
        return dict(Counter(str(kind) for kind in self.kinds.values()))

    def kind(self, name: str) -> TensorType:
        """Return the type of a tensor."""
        found = str(self._tensor(name).tensor_type.name).lower()
        if found not in {str(kind) for kind in BLOCKS}:
            raise H1ExportError(self.path, f"tensor {name!r} is of type {found}, which h1export does not write", AGAIN)
        return TensorType(found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, slowest dimension first."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape.tolist()))

    def rows(self, name: str) -> blocks.Bytes:
        """Return the bytes of a tensor, [rows, bytes of a row]."""
        data = np.asarray(self._tensor(name).data).view(np.uint8)
        return data.reshape(-1, self.kind(name).row_bytes(self.shape(name)[-1]))

    def floats(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows of a tensor in float32, µP included."""
        gguf = sdk.gguf()
        kind = gguf.GGMLQuantizationType[self.kind(name).upper()]
        rows = np.ascontiguousarray(self.rows(name)[start:stop])
        if self.kind(name) is TensorType.F32:
            return rows.view(np.float32)
        return np.asarray(gguf.quants.dequantize(rows.view(np.float16) if kind.name == "F16" else rows, kind))

    def scales(self, name: str) -> blocks.Scales:
        """Return the scales of a tensor of Q4_0 or Q8_0, µP included."""
        return PARTS[self.kind(name)](self.rows(name))[1]

    def strings(self, key: str) -> tuple[str, ...]:
        """Return the texts of a key of the file; none where it does not have it."""
        field = self._reader.fields.get(key)
        return () if field is None else tuple(map(str, field.contents()))

    def coarse(self) -> dict[str, float]:
        """Return tensor -> the share of its scales that are too small for the whole precision of fp16."""
        found = {}
        for name, kind in self.kinds.items():
            if kind in PARTS and (share := float((self.scales(name) < np.float16(MIN_SCALE)).mean())) > 0:
                found[name] = share
        return found

    def scale_rounding(self) -> float:
        """Return the largest relative error of a scale by its rounding to fp16 with µP in it; 0 where there is none."""
        smallest = [float(self.scales(name).min()) for name, kind in self.kinds.items() if kind in PARTS]
        return max((HALF_STEP, *(HALF_SUBNORMAL / scale for scale in smallest))) if smallest else 0.0

    def write_float32(self, path: Path) -> None:
        """Write a copy to ``path`` whose tensors are all in float32, which llama.cpp computes without rounding."""

        def blocks_of(name: str) -> Iterator[blocks.Bytes]:
            shape = self.shape(name)
            step = max(1, ROW_BYTES // (4 * shape[-1]))
            for start in range(0, int(np.prod(shape[:-1])), step):
                yield self.floats(name, start, start + step).view(np.uint8)

        self.write_copy(path, dict.fromkeys(self._tensors, "F32"), blocks_of)

    def write_copy(
        self, path: Path, kinds: Mapping[str, str], blocks_of: Callable[[str], Iterable[blocks.Bytes]]
    ) -> None:
        """Write a copy to ``path`` with the same keys, and with tensors of other types.

        ``kinds`` has the type of every tensor, by its name in gguf's GGMLQuantizationType. ``blocks_of`` gives the
        bytes of a tensor in that type, from its first row to its last.
        """
        gguf = sdk.gguf()
        (architecture,) = [field for name, field in self._reader.fields.items() if name == "general.architecture"]
        writer = gguf.GGUFWriter(path, architecture.contents())
        for name, field in self._reader.fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kind, sub_type=inner)
        for name in self._tensors:
            shape = self.shape(name)
            raw = gguf.GGMLQuantizationType[kinds[name]]
            columns, nbytes = gguf.GGML_QUANT_SIZES[raw]
            size = int(np.prod(shape)) // columns * nbytes
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        align = gguf.GGUF_DEFAULT_ALIGNMENT
        with path.open("ab") as stream:
            for name in self._tensors:
                stream.write(bytes(-stream.tell() % align))
                for block in blocks_of(name):
                    stream.write(block.tobytes())
            stream.write(bytes(-stream.tell() % align))

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise H1ExportError(self.path, f"has no tensor {name!r}", AGAIN)
        return self._tensors[name]


class _Stored(Mapping[str, Array]):
    """Checkpoint tensor -> what the file stores of it, without µP, float32 [rows, columns]; nothing is kept.

    µP is in the values of the file, and each is divided by it, so it is exact to the last bits of float32.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._path = artifact.folder / MODEL
        self._config = artifact.config
        self._weights = {weight.parts[0].tensor: weight for weight in artifact.manifest.weights}

    @cached_property
    def file(self) -> GgufFile:
        """The file, opened at the first access."""
        return GgufFile(self._path)

    @cached_property
    def _places(self) -> dict[str, tuple[str, Multiplier]]:
        """Checkpoint tensor -> its name in the file, and its µP."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Array:
        place, multiplier = self._places[name]
        values = self.file.floats(place)
        found: Array = values / multiplier.rows(len(values))[:, None]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class StoredWeights(_Stored):
    """The tensors in integers."""

    @property
    def weights(self) -> tuple[StoredWeight, ...]:
        """The manifest's entries of the tensors."""
        return tuple(self._weights.values())

    def quantized(self, name: str) -> QuantizedTensor:
        """Return the codes of the tensor ``name``, and its scales, µP included."""
        place = self._places[name][0]
        codes, scales = ALL_PARTS[self.file.kind(place)](self.file.rows(place))
        return QuantizedTensor(codes, scales, np.ones(len(codes), np.float32))

    @cached_property
    def _places(self) -> dict[str, tuple[str, Multiplier]]:
        return {name: (weight.initializer, weight.parts[0].multiplier) for name, weight in self._weights.items()}


class StoredFloats(_Stored):
    """The matrices in fp16 and bf16, with which the float32 form computes too."""

    @cached_property
    def _places(self) -> dict[str, tuple[str, Multiplier]]:
        found = {}
        for tensor in tensor_shapes(self._config):
            projection = projection_of(tensor)
            if tensor not in self._weights and projection is not None:
                name = place_of(tensor).name
                if self.file.kind(name) is not TensorType.F32:
                    found[tensor] = (name, _multiplier(projection, self._config))
        return found


def _multiplier(projection: Projection, config: FalconH1Config) -> Multiplier:
    if projection is EMBED_TOKENS:
        return Multiplier.scalar(config.embedding_multiplier)
    output = Multiplier(tuple(projection.output_multiplier(config)))
    return output.times(Multiplier.scalar(projection.input_multiplier(config)))
