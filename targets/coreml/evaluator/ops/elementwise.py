"""Elementwise arithmetic, comparison and casts (MIL specification: elementwise_unary and elementwise_binary)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from h1export.targets.coreml.evaluator.dtypes import BY_NAME, Array, tensor
from h1export.targets.coreml.evaluator.ops.base import Op, OpError, Table, computes, moves, require_floats

CASTS = ("bool", "fp16", "fp32", "int8", "int16", "int32", "uint8", "uint16")


def unary(function: Callable[[Array], Array], kind: Callable[..., Op] = computes) -> Op:
    """Define an op of one tensor."""

    def apply(x: Array) -> Array:
        return function(x)

    return kind(apply)


def binary(function: Callable[[Array, Array], Array], kind: Callable[..., Op] = computes) -> Op:
    """Define an op of two tensors that broadcast."""

    def apply(x: Array, y: Array) -> Array:
        return function(x, y)

    return kind(apply)


def float_op(function: Callable[[Array], Array]) -> Op:
    """Define an op of one tensor that the specification allows for floats only."""
    return unary(lambda x: function(require_floats(x)))


def erf(x: Array) -> Array:
    """Compute the error function in float32 with torch, because numpy does not have it."""
    return torch.erf(tensor(np.asarray(require_floats(x)))).numpy()


def real_div(x: Array, y: Array) -> Array:
    """Compute x / y of floats; the result of integers is not specified."""
    return np.divide(require_floats(x), require_floats(y))


def floor_div(x: Array, y: Array) -> Array:
    """Compute the largest integer not above x / y."""
    return np.floor_divide(x, _divisor(y))


def mod(x: Array, y: Array) -> Array:
    """Compute the remainder of x / y, which has the sign of y."""
    return np.mod(x, _divisor(y))


def _divisor(y: Array) -> Array:
    if y.dtype.kind != "f" and not np.all(y):
        raise OpError("divides an integer by zero")
    return y


def log(x: Array, epsilon: float = 1e-45) -> Array:
    """Compute the natural logarithm of x + epsilon."""
    return np.log(require_floats(x) + np.float32(epsilon))


def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    """Compute 1 / sqrt(x + epsilon)."""
    return np.float32(1) / np.sqrt(require_floats(x) + np.float32(epsilon))


def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    """Compute 1 / (x + epsilon)."""
    return np.float32(1) / (require_floats(x) + np.float32(epsilon))


def clip(x: Array, alpha: float, beta: float) -> Array:
    """Compute min(max(x, alpha), beta); the specification requires alpha < beta."""
    if alpha >= beta:
        raise OpError(f"clips to [{alpha}, {beta}], and the first bound must be smaller")
    return np.clip(require_floats(x), np.float32(alpha), np.float32(beta))


def threshold(x: Array, alpha: float) -> Array:
    """Compute max(x, alpha)."""
    return np.maximum(require_floats(x), np.float32(alpha))


def cast(x: Array, dtype: str) -> Array:
    """Cast to integers by truncation and to bool by comparison with zero; the caller rounds to fp16.

    Raises:
        OpError: a value is outside the integer type; its result is not specified.
    """
    if dtype not in CASTS:
        raise OpError(f"casts to {dtype!r}, and the specification allows {', '.join(CASTS)}")
    target = BY_NAME[dtype].array
    if target.kind == "f":
        return x.astype(np.float32)
    if target.kind in "iu" and x.size and x.dtype != target:
        limits = np.iinfo(target)
        whole = np.trunc(x) if x.dtype.kind == "f" else x.astype(np.int64)
        inside = (whole >= limits.min) & (whole <= limits.max)
        if not bool(np.all(inside)):
            raise OpError(f"casts a value outside {dtype}: {x.flat[np.argmin(inside)]}")
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
    "ceil": float_op(np.ceil),
    "floor": float_op(np.floor),
    "round": float_op(np.rint),  # ties to even
    "exp": float_op(np.exp),
    "exp2": unary(partial(np.exp2, dtype=np.float32)),
    "sqrt": float_op(np.sqrt),
    "sin": float_op(np.sin),
    "cos": float_op(np.cos),
    "tan": float_op(np.tan),
    "asin": float_op(np.arcsin),
    "acos": float_op(np.arccos),
    "atan": float_op(np.arctan),
    "sinh": float_op(np.sinh),
    "cosh": float_op(np.cosh),
    "tanh": float_op(np.tanh),
    "atanh": float_op(np.arctanh),
    "erf": unary(erf),
    "log": computes(log),
    "rsqrt": computes(rsqrt),
    "inverse": computes(inverse),
    "clip": computes(clip),
    "threshold": computes(threshold),
    "cast": computes(cast),
}
