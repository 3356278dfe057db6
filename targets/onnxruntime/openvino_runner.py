"""Run the artifact of --graph portable with OpenVINO instead of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.probes import PREFIX
from h1export.targets.onnx.graph_file import read_graph
from h1export.targets.onnxruntime import openvino_sdk
from h1export.targets.onnxruntime.calls import refused
from h1export.targets.onnxruntime.options import Graph
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.options import Kernels

DEVICE = "CPU"
GRAPH: Graph = "portable"  # whose operators are ONNX's own
# Whether to compute in float32 -> the settings. In PERFORMANCE mode, OpenVINO rounds the activations of products with
# integers to int8 in groups (DYNAMIC_QUANTIZATION_GROUP_SIZE), and everything to bf16 where the CPU has it
# (INFERENCE_PRECISION_HINT); ACCURACY turns both off. Source: "Precision Control" in its documentation.
MODES = {False: {"EXECUTION_MODE_HINT": "PERFORMANCE"}, True: {"EXECUTION_MODE_HINT": "ACCURACY"}}


class OpenVinoRunner(OnnxRuntimeRunner):
    """A Runner over the graph of --graph portable in OpenVINO, with the states of OnnxRuntimeRunner.

    An artifact of accuracy level 0 is computed in float32. Otherwise OpenVINO rounds what it rounds by itself.
    Arguments and errors are those of OnnxRuntimeRunner; a graph with operators that are not ONNX's own is refused.
    """

    def _choose(self, threads: int, float32: bool, kernels: Kernels) -> None:
        if self._options.graph != GRAPH:
            what = f"--graph {self._options.graph} has operators of ONNX Runtime's own, which OpenVINO does not have"
            raise H1ExportError(self._artifact.folder, what, f"build it with --graph {GRAPH}, or leave out --kernels")
        self._library, self._fallback = None, ""
        self._kernels = f"{openvino_sdk.NAME} {openvino_sdk.version()}"
        graph = self._layout.graph_of(self._artifact)
        self._open = partial(_open, self._artifact, graph, threads, float32=self._float32)

    def _run(self, session: Any, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        with refused(self._artifact.folder, f"{self._kernels} cannot compute its graph"):
            found: list[npt.NDArray[Any]] = session.run(names, feeds)
            return found


class CompiledModel:
    """A model that OpenVINO has compiled, which is called as an InferenceSession is.

    A request of OpenVINO takes one call at a time, so there are as many as threads have called at once.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def run(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Return the outputs of these names, which are the caller's own."""
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self._compiled.create_infer_request()
        found = request.infer(dict(feeds))
        values = [found[name] for name in names]
        self._idle.put(request)
        return values

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return an object with the attribute ``name`` for each input."""
        return [SimpleNamespace(name=port.get_any_name()) for port in self._compiled.inputs]

    def get_overridable_initializers(self) -> list[SimpleNamespace]:
        """Return nothing: OpenVINO makes constants of them."""
        return []

    def get_outputs(self) -> list[SimpleNamespace]:
        """Return an object with the attribute ``name`` for each output."""
        return [SimpleNamespace(name=output.get_any_name()) for output in self._compiled.outputs]


def _open(
    artifact: Artifact, graph: str, threads: int, *, float32: bool, captured: bool = False, observed: bool = False
) -> CompiledModel:
    """Compile the graph of this path in ``artifact``; the other arguments are those of ``open_inference_session``."""
    core = openvino_sdk.openvino().Core()
    settings = MODES[float32] | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
    path = artifact.folder / graph
    nodes = read_graph(path, artifact.manifest.files, graph.removesuffix(path.name)).graph.node
    with refused(path, "OpenVINO cannot load it"):
        model = core.read_model(path)
        if observed:
            model.add_outputs([name for node in nodes for name in node.output if name.startswith(PREFIX)])
        return CompiledModel(core.compile_model(model, DEVICE, settings))
