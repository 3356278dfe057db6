"""llama.cpp's own rounding, through its library: the gguf package reads k-quants and cannot make them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array

# llama.cpp's choice where a row is no multiple of Q4_K's 256 weights
WIDE = GGMLQuantizationType.Q4_K
NARROW = GGMLQuantizationType.Q5_0


class Ggml:
    """``library``: llama.cpp's libggml-base.so.

    Raises:
        H1ExportError: it cannot be loaded, or has no quantiser.
    """

    def __init__(self, library: Path) -> None:
        try:
            self._quantize: Any = ctypes.CDLL(str(library)).ggml_quantize_chunk
        except (OSError, AttributeError) as error:
            raise H1ExportError(
                library, f"is no libggml-base of llama.cpp ({error})", "build llama.cpp and give its library"
            ) from None
        self._quantize.restype = ctypes.c_size_t

    def rounded(self, weight: Array) -> Array:
        """A matrix [rows, columns] in Q4_K, or Q5_0 where it must be, and back in float32."""
        kind = kind_of(weight.shape)
        source = np.ascontiguousarray(weight, np.float32)
        block, nbytes = GGML_QUANT_SIZES[kind]
        stored = np.zeros((len(source), source.shape[1] // block * nbytes), np.uint8)
        sizes = [ctypes.c_int64(size) for size in (0, *source.shape)]
        written = self._quantize(
            int(kind), source.ctypes.data_as(ctypes.c_void_p), stored.ctypes.data_as(ctypes.c_void_p), *sizes, None
        )
        if written != stored.nbytes:
            raise H1ExportError(
                "ggml_quantize_chunk",
                f"wrote {written} bytes, expected {stored.nbytes}",
                "use another release of llama.cpp",
            )
        return np.asarray(dequantize(stored, kind), np.float32)


def kind_of(shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The GGUF type in which a matrix [rows, columns] is stored."""
    return WIDE if shape[1] % GGML_QUANT_SIZES[WIDE][0] == 0 else NARROW


def bits_of(shapes: list[tuple[int, ...]]) -> float:
    """Bits a weight, on average."""
    total = sum(rows * columns for rows, columns in shapes)
    sizes = [(shape[0] * shape[1], *GGML_QUANT_SIZES[kind_of(shape)]) for shape in shapes]
    return 8 * sum(count / block * nbytes for count, block, nbytes in sizes) / total
