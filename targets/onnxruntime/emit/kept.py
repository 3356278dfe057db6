"""The positions whose logits a call asks for: the input num_logits_to_keep, and the slice of hidden states by it.

The traced program has the hidden states of the last position. The graph has those of the last n positions of every row
instead, or of all where n is 0, as in transformers and transformers.js. An n beyond the call's tokens means all, too.
"""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from h1export.graphs.program import args_of
from h1export.targets.onnx import aten as common
from h1export.targets.onnx.builder import Value
from h1export.targets.onnxruntime.emit.matmul_nbits import OrtContext

HIDDEN_DIMS = 3  # [batch, seq, hidden]; what else is narrowed has one number for each position


def narrow(c: OrtContext, node: Node) -> None:
    """Emit the hidden states of the kept positions; a narrow of anything else is that of ATen."""
    x = args_of(node)[0]
    if c.kept is None or x.meta["val"].dim() != HIDDEN_DIMS:
        return common.narrow(c, node)
    end = c.build.ints(np.iinfo(np.int64).max)
    return c.set(node, c.build.op("Slice", c.value(x), _first(c, c.kept), end, c.build.ints(1)))


def _first(c: OrtContext, kept: Value) -> Value:
    """Return -n, int64 [1]: counted from the end it is where the last n positions begin, and -0 is the beginning."""
    return c.build.once("kept", lambda: c.build.op("Neg", c.build.op("Reshape", kept, c.build.ints(-1))))
