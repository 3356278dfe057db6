"""Executes a TensorRT network on a CPU: standard nodes by ONNX Runtime, the plugin's nodes by the ops' references."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, TensorProto, helper, load_model_from_string

from h1export.errors import H1ExportError
from h1export.targets.onnx import sdk
from h1export.targets.onnx.graph_file import Files, checked_bytes
from h1export.targets.tensorrt.emulator.partition import Partitioner, Subgraph
from h1export.targets.tensorrt.network.layout import MODEL, TORCH
from h1export.targets.tensorrt.plugin.schema import OPS

Values = dict[str, npt.NDArray[Any]]


class Execution:
    """The network of the artifact in ``folder``, ready to run, in several threads at once too.

    Args:
        folder: the artifact's folder.
        files: names of the artifact's files; the network may not read others.
        rounded: round to the dtypes that the network declares after each op; otherwise compute in float32 throughout.
        threads: threads of ONNX Runtime; 0: its own choice.
        shown: values inside the network that ``run`` returns besides the outputs.

    Raises:
        H1ExportError: onnxruntime is not installed or cannot load a subgraph, or the network's data is stored outside
            ``files``.
    """

    def __init__(
        self, folder: Path, files: Files, rounded: bool, *, threads: int = 0, shown: Collection[str] = ()
    ) -> None:
        self._folder = folder
        self._threads = threads
        self._rounded = rounded
        network = load_model_from_string(checked_bytes(folder / MODEL, files))
        self._partitioner = Partitioner(network, rounded, shown)
        self._shown = tuple(shown)
        self._outputs = [output.name for output in network.graph.output]
        self._peaks: dict[str, float] = {}
        self._noting = Lock()
        self._constants: Values = {}
        self._open(self._partitioner.constants())(self._constants)
        self._steps = [
            self._open(step) if isinstance(step, Subgraph) else self._plugin(step) for step in self._partitioner.steps()
        ]

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Values:
        """Run the network once and return its outputs and the values ``shown``.

        Values that are fp16 or bf16 in the network are float32 in ``inputs`` and in the result.
        """
        values = {**self._constants, **inputs}
        for step in self._steps:
            step(values)
        return {name: values[name] for name in (*self._outputs, *self._shown)}

    def magnitudes(self) -> Mapping[str, float]:
        """Return kind of op -> the largest magnitude of its results before they were rounded to fp16, over all runs."""
        with self._noting:
            return dict(self._peaks)

    def _open(self, subgraph: Subgraph) -> Callable[[Values], None]:
        """Return the step that runs ``subgraph`` with ONNX Runtime and adds its outputs to the values."""
        ort = sdk.onnxruntime()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the nodes must stay as they are
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3  # errors only: warnings about single subgraphs do not help a user
        # Each subgraph has a session, and their idle threads would compete for the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        try:
            session = ort.InferenceSession(
                subgraph.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exception types share no base class
            raise H1ExportError(
                self._folder / MODEL, f"onnxruntime cannot load it ({error})", "build the artifact again"
            ) from None
        names = [*subgraph.outputs, *subgraph.peaks]

        def step(values: Values) -> None:
            found = dict(zip(names, session.run(names, {name: values[name] for name in subgraph.inputs}), strict=True))
            for peak, op in subgraph.peaks.items():
                self._note(op, float(found.pop(peak)))
            values.update(found)

        return step

    def _note(self, op: str, magnitude: float) -> None:
        with self._noting:
            self._peaks[op] = float(np.maximum(self._peaks.get(op, 0.0), magnitude))  # unlike max, this keeps NaN

    def _plugin(self, node: NodeProto) -> Callable[[Values], None]:
        """Return the step that runs the op's reference in float32, with arguments by the names of its schema."""
        op = next(op for op in OPS if op.name == node.op_type)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        reference = getattr(torch.ops.h1, op.space).default

        def step(values: Values) -> None:
            given = dict(zip(op.inputs, (torch.from_numpy(values[name]) for name in node.input), strict=True))
            arguments = [given[a.name] if a.name in given else attributes[a.name] for a in op.schema.arguments]
            for name, result in zip(node.output, reference(*arguments), strict=True):
                values[name] = self._narrowed(node.op_type, name, result).numpy()

        return step

    def _narrowed(self, op: str, name: str, result: torch.Tensor) -> torch.Tensor:
        """Round ``result`` to the dtype that the network declares for it, and return it in float32."""
        if not (self._rounded and self._partitioner.is_half(name)):
            return result
        if self._partitioner.half == TensorProto.FLOAT16:
            self._note(op, float(result.abs().max()))
        return result.to(TORCH[self._partitioner.half]).float()
