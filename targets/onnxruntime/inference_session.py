"""ONNX Runtime's InferenceSession over an artifact's graphs, and the settings that suit them.

The table has MB of anonymous memory at rest, and of all memory at its peak: measured at the 0.5B shape, int4, with a
prompt of 1024 tokens and then single ones, on 2 threads. Speed is the same within noise.

| graph | arena and memory pattern | arena | pattern | neither |
|---|---|---|---|---|
| model.native.onnx | 377, 689 | 325, 636 | 174, 665 | 164, 628 |
| model.onnx | 1493, 1536 | 1091, 1134 | 563, 1871 | 557, 1904 |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.probes import PREFIX
from h1export.targets.onnx import sdk
from h1export.targets.onnx.graph_file import read_graph
from h1export.targets.onnxruntime import cuda_libraries, product_limits
from h1export.targets.onnxruntime.calls import Serial, refused
from h1export.targets.onnxruntime.float32_graph import float32_graph
from h1export.targets.onnxruntime.layouts import LAYOUTS, MODEL
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.variants import CPU, CUDA, FUSED_LEVEL, GraphVariant

NATIVE_MODEL = "model.native.onnx"  # the same model over our own kernels
SETTINGS = {  # genai_config.json has the same for onnxruntime-genai
    MODEL: {"enable_cpu_mem_arena": True, "enable_mem_pattern": False},
    NATIVE_MODEL: {"enable_cpu_mem_arena": False, "enable_mem_pattern": False},
}
PROVIDER_OPTIONS = {CUDA: {"use_tf32": "0"}}  # products in float32 are not rounded to TF32
CAPTURE = {"enable_cuda_graph": "1"}


def open_inference_session(
    artifact: Artifact,
    variant: GraphVariant,
    threads: int,
    *,
    float32: bool,
    library: Path | None,
    captured: bool = False,
    observed: bool = False,
) -> Any:
    """Open an InferenceSession on the provider that the graph is for.

    Args:
        artifact: The folder of the graphs.
        variant: How the graphs were built.
        threads: The number of threads; 0 leaves it to onnxruntime.
        float32: Whether to compute in float32 where the graph rounds activations, on a CPU where there is no such
            provider.
        library: The library of our own kernels, for model.native.onnx; None opens the layout's graph.
        captured: Whether runs can be captured as CUDA graphs, which run_options.py then chooses for each run.
        observed: Whether the values of model/falcon_h1/probes.py are outputs too.

    Raises:
        H1ExportError: onnxruntime cannot load the graph, or does not have or start the provider, or a weight is too
            large for its kernels.
    """
    ort = sdk.onnxruntime()
    provider = variant.provider
    built = OrtOptions.read(artifact)
    level = 0 if float32 else built.accuracy_level
    if library is None and (float32 or provider == CPU):
        product_limits.check(artifact, built.graph, level)
    graph = LAYOUTS[built.layout].graph_of(artifact) if library is None else NATIVE_MODEL
    path = artifact.folder / graph
    options = ort.SessionOptions()
    for name, value in SETTINGS[MODEL if library is None else NATIVE_MODEL].items():
        setattr(options, name, value)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are exceptions, whose one line is enough
    options.add_session_config_entry(FUSED_LEVEL, str(level))
    if library is not None:
        with refused(library, "onnxruntime cannot load our kernels"):
            options.register_custom_ops_library(str(library))
    if not float32:
        sdk.check_provider(provider)
    if provider == CUDA and CUDA in ort.get_available_providers():
        cuda_libraries.preload()
    chain = [
        (name, PROVIDER_OPTIONS.get(name, {}) | (CAPTURE if captured and name == CUDA else {}))
        for name in dict.fromkeys((provider, CPU))
        if name in ort.get_available_providers()
    ]
    again = "build the artifact again" + " without --captured-decode" * captured
    read_graph(path, artifact.manifest.files, graph.removesuffix(path.name))
    with refused(path, "onnxruntime cannot load it", again):
        model = (
            _changed(path, variant, options, float32=float32, observed=observed) if float32 or observed else str(path)
        )
        session = ort.InferenceSession(model, options, providers=chain)
    if not float32 and provider not in session.get_providers():  # onnxruntime only logs it, and would run on the CPU
        raise H1ExportError(
            provider, f"onnxruntime could not start it{cuda_libraries.missing()}", cuda_libraries.NEXT_STEP
        )
    return Serial(session) if captured else session


def _changed(path: Path, variant: GraphVariant, options: Any, *, float32: bool, observed: bool) -> bytes:
    """Return the model in float32 arithmetic, with its probes as outputs, or both. Its external data stays where it is.

    In float32 there are no fp16 activations, and products with integers have accuracy level 0.
    """
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    model = float32_graph(ir.load(path)) if float32 and variant.halves else ir.load(path)
    for node in model.graph:
        if float32 and "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        if observed:
            model.graph.outputs.extend(value for value in node.outputs if (value.name or "").startswith(PREFIX))
    if observed and not any((value.name or "").startswith(PREFIX) for value in model.graph.outputs):
        raise H1ExportError(path, "names no values between its ops", "build the artifact again")
    return bytes(ir.to_proto(model).SerializeToString())
