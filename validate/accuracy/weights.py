"""Compare the stored integers with the checkpoint.

The comparison ``stored`` of the cases cannot find a wrong integer, because its reference holds the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from h1export.artifact.manifest import StoredWeight
from h1export.checkpoint.store import WeightStore
from h1export.model.falcon_h1.states import Array
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MIN_SCALE

ROW_BYTES = 1 << 24  # float32 rows compared at a time
# Half of fp16's smallest relative step, and float32's rounding: a runtime that keeps µP inside the scales rounds them
# once more. A code that is off by one is ten times as far, and a scale that is off by one step is beyond it too.
ROUNDED_AGAIN = 2.0**-11 + 2.0**-20


def weight_errors(
    stored: Mapping[str, Array], weights: tuple[StoredWeight, ...], store: WeightStore
) -> dict[str, dict[str, float]]:
    """Return checkpoint tensor -> figure -> its largest error, in quantisation steps of the group that it is in.

    A step is the group's largest weight over 7 (int4) or 127 (int8). The figure ``steps`` is the error of one weight;
    rounding to nearest leaves half a step at most. The figure ``group`` is the root of a group's mean squared error. A
    prequantized weight is not rounded, so any difference beyond ROUNDED_AGAIN counts as infinite.

    Args:
        stored: checkpoint tensor -> its dequantised integers without µP, float32 [rows, columns].
        weights: the manifest's entries of these tensors.
        store: the checkpoint that the artifact was built from.
    """
    return {
        part.tensor: _errors(stored[part.tensor], part.tensor, weight, store=store)
        for weight in weights
        for part in weight.parts
    }


def _errors(found: Array, name: str, weight: StoredWeight, *, store: WeightStore) -> dict[str, float]:
    if name in store.packed:
        error = 0.0 if _equal(found, name, store) else float("inf")
        return {"steps": error, "group": error}
    top = Precision(weight.bits, weight.group_size).top
    worst = {"steps": 0.0, "group": 0.0}
    start = 0
    for truth in store.blocks(name, ROW_BYTES):
        groups = truth.reshape(len(truth), -1, weight.group_size or truth.shape[1])
        error = np.abs(found[start : start + len(truth)].reshape(groups.shape) - groups)
        step = np.maximum(np.abs(groups).max(axis=2) / top, MIN_SCALE)
        largest = {"steps": error.max(axis=2) / step, "group": np.sqrt(np.square(error).mean(axis=2)) / step}
        worst = {figure: max(worst[figure], float(values.max())) for figure, values in largest.items()}
        start += len(truth)
    return worst


def _equal(found: Array, name: str, store: WeightStore) -> bool:
    start = 0
    for truth in store.blocks(name, ROW_BYTES):
        part = found[start : start + len(truth)]
        if part.shape != truth.shape or not np.allclose(part, truth, rtol=ROUNDED_AGAIN, atol=0):
            return False
        start += len(truth)
    return start == len(found)
