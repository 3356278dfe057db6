"""llama.cpp's own rounding of a whole file, by its library in xllamacpp.

xllamacpp has no llama_model_quantize. Its ggml_quantize_chunk is what that function calls for every tensor, and
targets/gguf/file_types.py has the types that it chooses: files had the sizes, and in llama.cpp the divergences, of
files that llama_model_quantize had made (docs/gguf.md).
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.quantize.device import CPU_DEVICE
from h1export.quantize.layers import LoadedLayer, embed, final_norm, head_tensor, weights_by_input
from h1export.targets.gguf import sdk
from h1export.targets.gguf.file_types import matrices, type_of
from h1export.targets.gguf.llama import api
from h1export.targets.gguf.read_back import GgufFile


def quantize(weight: Array, kind: str, importance: Array | None) -> np.ndarray:
    """Return a float32 matrix [rows, columns] in blocks of ``kind``, by ggml; ``importance`` is [columns].

    Raises:
        H1ExportError: ggml has written another number of bytes.
    """
    gguf = sdk.gguf()
    raw = gguf.GGMLQuantizationType[kind]
    columns, nbytes = gguf.GGML_QUANT_SIZES[raw]
    source = np.ascontiguousarray(weight, np.float32)
    found = np.empty((len(source), source.shape[1] // columns * nbytes), np.uint8)
    function = api().ggml_quantize_chunk
    function.restype = c.c_size_t
    function.argtypes = (c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    written = function(int(raw), source.ctypes.data, found.ctypes.data, 0, *source.shape, pointer)
    if written != found.nbytes:
        what = f"wrote {written} bytes, expected {found.nbytes}"
        raise H1ExportError("ggml_quantize_chunk", what, f"pip install xllamacpp=={sdk.XLLAMACPP}")
    return found


def write(
    full: GgufFile, path: Path, file_type: str, *, config: FalconH1Config, importance: Mapping[str, Array]
) -> None:
    """Write llama.cpp's file of ``file_type`` to ``path``, from ``full`` in float32.

    ``importance`` is name in the file -> [columns], as an importance matrix has it; nothing: without one.
    """
    chosen = {matrix.name: type_of(matrix, file_type, config) for matrix in matrices(config)}

    def blocks_of(name: str) -> Iterable[np.ndarray]:
        weight = full.floats(name)
        if name not in chosen:
            return [weight.view(np.uint8)]
        return [quantize(weight, chosen[name], importance.get(name))]

    full.write_copy(path, {name: chosen.get(name, "F32") for name in full.kinds}, blocks_of)


def importance_matrix(store: WeightStore, config: FalconH1Config, ids: Ids) -> dict[str, Array]:
    """Return name in the file -> mean squares of what its columns are multiplied by, on ids [samples, length].

    That is what llama-imatrix collects, here from the float model. The embedding has none there either.
    """
    names = {matrix.tensor: matrix.name for matrix in matrices(config)}
    found: dict[str, Array] = {}
    hidden = [embed(store, config, sample) for sample in ids]
    for layer in range(config.num_hidden_layers):
        loaded = LoadedLayer(config, layer, read=lambda name: store.rows(name, 0, store.shape(name)[0]))
        groups = weights_by_input(layer)
        sums = dict.fromkeys(groups, np.float32(0))
        for place, sample in enumerate(hidden):
            hidden[place], inputs = loaded.run(np.array(sample))
            for group in groups:
                sums[group] = sums[group] + inputs[group].square().sum(0).numpy()
        for group, tensors in groups.items():
            found.update({names[tensor]: sums[group] / ids.size for tensor in tensors})
    squares = [final_norm(store, config, sample, device=CPU_DEVICE).square().sum(0).numpy() for sample in hidden]
    found[names[head_tensor(config)]] = np.sum(squares, axis=0) / ids.size
    return found
