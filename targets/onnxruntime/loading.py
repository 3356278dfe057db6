"""Load artifacts of the target "ort"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.targets.onnxruntime import openvino_sdk
from h1export.targets.onnxruntime.openvino_runner import OpenVinoRunner
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.options import Kernels


def load(
    artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
) -> OnnxRuntimeRunner:
    """See Load. The other runtime is OpenVINO."""
    chosen = OpenVinoRunner if kernels == openvino_sdk.NAME else OnnxRuntimeRunner
    return chosen(artifact, threads, float32, kernels=kernels)
