"""The bytes of an artifact's states, in the dtypes that its graph gives them."""

from __future__ import annotations

from math import prod

from h1export.artifact.manifest import Manifest
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateSpec

WIDTHS = {"FLOAT16": 2, "BFLOAT16": 2}  # bytes of a number, by the manifest's names
WIDEST = 4  # of the others, and of states that are no inputs of a graph


def state_bytes(manifest: Manifest, config: FalconH1Config, past: int, *, batch: int = 1) -> int:
    """Return the bytes of all states of ``batch`` sequences after ``past`` tokens.

    A state that the manifest does not name as an input, because the runtime keeps it, counts as float32.
    """
    return sum(
        WIDTHS.get(manifest.inputs[tensor.past][0] if tensor.past in manifest.inputs else "", WIDEST)
        * prod(tensor.sized(batch, past))
        for tensor in StateSpec.of(config).tensors
    )
