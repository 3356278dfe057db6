"""The process that builds an engine: `python -m h1export.targets.tensorrt.engine.build_process FOLDER`, as FOLDER/recipe.json says.

A process of its own, because a builder may abort. What it does and hears it prints as JSON, a line each; see engine.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.config import EngineConfig


def tell(**facts: object) -> None:
    """One line to the process that waits."""
    print(json.dumps(facts), flush=True)


def build(folder: Path) -> bool:
    """Write the engine; False where a step failed, after saying why."""
    recipe = EngineConfig.read(folder)
    trt = sdk.module(recipe.runtime, recipe.versions)
    tell(version=trt.__version__)
    logger = sdk.logger(trt, lambda said: tell(said=said))
    builder = trt.Builder(logger)
    tell(stage="load the plugin")
    if builder.get_plugin_registry().load_library(str(folder / recipe.plugin)) is None:
        return False
    tell(stage="parse the network")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 has no other networks
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / recipe.network)):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            tell(said=f"{error.desc()} (node {error.node_name()!r}, {error.node_operator()})")
        return False
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    tell(plugins=kinds.count(trt.LayerType.PLUGIN_V3))
    tell(stage="build the engine")
    engine = builder.build_serialized_network(network, _config(trt, builder, network, recipe))
    if engine is None:
        return False
    (folder / recipe.engine).write_bytes(engine)
    return True


def _config(trt: Any, builder: Any, network: Any, recipe: EngineConfig) -> Any:
    config = builder.create_builder_config()
    for feature in recipe.preview_features:
        config.set_preview_feature(getattr(trt.PreviewFeature, feature), True)
    for flag in recipe.builder_flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if recipe.architectures:
        config.num_compute_capabilities = len(recipe.architectures)
        for index, architecture in enumerate(recipe.architectures):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{architecture}"), index)
    dynamic = [tensor for index in range(network.num_inputs) if -1 in tuple((tensor := network.get_input(index)).shape)]
    for shapes in recipe.profiles:
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            profile.set_shape(tensor.name, *shapes.inputs[tensor.name])
        config.add_optimization_profile(profile)
    tell(profiles=config.num_optimization_profiles)
    return config


if __name__ == "__main__":
    sys.exit(0 if build(Path(sys.argv[1])) else 1)
