"""Which keys a query sees, in operators that several targets share."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from h1export.targets.onnx.builder import Value
from h1export.targets.onnx.emit import Context


def visible_keys(c: Context, mask: Any, column: Value, *, own: Value) -> Value:
    """Return bool [batch, seq, columns]: real keys up to the query's own column, and that one even where it is a pad.

    A query that sees at least itself keeps a padded row finite.

    Args:
        c: where the nodes go.
        mask: the node of the mask, [batch, columns], 1 for real tokens.
        column: int64 [columns], the number of each column.
        own: int64, broadcast against [batch, seq, 1]: the column of each query.
    """
    b = c.build
    real = b.op("Cast", b.op("Unsqueeze", c.value(mask), b.ints(1)), to=int(ir.DataType.BOOL))
    seen = b.op("And", b.op("LessOrEqual", column, own), real)
    return b.op("Or", seen, b.op("Equal", column, own))
