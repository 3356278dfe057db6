"""Elementwise arithmetic, comparison and casts (Core ML MIL specification, elementwise_unary and elementwise_binary)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from h1export.targets.coreml.evaluator.dtypes import BY_NAME, Array, tensor
from h1export.targets.coreml.evaluator.ops.base import Op, OpError, Table, computes, floats, moves

CASTS = ("bool", "fp16", "fp32", "int8", "int16", "int32", "uint8", "uint16")


def unary(function: Callable[[Array], Array], kind: Callable[..., Op] = computes) -> Op:
    """An op of one tensor."""

    def apply(x: Array) -> Array:
        return function(x)

    return kind(apply)


def binary(function: Callable[[Array, Array], Array], kind: Callable[..., Op] = computes) -> Op:
    """An op of two tensors that broadcast."""

    def apply(x: Array, y: Array) -> Array:
        return function(x, y)

    return kind(apply)


def of_floats(function: Callable[[Array], Array]) -> Op:
    """An op of one tensor that the specification has for floats only."""
    return unary(lambda x: function(floats(x)))


def erf(x: Array) -> Array:
    """Float32; numpy has none."""
    return torch.erf(tensor(np.asarray(floats(x)))).numpy()


def real_div(x: Array, y: Array) -> Array:
    """x / y, of floats: what a device makes of integers is not specified."""
    return np.divide(floats(x), floats(y))


def floor_div(x: Array, y: Array) -> Array:
    return np.floor_divide(x, _divisor(y))


def mod(x: Array, y: Array) -> Array:
    """The remainder with the divisor's sign."""
    return np.mod(x, _divisor(y))


def _divisor(y: Array) -> Array:
    if y.dtype.kind != "f" and not np.all(y):
        raise OpError("divides an integer by zero")
    return y


def log(x: Array, epsilon: float = 1e-45) -> Array:
    return np.log(floats(x) + np.float32(epsilon))


def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    return np.float32(1) / np.sqrt(floats(x) + np.float32(epsilon))


def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    return np.float32(1) / (floats(x) + np.float32(epsilon))


def clip(x: Array, alpha: float, beta: float) -> Array:
    """min(max(x, alpha), beta); the specification wants alpha < beta."""
    if alpha >= beta:
        raise OpError(f"clips to [{alpha}, {beta}], where alpha must be smaller")
    return np.clip(floats(x), np.float32(alpha), np.float32(beta))


def threshold(x: Array, alpha: float) -> Array:
    return np.maximum(floats(x), np.float32(alpha))


def cast(x: Array, dtype: str) -> Array:
    """To integers by truncation, to bool by comparison with zero; the caller rounds to fp16.

    Raises OpError for a value outside the integer type, which the specification leaves open.
    """
    if dtype not in CASTS:
        raise OpError(f"casts to {dtype!r}, where the specification has {', '.join(CASTS)}")
    target = BY_NAME[dtype].array
    if target.kind == "f":
        return x.astype(np.float32)
    if target.kind in "iu" and x.size and x.dtype != target:
        limits = np.iinfo(target)
        whole = np.trunc(x) if x.dtype.kind == "f" else x.astype(np.int64)
        if not bool(np.all((whole >= limits.min) & (whole <= limits.max))):
            raise OpError(
                f"casts a value outside {dtype}: {x.flat[np.argmin((whole >= limits.min) & (whole <= limits.max))]}"
            )
    return x.astype(target)


TABLE: Table = {
    "add": binary(np.add),
    "sub": binary(np.subtract),
    "mul": binary(np.multiply),
    "real_div": computes(real_div),
    "floor_div": computes(floor_div),
    "mod": computes(mod),
    "pow": binary(np.power),
    "maximum": binary(np.maximum, moves),
    "minimum": binary(np.minimum, moves),
    "equal": binary(np.equal),
    "not_equal": binary(np.not_equal),
    "greater": binary(np.greater),
    "greater_equal": binary(np.greater_equal),
    "less": binary(np.less),
    "less_equal": binary(np.less_equal),
    "logical_and": binary(np.logical_and),
    "logical_or": binary(np.logical_or),
    "logical_xor": binary(np.logical_xor),
    "logical_not": unary(np.logical_not),
    "abs": unary(np.abs),
    "sign": unary(np.sign),
    "square": unary(np.square),
    "identity": unary(lambda x: x, moves),
    "ceil": of_floats(np.ceil),
    "floor": of_floats(np.floor),
    "round": of_floats(np.rint),  # ties to even
    "exp": of_floats(np.exp),
    "exp2": unary(partial(np.exp2, dtype=np.float32)),
    "sqrt": of_floats(np.sqrt),
    "sin": of_floats(np.sin),
    "cos": of_floats(np.cos),
    "tan": of_floats(np.tan),
    "asin": of_floats(np.arcsin),
    "acos": of_floats(np.arccos),
    "atan": of_floats(np.arctan),
    "sinh": of_floats(np.sinh),
    "cosh": of_floats(np.cosh),
    "tanh": of_floats(np.tanh),
    "atanh": of_floats(np.arctanh),
    "erf": unary(erf),
    "log": computes(log),
    "rsqrt": computes(rsqrt),
    "inverse": computes(inverse),
    "clip": computes(clip),
    "threshold": computes(threshold),
    "cast": computes(cast),
}
