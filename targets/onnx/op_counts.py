"""What a graph on disk consists of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from h1export.errors import H1ExportError


def node_counts(file: Path) -> dict[str, int]:
    """Type of op -> how many nodes, subgraphs included; "domain.type" outside ONNX's own domain.

    External data is not read.
    """
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's and onnx_ir's exceptions share no base class
        raise H1ExportError(file, f"is no ONNX graph ({error})", "build the artifact again") from None
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return dict(Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes))
