"""Run an artifact's network on a CPU, in order to judge it. TensorRT itself is not used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from h1export.artifact.artifact import Artifact
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.probes import PREFIX, probe_names
from h1export.model.falcon_h1.states import ATTENTION_MASK, INPUT_IDS, LOGITS, Array, Ids, StateSpec
from h1export.runtime.runner import Limits, Provenance, check_call
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import SteppedSession
from h1export.runtime.sharing import Home
from h1export.targets.onnx import sdk
from h1export.targets.onnx.read_back import StoredWeights
from h1export.targets.tensorrt.emulator.execution import Execution, Values
from h1export.targets.tensorrt.network.layout import MODEL, WRITE_INDICES
from h1export.targets.tensorrt.network.limits import Limits as NetworkLimits
from h1export.targets.tensorrt.network.limits import calls
from h1export.targets.tensorrt.network.weights import key, read_stored
from h1export.targets.tensorrt.options import TensorRTOptions


@dataclass(frozen=True)
class States:
    """The states of sequences of ``length`` tokens by input name, in float32 where the network has fp16 or bf16."""

    length: int
    arrays: dict[str, npt.NDArray[np.float32]]


class NetworkRunner:
    """A Runner over model.onnx, the file that TensorRT's builder reads. Threads may share it.

    Args:
        artifact: What the target has written.
        threads: The number of threads; 0 leaves it to onnxruntime.
        float32: Whether to compute in float32 throughout; otherwise values are rounded to the dtypes that the network
            declares.
        why: The reason, for users, why no engine runs instead; it is empty where they requested this Runner.

    Raises:
        H1ExportError: onnxruntime is not installed, or cannot load a part of the network.
    """

    def __init__(self, artifact: Artifact, threads: int, float32: bool, *, why: str = "") -> None:
        self._artifact = artifact
        self._home = Home(str(artifact.folder))
        self._config = artifact.config
        self._float32 = float32
        self._why = why
        self._states = StateSpec.of(self._config)
        options = TensorRTOptions.read(artifact)
        self._limits = NetworkLimits.of(artifact)
        self._all_logits = not options.last_logits
        self._compute = "fp32" if float32 else options.compute
        self._open = partial(Execution, artifact.folder, artifact.manifest.files, not float32, threads=threads)
        self._execution = self._open()

    @property
    def config(self) -> FalconH1Config:
        return self._config

    @property
    def limits(self) -> Limits:
        return Limits(
            max_batch=self._limits.max_batch, max_context=self._limits.max_context, all_logits=self._all_logits
        )

    @property
    def provenance(self) -> Provenance:
        return Provenance(
            kernels=(
                f"onnxruntime {sdk.onnxruntime().__version__} and the ops' references in {self._compute}, not TensorRT"
            ),
            emulated=True,
            float32=self._float32,
            fallback=self._why,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return (self._limits.note,)

    def initial(self, batch: int) -> States:
        self._limits.check_rows("start", batch)
        zeros = self._states.zeros(batch, self._limits.max_context)
        return States(0, {tensor.past: zeros[tensor.key] for tensor in self._states.tensors})

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        logits, after, _ = self._advance(self._execution, ids, mask, states=states)
        return logits, after

    def length(self, states: States) -> int:
        return states.length

    def observe(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States, dict[str, Array]]:
        return self._advance(self._observed, ids, mask, states=states)

    @cached_property
    def _observed(self) -> Execution:
        return self._open(shown=[PREFIX + name for name in probe_names(self._config.num_hidden_layers)])

    def _advance(
        self, execution: Execution, ids: Ids, mask: Ids, *, states: States
    ) -> tuple[Array, States, dict[str, Array]]:
        """Make calls that fit the profiles, one after the other; return logits, the new states and the probes."""
        self._home.check()
        check_call(ids, mask, states.length, vocab_size=self._config.vocab_size)
        self._limits.check_room("step", states.length + ids.shape[1])
        found: list[Values] = []
        for part in calls(ids.shape[1]):
            found.append(execution.run(self._inputs(ids[:, part], mask, states)))
            after = {tensor.past: found[-1].pop(tensor.present) for tensor in self._states.tensors}
            states = States(states.length + part.stop - part.start, after)
        joined = {name: np.concatenate([call[name] for call in found], axis=1) for name in found[0]}
        logits = joined.pop(LOGITS)
        probes = {name.removeprefix(PREFIX): value.reshape(*ids.shape, -1) for name, value in joined.items()}
        return logits if self._all_logits else logits[:, -1:], states, probes

    def _inputs(self, ids: Ids, mask: Ids, states: States) -> Values:
        end = states.length + ids.shape[1]
        batch = len(ids)
        columns = np.zeros((batch, self._limits.max_context), np.int64)
        columns[:, :end] = mask[:, :end]
        indices = np.full(batch, states.length, np.int64)
        return {INPUT_IDS: np.ascontiguousarray(ids), ATTENTION_MASK: columns, WRITE_INDICES: indices, **states.arrays}

    def start(self, batch: int, capacity: int) -> SteppedSession:
        self._home.check()
        self._limits.check_room("start", capacity)
        return SteppedSession(self, batch)

    def snapshot(self, states: States) -> dict[str, Array]:
        arrays = {tensor: states.arrays[tensor.past] for tensor in self._states.tensors}
        return {
            tensor.key: array[:, :, : states.length] if tensor.kind.grows else array for tensor, array in arrays.items()
        }

    def restored(self, saved: SavedStates, batch: int) -> States:
        self._limits.check_rows("restore", batch)
        arrays = {}
        for tensor in self._states.tensors:
            grows = tensor.kind.grows
            array = saved.columns(tensor.key, self._limits.max_context) if grows else saved.arrays[tensor.key]
            arrays[tensor.past] = np.repeat(array, batch, axis=0)
        return States(saved.length, arrays)

    def magnitudes(self) -> Mapping[str, float]:
        return self._execution.magnitudes()

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact, MODEL, key, read_stored=read_stored)
