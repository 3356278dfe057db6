"""Normalisation (Core ML MIL specification, normalization)."""

from __future__ import annotations

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import Ints, OpError, Table, axes_of, broadcastable, computes, floats


def _normalized(x: Array, axes: Ints, epsilon: float) -> Array:
    centred = floats(x) - x.mean(axes, keepdims=True)
    result: Array = centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + np.float32(epsilon))
    return result


def _scaled(x: Array, gamma: Array | None, beta: Array | None) -> Array:
    if gamma is not None:
        x = x * gamma
    return x if beta is None else x + beta


def layer_norm(
    x: Array, axes: Ints | None = None, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """gamma and beta have the sizes of ``axes``, in x's order."""
    axes = axes_of(axes, x.ndim)
    shape = [size if i in axes else 1 for i, size in enumerate(x.shape)]
    gamma, beta = (None if part is None else part.reshape(shape) for part in (gamma, beta))
    return _scaled(_normalized(x, axes, epsilon), gamma, beta)


def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5) -> Array:
    """x [n, C, *D], normalised over D."""
    if not 3 <= x.ndim <= 4:
        raise OpError(f"takes x {x.shape}")
    gamma, beta = (None if part is None else broadcastable(part, x.ndim, 1) for part in (gamma, beta))
    return _scaled(_normalized(x, tuple(range(2, x.ndim)), epsilon), gamma, beta)


def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """x [n, C, *D] with the statistics given, [C]."""
    mean, variance = (broadcastable(part, x.ndim, 1) for part in (mean, variance))
    gamma, beta = (None if part is None else broadcastable(part, x.ndim, 1) for part in (gamma, beta))
    return _scaled((floats(x) - mean) / np.sqrt(variance + np.float32(epsilon)), gamma, beta)


def l2_norm(x: Array, epsilon: float = 1e-6) -> Array:
    """x divided by the root of the sum of squares of its last three axes."""
    if x.ndim < 3:
        raise OpError(f"takes x {x.shape}")
    result: Array = floats(x) / np.sqrt(np.square(x).sum((-3, -2, -1), keepdims=True) + np.float32(epsilon))
    return result


TABLE: Table = {
    "layer_norm": computes(layer_norm),
    "instance_norm": computes(instance_norm),
    "batch_norm": computes(batch_norm),
    "l2_norm": computes(l2_norm),
}
