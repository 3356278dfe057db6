"""The evaluator's ops by their names in the MIL specification of iOS 18, one file per family. Read base.py first."""

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
# compiled by compiler.py itself, because they use states, nested blocks or no tensor
CONTROL = ("const", "read_state", "write_state", "while_loop", "cond")

__all__ = ["CONTROL", "TABLE", "Op", "OpError", "Table"]
