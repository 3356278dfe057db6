"""Run an artifact's engine on an NVIDIA GPU."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.runner import Limits, Provenance
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.sharing import Home
from h1export.targets.onnx.read_back import StoredWeights
from h1export.targets.tensorrt.gpu.device import Gpu
from h1export.targets.tensorrt.gpu.engine import LoadedEngine
from h1export.targets.tensorrt.gpu.session import EngineSession
from h1export.targets.tensorrt.network.layout import MODEL
from h1export.targets.tensorrt.network.weights import key, read_stored


class EngineRunner:
    """A Runner over model.engine, whose states are EngineSessions.

    Threads may share it; their calls wait for each other.

    Raises:
        H1ExportError: There is no GPU, or the engine is not for it, see LoadedEngine.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._home = Home(str(artifact.folder))
        self._gpu = Gpu()
        try:
            with self._gpu.current():
                self._engine = LoadedEngine(artifact, self._gpu)
        except RuntimeError as error:  # of CUDA, or a lack of memory
            raise H1ExportError(
                artifact.folder, f"does not fit this GPU ({error})", "free the GPU's memory, or see to its driver"
            ) from error

    @property
    def config(self) -> FalconH1Config:
        return self._artifact.config

    @property
    def limits(self) -> Limits:
        limits = self._engine.limits
        return Limits(max_batch=limits.max_batch, max_context=limits.max_context, all_logits=self._engine.all_logits)

    @property
    def provenance(self) -> Provenance:
        return Provenance(kernels=self._engine.name, gpu=self._engine.gpu_name, float32=False)

    @property
    def notes(self) -> tuple[str, ...]:
        return (self._engine.limits.note,)

    def initial(self, batch: int) -> EngineSession:
        self._home.check()
        return EngineSession.new(self._engine, batch)

    def step(self, ids: Ids, mask: Ids, states: EngineSession) -> tuple[Array, EngineSession]:
        self._home.check()
        after = states.copy()
        return after.advance(ids, mask), after

    def length(self, states: EngineSession) -> int:
        return states.length

    def start(self, batch: int, capacity: int) -> EngineSession:
        self._home.check()
        self._engine.limits.check_room("start", capacity)
        return EngineSession.new(self._engine, batch).warmed()

    def snapshot(self, states: EngineSession) -> dict[str, Array]:
        return states.snapshot()

    def restored(self, saved: SavedStates, batch: int) -> EngineSession:
        made = EngineSession.new(self._engine, batch)
        made.restore(saved)
        return made

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact, MODEL, key, read_stored=read_stored)
