"""The types that llama.cpp's own quantiser gives the tensors of a file, for file types of 4 and 5 bits.

Source: llama.cpp's src/llama-quant.cpp, as far as it concerns this family. Files of these types, made by its function
ggml_quantize_chunk, have the sizes that llama-quantize's own had (docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import projection_of, tensor_shapes
from h1export.targets.gguf import sdk
from h1export.targets.gguf.names import place_of

HEAD = "output.weight"
EMBEDDING = "token_embd.weight"
BASE: Mapping[str, str] = {"q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K"}
NARROW: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where blocks of 256 do not fit
MORE = ("attn_v.weight", "ffn_down.weight")  # Q6_K in some layers of the file types "_m"


@dataclass(frozen=True)
class Matrix:
    """A matrix of the file: its name there and in the checkpoint, its rows and columns, and its layer or None."""

    name: str
    tensor: str
    rows: int
    columns: int
    layer: int | None


def matrices(config: FalconH1Config) -> tuple[Matrix, ...]:
    """Return every matrix of a model, those outside the layers included."""
    found = []
    for tensor, shape in tensor_shapes(config).items():
        if projection_of(tensor) is not None:
            name = place_of(tensor).name
            layer = int(name.split(".")[1]) if name.startswith("blk.") else None
            rows, columns = shape
            found.append(Matrix(name, tensor, rows, columns=columns, layer=layer))
    return tuple(found)


def type_of(matrix: Matrix, file_type: str, config: FalconH1Config) -> str:
    """Return the type of a matrix, by its name in gguf's GGMLQuantizationType; ``file_type`` is one of BASE."""
    base = BASE[file_type]
    chosen = base
    if matrix.name == HEAD or (matrix.name == EMBEDDING and config.tie_word_embeddings):
        return "Q8_0" if matrix.columns % block_of(base)[0] else "Q6_K"
    if file_type.endswith("_m") and matrix.layer is not None and matrix.name.endswith(MORE):
        chosen = "Q6_K" if _more_bits(matrix.layer, config.num_hidden_layers) else base
    return NARROW[chosen] if matrix.columns % block_of(chosen)[0] else chosen


def file_bytes(file_type: str, config: FalconH1Config) -> int:
    """Return the bytes of all matrices in llama.cpp's own file."""
    total = 0
    for matrix in matrices(config):
        columns, nbytes = block_of(type_of(matrix, file_type, config))
        total += matrix.rows * matrix.columns // columns * nbytes
    return total


def block_of(kind: str) -> tuple[int, int]:
    """Return the columns and the bytes of a block of a type."""
    gguf = sdk.gguf()
    columns, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(columns), int(nbytes)


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
