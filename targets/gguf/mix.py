"""Choose a type for every matrix, so that the file is no larger than llama.cpp's own of some type, and closer.

All matrices begin in 4 bits. Then the one whose next type takes most from the expected divergence for its bytes gets
that type, until no next type fits. A matrix's expected divergence is SENSITIVITY of its kind times its weights, and
falls to a quarter with every bit.
"""

from __future__ import annotations

from collections.abc import Mapping

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.targets.gguf.file_types import EMBEDDING, HEAD, Matrix, file_bytes, matrices
from h1export.targets.gguf.types import TensorType

SHARED = "shared"  # the mix of the build's own integers
WIDE = (TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K)
NARROW = (TensorType.Q4_0, TensorType.Q5_0)  # where blocks of 256 columns do not fit
BITS = {TensorType.Q4_0: 4, TensorType.Q4_K: 4, TensorType.Q5_0: 5, TensorType.Q5_K: 5, TensorType.Q6_K: 6}

# KL divergence in nats a million weights, where a matrix of the embedded model alone is in 4 bits. Those of attention
# and of the MLP fall towards the first layers, to 1/FALL before the first: there they fall further, by more than 30.
SENSITIVITY: Mapping[str, float] = {
    HEAD: 4e-3,
    EMBEDDING: 1.2e-3,
    "ssm_in.weight": 1.5e-3,
    "ssm_out.weight": 5e-3,
    "attn_q.weight": 2.7e-3,
    "attn_k.weight": 1e-2,
    "attn_v.weight": 1.3e-2,
    "attn_output.weight": 4e-3,
    "ffn_gate.weight": 2.5e-3,
    "ffn_up.weight": 1.5e-3,
    "ffn_down.weight": 4e-3,
}
FALL = 16.0
LENGTH_BYTES = 8  # before each text of a GGUF file
KEY_BYTES = 128  # for the key of the list, and what alignment may add
FALLING = ("attn_", "ffn_")


def mixed(file_type: str, config: FalconH1Config) -> dict[str, TensorType]:
    """Return checkpoint tensor -> its type in a file of at most the bytes of llama.cpp's ``file_type``.

    Raises:
        H1ExportError: a matrix whose rows 32 does not divide.
    """
    found: dict[Matrix, int] = {}  # the place of its type among those that fit
    for matrix in matrices(config):
        if matrix.columns % NARROW[0].block.columns:
            what = f"has {matrix.columns} columns, which blocks of 32 do not divide"
            raise H1ExportError(f'tensor "{matrix.tensor}"', what, "leave out --mix, and use --quant none --floats f16")
        found[matrix] = 0
    left = file_bytes(file_type, config) - sum(_nbytes(matrix, _types(matrix)[0]) for matrix in found)
    left -= KEY_BYTES + sum(len(matrix.name) + LENGTH_BYTES for matrix in found)  # the list of own integers
    steps = [(matrix, place) for matrix in found for place in range(len(_types(matrix)) - 1)]
    steps.sort(
        key=lambda step: -_gain(step[0], step[1], config) / _cost(*step)
    )  # a matrix's second step gains less than its first
    for matrix, place in steps:
        cost = _cost(matrix, place)
        if found[matrix] == place and cost <= left:
            left -= cost
            found[matrix] += 1
    return {matrix.tensor: _types(matrix)[place] for matrix, place in found.items()}


def _types(matrix: Matrix) -> tuple[TensorType, ...]:
    return NARROW if matrix.columns % WIDE[0].block.columns else WIDE


def _nbytes(matrix: Matrix, kind: TensorType) -> int:
    return matrix.rows * kind.row_bytes(matrix.columns)


def _cost(matrix: Matrix, place: int) -> int:
    """Return the bytes that the next type takes more."""
    before, after = _types(matrix)[place : place + 2]
    return _nbytes(matrix, after) - _nbytes(matrix, before)


def _gain(matrix: Matrix, place: int, config: FalconH1Config) -> float:
    """Return the expected divergence that the next type takes away."""
    kind = matrix.name if matrix.layer is None else matrix.name.split(".", 2)[2]
    sensitivity = SENSITIVITY[kind]
    if kind == EMBEDDING and config.tie_word_embeddings:
        sensitivity += SENSITIVITY[HEAD]
    if matrix.layer is not None and kind.startswith(FALLING):
        sensitivity *= FALL ** ((matrix.layer + 1) / config.num_hidden_layers - 1)
    weight = sensitivity * matrix.rows * matrix.columns
    types = _types(matrix)
    before, after = (4.0 ** -BITS[kind] for kind in types[place : place + 2])
    return weight * (before - after)
