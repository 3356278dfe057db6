"""What a machine has of what an ONNX Runtime artifact needs: the execution provider, and a compiler for our kernels."""

from __future__ import annotations

from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.base import Finding
from h1export.targets.onnxruntime import native_library
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.onnxruntime.variants import GRAPH_VARIANTS


def examine(artifact: Artifact) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``; without our kernels the artifact runs on those of the runtime."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        yield Finding("ONNX Runtime", False, f"cannot be imported ({error})", "pip install 'h1export[ort]'")
        return
    yield Finding("ONNX Runtime", True, str(ort.__version__))
    provider = GRAPH_VARIANTS[OrtOptions.read(artifact).graph].provider
    available = list(ort.get_available_providers())
    has = provider in available
    next_step = "" if has else f"install the build of ONNX Runtime that has {provider}"
    yield Finding("execution provider", has, f"{provider} is needed; here are {', '.join(available)}", next_step)
    if NATIVE_MODEL in artifact.manifest.files:
        yield _kernels()
    if has:
        yield _loaded(artifact)


def _kernels() -> Finding:
    name = "h1export's kernels"
    try:
        native_library.library()
    except H1ExportError as error:
        return Finding(name, None, f"{error.what}; ONNX Runtime's own are used", error.next_step)
    return Finding(name, True, "compile here")


def _loaded(artifact: Artifact) -> Finding:
    try:
        runner = OnnxRuntimeRunner(artifact, 0, False, kernels="auto")
    except H1ExportError as error:
        return Finding.of("loading", error)
    return Finding("loading", True, runner.provenance.kernels)
