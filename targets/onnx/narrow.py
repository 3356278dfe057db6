"""Matrices stored in the dtype of 16-bit activations, so that a runtime need not convert them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from h1export.artifact.weight_file import BLOCK_BYTES
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array
from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context, initializer_name

Narrow = Callable[[Callable[[], Array]], tuple[npt.NDArray[Any]]]  # the floats of some rows -> their bytes


def narrow_matrix(c: Context, expr: WeightExpr, dtype: ir.DataType, *, next_step: str) -> Value:
    """Return ``expr`` in fp16 or bf16 as an initializer, which is written once.

    Raises:
        H1ExportError: values beyond fp16; ``next_step`` is what the message then proposes.
    """

    def write() -> Value:
        return c.build.initializer(c.data.once((expr, dtype), lambda: _write(c, expr, dtype, next_step=next_step)))

    return c.build.once((expr, "matrix"), write)


def _write(c: Context, expr: WeightExpr, dtype: ir.DataType, *, next_step: str) -> ir.ExternalTensor:
    name = initializer_name(expr)
    tensor = c.data.place(name, dtype, expr.shape(c.store.shape))
    narrow: Narrow = partial(_fp16, name, next_step) if dtype == ir.DataType.FLOAT16 else _bf16
    c.data.fill([tensor], (partial(narrow, block) for block in expr.lazy_blocks(c.store, BLOCK_BYTES)))
    return tensor


def _fp16(name: str, next_step: str, block: Callable[[], Array]) -> tuple[npt.NDArray[Any]]:
    values = block()
    if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise H1ExportError(f'weights "{name}"', "hold values beyond fp16", next_step)
    return (values.astype(np.float16),)


def _bf16(block: Callable[[], Array]) -> tuple[npt.NDArray[Any]]:
    """Return the bits of bf16 as int16, because NumPy has no such dtype."""
    return (torch.from_numpy(block()).to(torch.bfloat16).view(torch.int16).numpy(),)
