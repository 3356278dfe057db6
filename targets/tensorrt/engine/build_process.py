"""The worker process that builds an engine: ``python -m h1export.targets.tensorrt.engine.build_process FOLDER``.

A builder of TensorRT may abort its process, so it does not run in ours. The worker process follows FOLDER/recipe.json
and prints one JSON object per line: errors of TensorRT and facts about the build. ``build.py`` reads them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, RECIPE, EngineConfig
from h1export.targets.tensorrt.network.layout import MODEL
from h1export.writing import write_into

LOAD_PLUGIN = "load the plugin"


def report(**facts: object) -> None:
    """Print facts as one line for the parent process; the names are ``error`` and the fields of BuildLog."""
    print(json.dumps(facts), flush=True)


def build(folder: Path) -> bool:
    """Write the engine of the artifact in ``folder``; return False where a step failed and its errors were reported."""
    config = EngineConfig.read(folder)
    trt = sdk.module(config.runtime, config.versions)
    report(version=trt.__version__)
    logger = sdk.logger(trt, lambda error: report(error=error))
    builder = trt.Builder(logger)
    report(stage=LOAD_PLUGIN)
    if builder.get_plugin_registry().load_library(str(folder / LIBRARY)) is None:
        return False
    report(stage="parse the network")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 has only such networks
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / MODEL)):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            report(error=f"{error.desc()} (node {error.node_name()!r}, {error.node_operator()})")
        return False
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    report(plugins=kinds.count(trt.LayerType.PLUGIN_V3))
    report(stage="build the engine")
    settings = _builder_config(trt, builder, network, config=config)
    engine = None if settings is None else builder.build_serialized_network(network, settings)
    if engine is None:
        return False
    report(stage="write the engine")
    try:
        write_into(folder, ENGINE, engine)
    except H1ExportError as error:
        report(error=error.what)
        return False
    return True


def _builder_config(trt: Any, builder: Any, network: Any, *, config: EngineConfig) -> Any:
    """Return TensorRT's IBuilderConfig with the settings of ``config``; None where they do not fit the network."""
    made = builder.create_builder_config()
    for feature in config.preview_features:
        made.set_preview_feature(getattr(trt.PreviewFeature, feature), True)
    for flag in config.builder_flags:
        made.set_flag(getattr(trt.BuilderFlag, flag))
    if config.architectures:
        made.num_compute_capabilities = len(config.architectures)
        for index, architecture in enumerate(config.architectures):
            made.set_compute_capability(getattr(trt.ComputeCapability, f"SM{architecture}"), index)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    for shapes in config.profiles:
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            if tensor.name not in shapes.inputs:
                report(error=f"{RECIPE} has no shapes of input {tensor.name} in profile {shapes.name}")
                return None
            profile.set_shape(tensor.name, *shapes.inputs[tensor.name])
        made.add_optimization_profile(profile)
    report(profiles=made.num_optimization_profiles)
    return made


if __name__ == "__main__":
    sys.exit(0 if build(Path(sys.argv[1])) else 1)
