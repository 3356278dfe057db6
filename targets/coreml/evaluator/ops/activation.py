"""Activation functions (Core ML MIL specification, activation)."""

from __future__ import annotations

import math

import numpy as np

from h1export.targets.coreml.evaluator.dtypes import Array
from h1export.targets.coreml.evaluator.ops.base import OpError, Table, axis_of, broadcastable, computes, floats
from h1export.targets.coreml.evaluator.ops.elementwise import erf, of_floats

ONE = np.float32(1)
ZERO = np.float32(0)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x): where e^-x overflows, the result is zero as it should be."""
    return ONE / (ONE + np.exp(-x))


def silu(x: Array) -> Array:
    return x / (ONE + np.exp(-x))


def softplus(x: Array) -> Array:
    """log(1 + e^x), without overflow."""
    return np.logaddexp(x, ZERO)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x * P(X <= x), X normal: exactly, or by one of two approximations."""
    floats(x)
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    if mode == "EXACT":
        factor = erf(x * np.float32(math.sqrt(0.5)))
    elif mode == "TANH_APPROXIMATION":
        factor = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))
    else:
        raise OpError(f"has mode {mode!r}, which the specification does not")
    return np.float32(0.5) * x * (ONE + factor)


def elu(x: Array, alpha: float) -> Array:
    return np.where(floats(x) > 0, x, np.float32(alpha) * np.expm1(np.minimum(x, ZERO)))


def leaky_relu(x: Array, alpha: float) -> Array:
    return np.where(floats(x) >= 0, x, np.float32(alpha) * x)


def prelu(x: Array, alpha: Array) -> Array:
    """alpha: one factor a channel, axis 1."""
    return np.where(floats(x) > 0, x, broadcastable(alpha, x.ndim, 1) * x)


def thresholded_relu(x: Array, alpha: float) -> Array:
    return np.where(floats(x) >= np.float32(alpha), x, ZERO)


def clamped_relu(x: Array, alpha: float, beta: float) -> Array:
    return np.minimum(np.where(floats(x) >= 0, x, np.float32(alpha) * x), np.float32(beta))


def linear_activation(x: Array, alpha: float, beta: float) -> Array:
    return np.float32(alpha) * floats(x) + np.float32(beta)


def scaled_tanh(x: Array, alpha: float, beta: float) -> Array:
    return np.float32(alpha) * np.tanh(np.float32(beta) * floats(x))


def sigmoid_hard(x: Array, alpha: float, beta: float) -> Array:
    return np.clip(linear_activation(x, alpha, beta), ZERO, ONE)


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """alpha, beta: one value a channel, axis 1."""
    return broadcastable(alpha, x.ndim, 1) * softplus(broadcastable(beta, x.ndim, 1) * floats(x))


def softmax(x: Array, axis: int = -1) -> Array:
    """e^x over its sum along ``axis``."""
    axis = axis_of(axis, x.ndim)
    powers = np.exp(floats(x) - x.max(axis, keepdims=True))
    result: Array = powers / powers.sum(axis, keepdims=True)
    return result


TABLE: Table = {
    "relu": of_floats(lambda x: np.maximum(x, ZERO)),
    "relu6": of_floats(lambda x: np.clip(x, ZERO, np.float32(6))),
    "sigmoid": of_floats(sigmoid),
    "silu": of_floats(silu),
    "softplus": of_floats(softplus),
    "softsign": of_floats(lambda x: x / (ONE + np.abs(x))),
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
