"""The options of one run of an InferenceSession: which captured CUDA graph it replays, if any.

Source: "CUDA Execution Provider", section "Using CUDA Graphs", of ONNX Runtime's documentation.
"""

from __future__ import annotations

from typing import Any

from h1export.targets.onnx import sdk

GRAPH_ID = "gpu_graph_id"
UNCAPTURED = -1  # the number that ONNX Runtime keeps for runs without a captured graph


def run_options(graph: int = UNCAPTURED) -> Any:
    """Return a RunOptions for the captured graph of this number; every other run of such a session has to say -1."""
    options = sdk.onnxruntime().RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph))
    return options
