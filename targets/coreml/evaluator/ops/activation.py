"""Activation functions (MIL specification: activation)."""

from __future__ import annotations

import math

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, axis_of, broadcastable, computes, require_floats
from h1export.targets.coreml.evaluator.ops.elementwise import erf, float_op

ONE = np.float32(1)
ZERO = np.float32(0)


def sigmoid(x: Array) -> Array:
    """Compute 1 / (1 + e^-x); if e^-x overflows, the result is 0, which is right."""
    return ONE / (ONE + np.exp(-x))


def silu(x: Array) -> Array:
    """Compute x * sigmoid(x)."""
    return x / (ONE + np.exp(-x))


def softplus(x: Array) -> Array:
    """Compute log(1 + e^x) without overflow."""
    return np.logaddexp(x, ZERO)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Compute x * P(X <= x) for a normal X, exactly or by one of two approximations."""
    require_floats(x)
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    if mode == "EXACT":
        factor = erf(x * np.float32(math.sqrt(0.5)))
    elif mode == "TANH_APPROXIMATION":
        factor = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))
    else:
        raise OpError(f"has mode {mode!r}, which the specification does not have")
    return np.float32(0.5) * x * (ONE + factor)


def elu(x: Array, alpha: float) -> Array:
    """Compute x for x > 0, else alpha * (e^x - 1)."""
    return np.where(require_floats(x) > 0, x, np.float32(alpha) * np.expm1(np.minimum(x, ZERO)))


def leaky_relu(x: Array, alpha: float) -> Array:
    """Compute x for x >= 0, else alpha * x."""
    return np.where(require_floats(x) >= 0, x, np.float32(alpha) * x)


def prelu(x: Array, alpha: Array) -> Array:
    """Compute x for x > 0, else alpha * x; alpha has one factor per channel (axis 1)."""
    return np.where(require_floats(x) > 0, x, broadcastable(alpha, x.ndim, 1) * x)


def thresholded_relu(x: Array, alpha: float) -> Array:
    """Compute x for x >= alpha, else 0."""
    return np.where(require_floats(x) >= np.float32(alpha), x, ZERO)


def clamped_relu(x: Array, alpha: float, beta: float) -> Array:
    """Compute min(x, beta) for x >= 0, else min(alpha * x, beta)."""
    return np.minimum(np.where(require_floats(x) >= 0, x, np.float32(alpha) * x), np.float32(beta))


def linear_activation(x: Array, alpha: float, beta: float) -> Array:
    """Compute alpha * x + beta."""
    return np.float32(alpha) * require_floats(x) + np.float32(beta)


def scaled_tanh(x: Array, alpha: float, beta: float) -> Array:
    """Compute alpha * tanh(beta * x)."""
    return np.float32(alpha) * np.tanh(np.float32(beta) * require_floats(x))


def sigmoid_hard(x: Array, alpha: float, beta: float) -> Array:
    """Compute alpha * x + beta, clipped to [0, 1]."""
    return np.clip(linear_activation(x, alpha, beta), ZERO, ONE)


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """Compute alpha * log(1 + e^(beta * x)); alpha and beta have one value per channel (axis 1)."""
    return broadcastable(alpha, x.ndim, 1) * softplus(broadcastable(beta, x.ndim, 1) * require_floats(x))


def softmax(x: Array, axis: int = -1) -> Array:
    """Compute e^x divided by its sum along ``axis``."""
    axis = axis_of(axis, x.ndim)
    powers = np.exp(require_floats(x) - x.max(axis, keepdims=True))
    result: Array = powers / powers.sum(axis, keepdims=True)
    return result


TABLE: Table = {
    "relu": float_op(lambda x: np.maximum(x, ZERO)),
    "relu6": float_op(lambda x: np.clip(x, ZERO, np.float32(6))),
    "sigmoid": float_op(sigmoid),
    "silu": float_op(silu),
    "softplus": float_op(softplus),
    "softsign": float_op(lambda x: x / (ONE + np.abs(x))),
    "gelu": computes(gelu),
    "elu": computes(elu),
    "leaky_relu": computes(leaky_relu),
    "prelu": computes(prelu),
    "thresholded_relu": computes(thresholded_relu),
    "clamped_relu": computes(clamped_relu),
    "linear_activation": computes(linear_activation),
    "scaled_tanh": computes(scaled_tanh),
    "sigmoid_hard": computes(sigmoid_hard),
    "softplus_parametric": computes(softplus_parametric),
    "softmax": computes(softmax),
}
