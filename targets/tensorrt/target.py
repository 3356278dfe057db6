"""The target "trt": an ONNX network, the plugin of the h1 ops, and an engine where TensorRT-RTX builds one here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from h1export.artifact.artifact import Artifact
from h1export.artifact.files import sha256_file
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.plugins.gpu.cubin import ARCHITECTURES
from h1export.progress import Progress
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Finding, Lowered
from h1export.targets.onnx.op_counts import node_counts
from h1export.targets.tensorrt import examine, plugin, readme, sdk
from h1export.targets.tensorrt.engine import build
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, RECIPE, RTX_ARCHITECTURES, TRTEXEC, EngineConfig
from h1export.targets.tensorrt.engine.requirements import EngineRequirements
from h1export.targets.tensorrt.network import lowering
from h1export.targets.tensorrt.network.layout import DATA, MODEL, Ports
from h1export.targets.tensorrt.options import RuntimeName, TensorRTOptions

OF_RTX = (80, 86, 89, 120, 121)  # compute capabilities that RTX builds for, and our kernels are compiled for


class TensorRTTarget:
    """TensorRT: see Target."""

    name = "trt"
    packages = ("numpy", "onnx-ir", "torch")

    def check(self, config: FalconH1Config, options: TensorRTOptions) -> None:
        """See SelectiveTarget."""
        if config.tie_word_embeddings and options.embedding == "int8":
            what = "int8 is for an embedding that is not the head: TensorRT multiplies by weights alone in int4 only"
            raise H1ExportError("--embedding", what, "use --embedding int4 or fp16, or --target ort, which has int8")

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: TensorRTOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        lowering.check(program.config, integers, options)
        runtime = options.runtime or ("rtx" if sdk.has("rtx") else "tensorrt")
        architectures = _architectures(runtime, options)
        config = program.config
        kernels = plugin.kernels(config.mamba_d_head, config.mamba_d_state, config.mamba_d_conv, dtype=options.compute)
        if runtime == "rtx" and not sdk.has(runtime):
            raise H1ExportError(
                sdk.NAMES[runtime], "is not installed", f"{sdk.INSTALL[runtime]}, or build with --runtime tensorrt"
            )
        made = {}
        readme.write(stage.folder, runtime, options)
        if not stage.dry:
            progress.stage("plugin")
            made = plugin.write(stage.folder / Path(LIBRARY).parent, kernels, architectures)
        progress.stage("weights", store.nbytes)
        lowered = lowering.write(program, store, integers, options=options, stage=stage)
        if stage.dry:
            return lowered
        requirements = replace(
            _finish(stage.folder, runtime, architectures, inputs=lowered.inputs, options=options, progress=progress),
            kernels=made,
        )
        return replace(lowered, requirements=requirements.to_json())

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        return {MODEL: node_counts(artifact.folder / MODEL)}

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        return examine.examine(artifact, build=build, progress=progress)


def _architectures(runtime: RuntimeName, options: TensorRTOptions) -> tuple[int, ...]:
    """Raises H1ExportError for one that the runtime, or our kernels, are not built for."""
    known = OF_RTX if runtime == "rtx" else ARCHITECTURES
    for architecture in options.architectures:
        if architecture not in known:
            what = f"{architecture} is no compute capability that {sdk.NAMES[runtime]} and the kernels are built for"
            raise H1ExportError("--sm", what, f"one of {', '.join(map(str, known))}")
    return tuple(dict.fromkeys(options.architectures)) or (RTX_ARCHITECTURES if runtime == "rtx" else ARCHITECTURES)


def _finish(
    folder: Path,
    runtime: RuntimeName,
    architectures: tuple[int, ...],
    *,
    inputs: Ports,
    options: TensorRTOptions,
    progress: Progress,
) -> EngineRequirements:
    """The recipe, and what it makes where its builder runs without a GPU."""
    hashes = {name: sha256_file(folder / name) for name in (MODEL, DATA, LIBRARY)}
    config = EngineConfig.of(runtime, architectures, inputs, options=options, hashes=hashes)
    (folder / RECIPE).write_text(config.to_json(), encoding="utf-8")
    (folder / TRTEXEC).write_text(f"{config.trtexec()}\n", encoding="utf-8")
    if runtime == "tensorrt":
        return EngineRequirements(runtime, "", architectures, plugin=hashes[LIBRARY], engine="")
    build_log = build.build(folder, progress)
    return EngineRequirements(
        runtime, build_log.version, architectures, plugin=hashes[LIBRARY], engine=sha256_file(folder / ENGINE)
    )


target = TensorRTTarget()
