"""Every op that the evaluator has, by its name in the MIL specification of iOS 18; one file a family."""

from __future__ import annotations

from h1export.targets.coreml.evaluator.ops import (
    activation,
    attention,
    constexpr,
    convolution,
    creation,
    elementwise,
    indexing,
    linear,
    normalization,
    reduction,
    scatter,
    shape,
    slicing,
    sorting,
)
from h1export.targets.coreml.evaluator.ops.base import Op, OpError, Table

FAMILIES: tuple[Table, ...] = (
    activation.TABLE,
    attention.TABLE,
    constexpr.TABLE,
    convolution.TABLE,
    creation.TABLE,
    elementwise.TABLE,
    indexing.TABLE,
    linear.TABLE,
    normalization.TABLE,
    reduction.TABLE,
    scatter.TABLE,
    shape.TABLE,
    slicing.TABLE,
    sorting.TABLE,
)
TABLE: Table = {name: op for family in FAMILIES for name, op in family.items()}
# run by the compiler itself, because they touch states, blocks or nothing at all
CONTROL = ("const", "read_state", "write_state", "while_loop", "cond")

__all__ = ["CONTROL", "TABLE", "Op", "OpError", "Table"]
