"""TensorRT-RTX itself loads the plugin, parses our nodes and builds engines, on a CPU, in a worker process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import files
from pathlib import Path

import pytest
from onnx import TensorProto, helper
from roofline import PUBLISHED

from h1export.targets.tensorrt.plugin.schema import OPS

Build = Callable[..., str]

SIZES = {
    "heads": 24,
    "groups": 1,
    "d_head": 64,
    "d_state": 128,
    "channels": PUBLISHED[1].channels,
    "kept": 3,
    "taps": 4,
    "one": 1,
}
ATTRIBUTES = {"SSMScan": {"chunk_size": 128, "dt_min": 0.0, "dt_max": float("inf")}, "CausalConv": {}}
LIBRARY = "libtensorrt_rtx.so"  # the parser opens it by this name when it adds a plugin; the package has another name
SCRIPT = """
import sys
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        if severity <= trt.ILogger.WARNING:
            print(text)

library, model, in_place, aliasing = sys.argv[1], sys.argv[2], sys.argv[3] == "1", sys.argv[4] == "1"
logger = Logger()
builder = trt.Builder(logger)
builder.get_plugin_registry().load_library(library)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(model):
    sys.exit("not parsed")
print("plugins", [network.get_layer(i).type for i in range(network.num_layers)].count(trt.LayerType.PLUGIN_V3))
config = builder.create_builder_config()
if in_place and aliasing:
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
config.num_compute_capabilities = 3
for i, capability in enumerate((trt.ComputeCapability.SM80, trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)):
    config.set_compute_capability(capability, i)
for most in (1, 2048):  # decode, prefill
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        fixed = lambda tokens: [size if size != -1 else (1, tokens)[axis] for axis, size in enumerate(tensor.shape)]
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, fixed(1), fixed(most), fixed(most))
    config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
print("no engine" if engine is None else "engine")
"""


@pytest.fixture
def rtx(driver: Path, tmp_path: Path) -> Build:
    """rtx(state_in_place, order=, dropped=, aliasing=) -> what the builder prints about a network of both ops."""
    (shipped,) = [file for file in files("tensorrt-rtx-cu13-libs") or [] if file.name.startswith(LIBRARY)]
    (tmp_path / LIBRARY).symlink_to(shipped.locate())

    def run(
        in_place: bool, order: Callable[[list[str]], list[str]] = list, dropped: str = "", *, aliasing: bool = True
    ) -> str:
        model = tmp_path / "model.onnx"
        model.write_bytes(network(in_place, order, dropped))
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            str(driver / "libh1export_plugin.so"),
            str(model),
            str(int(in_place)),
            str(int(aliasing)),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
        )
        return done.stdout + done.stderr

    return run


def network(in_place: bool, order: Callable[[list[str]], list[str]], dropped: str) -> bytes:
    """Return an ONNX model with one node for each op, whose inputs are all inputs of the graph."""
    nodes = []
    inputs = []
    outputs = []

    def info(name: str, kind: str, shape: Sequence[str | int]) -> None:
        dtype = TensorProto.FLOAT16 if kind == "*dtype" else TensorProto.FLOAT
        (outputs if "out" in name else inputs).append(helper.make_tensor_value_info(name, dtype, shape))

    for op in OPS:
        shapes = {name: [SIZES.get(size, size) for size in op.shapes[name].split()] for name in op.inputs}
        for name in op.inputs:
            info(f"{op.name}_{name}", op.kind(name), shapes[name])
        for i, name in enumerate(("x", op.state)):
            info(f"{op.name}_out{i}", op.kind(name), shapes[name])
        own = {"plugin_version": "1", "plugin_namespace": "h1export", "state_in_place": int(in_place)}
        attributes = {name: value for name, value in (own | ATTRIBUTES[op.name]).items() if name != dropped}
        taken = [f"{op.name}_{name}" for name in (order(op.inputs) if op.name == "SSMScan" else op.inputs)]
        nodes.append(
            helper.make_node(op.name, taken, [f"{op.name}_out0", f"{op.name}_out1"], domain="h1export", **attributes)
        )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("h1export", 1)]
    graph = helper.make_graph(nodes, "both", inputs, outputs=outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("in_place", [False, True])
def test_an_engine_is_built(in_place: bool, rtx: Build) -> None:
    said = rtx(in_place)
    assert "plugins 2\n" in said, said
    assert "\nengine\n" in said, said


def swapped(inputs: list[str]) -> list[str]:
    """Exchange dt and mask."""
    return [{"dt": "mask", "mask": "dt"}.get(name, name) for name in inputs]


def test_swapped_inputs_are_named(rtx: Build) -> None:
    said = rtx(False, order=swapped)
    assert "h1export::SSMScan: input dt is [1, 1], and should be [batch 1, tokens 1, heads 24]" in said
    assert "\nno engine\n" in said, said


def test_a_missing_attribute_is_named(rtx: Build) -> None:
    said = rtx(False, dropped="dt_max")
    assert "attribute dt_max is missing" in said
    assert "not parsed" in said


def test_a_state_in_place_needs_the_preview_feature(rtx: Build) -> None:
    said = rtx(True, aliasing=False)
    assert "ALIASED_PLUGIN_IO_10_03" in said
    assert "\nno engine\n" in said, said
