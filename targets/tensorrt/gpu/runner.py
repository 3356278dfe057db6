"""Run an artifact's engine on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, StateSpec
from h1export.runtime.runner import Capabilities, Ids
from h1export.targets.onnx.read_back import StoredWeights
from h1export.targets.tensorrt.gpu.device import Gpu
from h1export.targets.tensorrt.gpu.engine import LoadedEngine
from h1export.targets.tensorrt.gpu.session import EngineSequences
from h1export.targets.tensorrt.network.layout import MODEL
from h1export.targets.tensorrt.network.weights import key, read_stored


class EngineRunner:
    """Runner over model.engine; its states are EngineSequences.

    Raises:
        H1ExportError: no GPU, or an engine that is not for it; see LoadedEngine.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._gpu = Gpu()
        try:
            with self._gpu.current():
                self._engine = LoadedEngine(artifact, self._gpu)
        except RuntimeError as error:  # CUDA's, or out of memory
            raise H1ExportError(
                artifact.folder, f"does not fit this GPU ({error})", "free the GPU's memory, or see to its driver"
            ) from error

    @property
    def config(self) -> FalconH1Config:
        return self._artifact.config

    @property
    def capabilities(self) -> Capabilities:
        limits = self._engine.limits
        return Capabilities(
            max_batch=limits.max_batch,
            all_logits=self._engine.all_logits,
            float32=False,
            notes=(limits.note,),
            kernels=self._engine.name,
            max_context=limits.max_context,
            gpu=self._engine.gpu_name,
        )

    def initial(self, batch: int) -> EngineSequences:
        return EngineSequences.new(self._engine, batch)

    def step(self, ids: Ids, mask: Ids, states: EngineSequences) -> tuple[Array, EngineSequences]:
        after = states.copy()
        return after.advance(ids, mask), after

    def observe(self, ids: Ids, mask: Ids, states: EngineSequences) -> tuple[Array, EngineSequences, dict[str, Array]]:
        what = "an engine shows its outputs alone"
        raise H1ExportError("observe", what, "use --kernels stock, which executes the engine's network on the CPU")

    def start(self, batch: int, capacity: int) -> EngineSequences:
        self._engine.limits.check_room("start", capacity)
        return EngineSequences.new(self._engine, batch).warmed()

    def snapshot(self, states: EngineSequences) -> dict[str, Array]:
        with self._gpu.current():
            found = {
                tensor: states.states[tensor.past].to("cpu", torch.float32, copy=True).numpy()
                for tensor in StateSpec.of(self.config).tensors
            }
        return {
            tensor.key: array[:, :, : states.length] if tensor.kind.grows else array for tensor, array in found.items()
        }

    def magnitudes(self) -> Mapping[str, float]:
        return {}

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact, MODEL, key, read_stored)
