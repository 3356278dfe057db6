"""Linear algebra (Core ML MIL specification, linear), in float32 or in the integers given."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from h1export.targets.coreml.evaluator.dtypes import Array, tensor
from h1export.targets.coreml.evaluator.ops.base import Arrays, OpError, Table, computes

EQUATIONS = ("abcd,adce->abce", "abc,cbd->abd")  # the two that Core ML has, up to the names of their axes


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [*D, D_in], weight [D_out, D_in], bias [D_out]: [*D, D_out]."""
    return functional.linear(tensor(x), tensor(weight), None if bias is None else tensor(bias)).numpy()


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """numpy's rules; a transposition has no effect on a vector."""
    if transpose_x and x.ndim > 1:
        x = x.swapaxes(-1, -2)
    if transpose_y and y.ndim > 1:
        y = y.swapaxes(-1, -2)
    return torch.matmul(tensor(x), tensor(y)).numpy()


def einsum(values: Arrays, equation: str) -> Array:
    """The product over the last axis of the first and the third from last of the second; other equations raise OpError."""
    names: dict[str, str] = {}
    plain = "".join(
        names.setdefault(c, "abcdefghij"[min(len(names), 9)]) if c.isalpha() else c for c in equation if c != " "
    )
    if plain not in EQUATIONS or len(values) != 2:
        raise OpError(
            f"has the equation {equation!r} for {len(values)} tensors, where the specification has nchw,nwhu->nchu and chw,whr->chr"
        )
    result: Array = np.einsum(plain, *values)
    return result


TABLE: Table = {"linear": computes(linear), "matmul": computes(matmul), "einsum": computes(einsum)}
