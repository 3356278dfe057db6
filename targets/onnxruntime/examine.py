"""What a machine has of what an ONNX Runtime artifact needs: the execution provider, our kernels or a compiler."""

from __future__ import annotations

from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.base import Finding
from h1export.targets.onnx import sdk
from h1export.targets.onnxruntime import native_library, openvino_runner, openvino_sdk
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.onnxruntime.variants import variant_in


def examine(artifact: Artifact) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``; without our kernels the artifact runs on those of the runtime."""
    try:
        ort = sdk.onnxruntime()
    except H1ExportError as error:
        yield Finding.of("ONNX Runtime", error)
        return
    yield Finding("ONNX Runtime", True, str(ort.__version__))
    provider = variant_in(artifact).provider
    try:
        sdk.check_provider(provider)
    except H1ExportError as error:
        yield Finding.of("execution provider", error)
        return
    yield Finding("execution provider", True, provider)
    if NATIVE_MODEL in artifact.manifest.files:
        yield _kernels()
    if OrtOptions.read(artifact).graph == openvino_runner.GRAPH:
        yield _openvino()
    yield _loaded(artifact)


def _openvino() -> Finding:
    name = "OpenVINO"
    try:
        return Finding(name, True, f"{openvino_sdk.version()}: --kernels {openvino_sdk.NAME} runs the artifact in it")
    except H1ExportError as error:
        return Finding(name, None, error.what, error.next_step)


def _kernels() -> Finding:
    name = "h1export's kernels"
    try:
        library = native_library.library()
    except H1ExportError as error:
        return Finding(name, None, f"{error.what}; ONNX Runtime's own are used", error.next_step)
    return Finding(
        name, True, "compile here" if library.name == native_library.NAME else f"of the wheel: {library.name}"
    )


def _loaded(artifact: Artifact) -> Finding:
    try:
        runner = OnnxRuntimeRunner(artifact, 0, False, kernels="auto")
    except H1ExportError as error:
        return Finding.of("loading", error)
    return Finding("loading", True, runner.provenance.kernels)
