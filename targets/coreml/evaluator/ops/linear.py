"""Linear algebra (MIL specification: linear), in float32 or in the integer type of the inputs."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from h1export.targets.coreml.evaluator.dtypes import Array, tensor
from h1export.targets.coreml.evaluator.ops.base import Arrays, OpError, Table, computes

EQUATIONS = ("abcd,adce->abce", "abc,cbd->abd")  # the two of the specification, up to the names of the axes


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Compute x weight^T + bias, [*D, D_out], of x [*D, D_in], weight [D_out, D_in] and bias [D_out]."""
    return functional.linear(tensor(x), tensor(weight), None if bias is None else tensor(bias)).numpy()


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Multiply by the rules of numpy.matmul; a transposition has no effect on a vector."""
    if transpose_x and x.ndim > 1:
        x = x.swapaxes(-1, -2)
    if transpose_y and y.ndim > 1:
        y = y.swapaxes(-1, -2)
    return torch.matmul(tensor(x), tensor(y)).numpy()


def einsum(values: Arrays, equation: str) -> Array:
    """Multiply along the last axis of the first tensor and the third-to-last axis of the second.

    Other equations raise OpError.
    """
    names: dict[str, str] = {}
    plain = "".join(
        names.setdefault(c, "abcdefghij"[min(len(names), 9)]) if c.isalpha() else c for c in equation if c != " "
    )
    if plain not in EQUATIONS or len(values) != 2:
        raise OpError(
            f"has the equation {equation!r} for {len(values)} tensors, and the specification allows "
            "nchw,nwhu->nchu and chw,whr->chr of two tensors"
        )
    result: Array = np.einsum(plain, *values)
    return result


TABLE: Table = {"linear": computes(linear), "matmul": computes(matmul), "einsum": computes(einsum)}
