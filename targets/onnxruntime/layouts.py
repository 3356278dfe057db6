"""How the files of an artifact, and the inputs and outputs of its graph, are named: the values of --layout.

Source of the names of transformers.js: src/configs.js (getCacheNames), src/models/session.js, src/utils/dtypes.js and
src/utils/model-loader.js of @huggingface/transformers 4.3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.model.config_reader import shown
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import BATCH, StateKind, StateSpec, StateTensor
from h1export.quantize.precision import Precision
from h1export.targets.onnxruntime.options import LayoutName

FLOAT_BITS = 32
MODEL = "model.onnx"


class TransformersJsState(StateTensor):
    """A state with the names that transformers.js gives the states of hybrid models."""

    @property
    def past(self) -> str:
        own = {StateKind.CONV: f"past_conv.{self.layer}", StateKind.RECURRENT: f"past_ssm.{self.layer}"}
        return own.get(self.kind, super().past)

    @property
    def present(self) -> str:
        own = {StateKind.CONV: f"present_conv.{self.layer}", StateKind.RECURRENT: f"present_ssm.{self.layer}"}
        return own.get(self.kind, super().present)


@dataclass(frozen=True)
class Layout:
    """One value of --layout.

    Attributes:
        graphs: the fewest bits of a weight -> the path of the graph in the artifact, in parts that are joined by
            slashes, and what the client calls this precision.
        data: what the name of the weights' file adds to that of the graph.
        batch: the symbol of the batch in shapes.
        state: the class of a state, which names its input and its output.
        halves: whether the clients of this layout can compute with float16 wherever they run.
        native: whether a second graph over the same weights is for h1export's own kernels.
        optional_kept: whether callers may leave out the input that says how many positions get logits. Clients in
            JavaScript see no input that may be left out.
    """

    graphs: Mapping[int, tuple[str, str]]
    data: str
    batch: str = BATCH
    state: type[StateTensor] = StateTensor
    halves: bool = True
    native: bool = True
    optional_kept: bool = True

    def graph(self, precisions: Collection[Precision]) -> tuple[str, str]:
        """Return the path of the graph and the client's name of its precision, by those of the weights in integers."""
        return self.graphs[min((precision.bits for precision in precisions), default=FLOAT_BITS)]

    def graph_of(self, artifact: Artifact) -> str:
        """Return the path of the graph in ``artifact``.

        Raises:
            H1ExportError: the manifest names no file of weights that belongs to a graph of this layout.
        """
        weights = artifact.manifest.weights_file
        for path, _ in self.graphs.values():
            if path + self.data == weights and path in artifact.manifest.files:
                return path
        what = f"has weights in {shown(weights)}, which belong to no graph of its layout"
        raise H1ExportError(artifact.folder / MANIFEST, what, "build the artifact again")

    def states(self, config: FalconH1Config) -> StateSpec:
        """Return the states of a model under the names of this layout."""
        return StateSpec(tuple(self.state(one.layer, one.kind, one.shape) for one in StateSpec.of(config).tensors))

    def dims(self, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Return ``shape`` with this layout's symbol of the batch."""
        return tuple(self.batch if dim == BATCH else dim for dim in shape)


LAYOUTS: Mapping[LayoutName, Layout] = {
    "genai": Layout(dict.fromkeys((FLOAT_BITS, 8, 4), (MODEL, "")), ".data"),
    "transformers.js": Layout(
        {
            FLOAT_BITS: ("onnx/model.onnx", "fp32"),
            8: ("onnx/model_quantized.onnx", "q8"),
            4: ("onnx/model_q4.onnx", "q4"),
        },
        "_data",
        batch="batch_size",
        state=TransformersJsState,
        halves=False,
        native=False,
        optional_kept=False,
    ),
}
