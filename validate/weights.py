"""Are the stored integers those of the checkpoint? A wrong block hides from any comparison that dequantises what is stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from h1export.core.artifact import StoredWeight
from h1export.core.quant.tensor import MIN_SCALE
from h1export.core.state import Array
from h1export.core.weights import WeightStore

ROW_BYTES = 1 << 24  # float32 rows compared at a time


def worst_steps(stored: Mapping[str, Array], weights: tuple[StoredWeight, ...], store: WeightStore) -> dict[str, float]:
    """Checkpoint tensor -> the largest error of a weight, in quantisation steps of its block.

    A step is the block's largest weight over 7 (int4) or 127 (int8), so rounding to nearest leaves half a step.
    """
    return {part.tensor: _worst(stored[part.tensor], part.tensor, weight, store) for weight in weights for part in weight.parts}


def _worst(found: Array, name: str, weight: StoredWeight, store: WeightStore) -> float:
    top, worst, start = (1 << (weight.bits - 1)) - 1, 0.0, 0
    for truth in store.blocks(name, ROW_BYTES):
        blocks = truth.reshape(len(truth), -1, weight.block or truth.shape[1])
        error = np.abs(found[start : start + len(truth)].reshape(blocks.shape) - blocks).max(axis=2)
        step = np.maximum(np.abs(blocks).max(axis=2) / top, MIN_SCALE)
        worst, start = max(worst, float((error / step).max())), start + len(truth)
    return worst
