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
GROUP_TOP = 31  # the largest code of 6 bits
FLOAT32 = 2.0**-22  # relative rounding of a few float32 operations, where a runtime rounds at all


def weight_errors(
    stored: Mapping[str, Array], weights: tuple[StoredWeight, ...], store: WeightStore, *, rounding: float = 0.0
) -> dict[str, dict[str, float]]:
    """Return checkpoint tensor -> figure -> its largest error, in quantisation steps of the group that it is in.

    A step is the group's largest weight over 7 (int4) or 127 (int8). The figure ``steps`` is the error of one weight;
    rounding to nearest leaves half a step at most. The figure ``group`` is the root of a group's mean squared error, in
    steps of 6 bits for int8: methods that make up for errors elsewhere move a weight by a share of it, whatever the
    step, while a wrong row of int8 is off by about ten of them. A prequantized weight is not rounded, so any difference
    counts as infinite, beyond the ``rounding`` of its scales.

    Args:
        stored: checkpoint tensor -> its dequantised integers without µP, float32 [rows, columns].
        weights: the manifest's entries of these tensors.
        store: the checkpoint that the artifact was built from.
        rounding: ``Provenance.scale_rounding`` of the runtime; 0 means that stored weights are exact.
    """
    return {
        part.tensor: _errors(stored[part.tensor], part.tensor, weight, store=store, rounding=rounding)
        for weight in weights
        for part in weight.parts
    }


def _errors(found: Array, name: str, weight: StoredWeight, *, store: WeightStore, rounding: float) -> dict[str, float]:
    if name in store.packed:
        error = 0.0 if _equal(found, name, store, rounding=rounding) else float("inf")
        return {"steps": error, "group": error}
    top = Precision(weight.bits, weight.group_size).top
    worst = {"steps": 0.0, "group": 0.0}
    start = 0
    for truth in store.blocks(name, ROW_BYTES):
        groups = truth.reshape(len(truth), -1, weight.group_size or truth.shape[1])
        error = np.abs(found[start : start + len(truth)].reshape(groups.shape) - groups)
        step = np.maximum(np.abs(groups).max(axis=2) / top, MIN_SCALE)
        moved = np.sqrt(np.square(error).mean(axis=2)) / (step * max(1.0, top / GROUP_TOP))
        largest = {"steps": error.max(axis=2) / step, "group": moved}
        worst = {figure: max(worst[figure], float(values.max())) for figure, values in largest.items()}
        start += len(truth)
    return worst


def _equal(found: Array, name: str, store: WeightStore, *, rounding: float) -> bool:
    tolerance = rounding + FLOAT32 if rounding else 0.0
    start = 0
    for truth in store.blocks(name, ROW_BYTES):
        part = found[start : start + len(truth)]
        if part.shape != truth.shape or not np.allclose(part, truth, rtol=tolerance, atol=0):
            return False
        start += len(truth)
    return start == len(found)
