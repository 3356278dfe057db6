"""Load artifacts of the target "ort"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.onnxruntime import native_library, openvino_sdk
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL
from h1export.targets.onnxruntime.openvino_runner import OpenVinoRunner
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.options import Kernels

COMPILED = "compiled"


def load(
    artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
) -> OnnxRuntimeRunner:
    """See Load. The other runtime is OpenVINO."""
    if kernels == COMPILED:
        if NATIVE_MODEL not in artifact.manifest.files:
            raise H1ExportError(artifact.folder, f"has no {NATIVE_MODEL}", f"leave out --kernels {kernels}")
        with native_library.compiling():
            return OnnxRuntimeRunner(artifact, threads, float32, kernels="native")
    chosen = OpenVinoRunner if kernels == openvino_sdk.NAME else OnnxRuntimeRunner
    return chosen(artifact, threads, float32, kernels=kernels)
