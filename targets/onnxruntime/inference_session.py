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

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import KEPT
from h1export.targets.onnx import sdk
from h1export.targets.onnx.graph_file import read_graph
from h1export.targets.onnxruntime import cuda_libraries, product_limits
from h1export.targets.onnxruntime.calls import Serial, refused
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
        model: str | bytes = str(path)
        if float32 or observed:
            # it needs onnx_ir, without which a program that only runs artifacts starts much faster
            from h1export.targets.onnxruntime.changed_graph import changed

            model = changed(path, variant, options, float32=float32, observed=observed)
        session = ort.InferenceSession(model, options, providers=chain)
    if not float32 and provider not in session.get_providers():  # onnxruntime only logs it, and would run on the CPU
        raise H1ExportError(
            provider, f"onnxruntime could not start it{cuda_libraries.missing()}", cuda_libraries.NEXT_STEP
        )
    return Serial(session) if captured else session


def asks_for_logits(session: Any) -> bool:
    """Whether the graph of ``session`` has the input that says how many positions get logits.

    The graph of --graph cuda and those of earlier builds do not.
    """
    return any(port.name == KEPT for port in (*session.get_inputs(), *session.get_overridable_initializers()))
