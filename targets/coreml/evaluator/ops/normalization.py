"""Normalisation (MIL specification: normalization)."""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import (
    Ints,
    OpError,
    Table,
    axes_of,
    broadcastable,
    computes,
    require_floats,
)


def _normalized(x: Array, axes: Ints, epsilon: float) -> Array:
    centred = require_floats(x) - x.mean(axes, keepdims=True)
    result: Array = centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + np.float32(epsilon))
    return result


def _scaled(x: Array, gamma: Array | None, beta: Array | None) -> Array:
    if gamma is not None:
        x = x * gamma
    return x if beta is None else x + beta


def layer_norm(
    x: Array, axes: Ints | None = None, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """Normalise over ``axes``; gamma and beta have the sizes of these axes, in the order of x."""
    axes = axes_of(axes, x.ndim)
    shape = [size if i in axes else 1 for i, size in enumerate(x.shape)]
    gamma, beta = (None if part is None else part.reshape(shape) for part in (gamma, beta))
    return _scaled(_normalized(x, axes, epsilon), gamma, beta)


def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5) -> Array:
    """Normalise x [n, C, *D] over D; gamma and beta are [C]."""
    if not 3 <= x.ndim <= 4:
        raise OpError(f"takes x {x.shape}, which has an unsupported rank")
    gamma, beta = (None if part is None else broadcastable(part, x.ndim, 1) for part in (gamma, beta))
    return _scaled(_normalized(x, tuple(range(2, x.ndim)), epsilon), gamma, beta)


def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """Normalise x [n, C, *D] with the given statistics; all of them are [C]."""
    mean, variance = (broadcastable(part, x.ndim, 1) for part in (mean, variance))
    gamma, beta = (None if part is None else broadcastable(part, x.ndim, 1) for part in (gamma, beta))
    return _scaled((require_floats(x) - mean) / np.sqrt(variance + np.float32(epsilon)), gamma, beta)


def l2_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """Divide x by the square root of the sum of squares over its last three axes."""
    if x.ndim < 3:
        raise OpError(f"takes x {x.shape}, which has an unsupported rank")
    result: Array = require_floats(x) / np.sqrt(np.square(x).sum((-3, -2, -1), keepdims=True) + np.float32(epsilon))
    return result


TABLE: Table = {
    "layer_norm": computes(layer_norm),
    "instance_norm": computes(instance_norm),
    "batch_norm": computes(batch_norm),
    "l2_norm": computes(l2_norm),
}
