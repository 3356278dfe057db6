"""The bytes of an artifact's states, in the dtypes that its graph gives them."""

from __future__ import annotations

from math import prod

from h1export.artifact.manifest import Manifest
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec

ROWS = "INT8"  # of the manifest: states in codes, whose last axis has scales behind them
WIDTHS = {"FLOAT16": 2, "BFLOAT16": 2, ROWS: 1}  # bytes of a number, by the manifest's names
WIDEST = 4  # of the others, and of states that are no inputs of a graph


def state_bytes(manifest: Manifest, config: FalconH1Config, past: int, *, batch: int = 1) -> int:
    """Return the bytes of all states of ``batch`` sequences after ``past`` tokens.

    A state that the manifest does not name as an input, because the runtime keeps it, counts as float32.
    """
    total = 0
    for tensor in StateSpec.of(config).tensors:
        dtype, dims = manifest.inputs.get(tensor.past, ("", ()))
        shape = tensor.sized(batch, past)
        if dtype == ROWS:
            shape = (*shape[:-1], *(size for size in dims[-1:] if isinstance(size, int)))
        total += WIDTHS.get(dtype, WIDEST) * prod(shape)
    return total
