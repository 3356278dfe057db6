"""Run an artifact with Core ML or, off a Mac, with our evaluator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.probes import probe_names
from h1export.model.falcon_h1.states import Array, Ids, StateKind, StateSpec
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.runtime.runner import Limits, Provenance, check_call, kept
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import WHAT
from h1export.runtime.sharing import Home, OneCall, one_call
from h1export.targets.coreml.evaluator import Package
from h1export.targets.coreml.execution import Evaluated, Executor, Held, OnMac, advance, observe
from h1export.targets.coreml.options import CoreMLOptions
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.layout import LOW, LOW_SCALE, output_name, state_name
from h1export.targets.coreml.program.weights import order_name

NO_PADS = "one sequence at a time, without padding on the left"
DTYPES = {"FLOAT16": np.float16, "FLOAT": np.float32}


@dataclass(frozen=True)
class States:
    """The states of a sequence of ``length`` tokens, or the inputs that stand for them, by name."""

    length: int
    arrays: dict[str, npt.NDArray[Any]]


class CoreMLRunner:
    """A Runner over model.mlpackage, which ``executor`` executes.

    Any number of tokens becomes padded prefills and decodes. Threads may share it; the executor computes one call at a
    time, and the others wait.
    """

    def __init__(self, artifact: Artifact, executor: Executor) -> None:
        self._artifact = artifact
        self._home = Home(str(artifact.folder))
        self._config = artifact.config
        self._states = StateSpec.of(self._config)
        options = CoreMLOptions.read(artifact)
        self._max_context = options.max_context
        self._all_logits = not options.last_logits
        self._state_io = options.state_io
        self._float32 = options.compute == "fp32" and self._state_io
        self._executor = executor
        self._advance = partial(advance, executor, max_context=self._max_context, all_logits=self._all_logits)

    @property
    def config(self) -> FalconH1Config:
        return self._config

    @property
    def limits(self) -> Limits:
        return Limits(max_batch=1, max_context=self._max_context, all_logits=self._all_logits)

    @property
    def provenance(self) -> Provenance:
        return Provenance(kernels=self._executor.name, emulated=self._executor.emulated, float32=self._float32)

    @property
    def notes(self) -> tuple[str, ...]:
        return (NO_PADS, f"{self._max_context} tokens at most")

    def initial(self, batch: int) -> States:
        if batch != 1:
            raise H1ExportError("initial", f"{batch} rows", f"CoreML takes {NO_PADS}")
        names = [name for tensor in self._states.tensors for name in (state_name(tensor), state_name(tensor) + LOW)]
        ports = {
            name: port for name in names if (port := self._artifact.manifest.inputs.get(f"{layout.DECODE.name}.{name}"))
        }
        return States(
            0, {name: np.zeros([int(dim) for dim in dims], DTYPES[dtype]) for name, (dtype, dims) in ports.items()}
        )

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        held = self._hold(ids, mask, states)
        logits = self._advance(held, ids, position=states.length)
        return logits, States(states.length + ids.shape[1], self._executor.fetch(held))

    def _hold(self, ids: Ids, mask: Ids, states: States) -> Held:
        """Return ``states`` in the executor's form. Raises H1ExportError for a call that CoreML does not take."""
        self._home.check()
        check_call(ids, mask, states.length, vocab_size=self._config.vocab_size)
        if len(ids) != 1 or not mask.all():
            raise H1ExportError("step", f"{len(ids)} rows, {int((mask == 0).sum())} pads", f"CoreML takes {NO_PADS}")
        self._check_room("step", states.length + ids.shape[1])
        return self._executor.hold(states.arrays)

    def length(self, states: States) -> int:
        return states.length

    def _check_room(self, where: str, tokens: int) -> None:
        if tokens > self._max_context:
            what = f"{tokens} tokens, and the package has room for {self._max_context}"
            raise H1ExportError(where, what, f"build it with --max-context {tokens}")

    def start(self, batch: int, capacity: int) -> CoreMLSession:
        self._home.check()
        self._check_room("start", capacity)
        return CoreMLSession(self, self._executor, self._advance, states=self.initial(batch), capacity=capacity)

    def snapshot(self, states: States) -> dict[str, Array]:
        found = {}
        for tensor in self._states.tensors:
            name = state_name(tensor)
            state = states.arrays[name].astype(np.float32)
            if tensor.kind is StateKind.RECURRENT and not self._state_io:
                state = state + states.arrays[name + LOW].astype(np.float32) / np.float32(LOW_SCALE)
            found[tensor.key] = layout.canonical(tensor, state, states.length)
        return found

    def restored(self, saved: SavedStates, batch: int) -> States:
        arrays = self.initial(batch).arrays
        for tensor in self._states.tensors:
            name = state_name(tensor)
            state = layout.stored(tensor, saved.arrays[tensor.key], self._max_context)
            arrays[name] = state.astype(arrays[name].dtype)
            if name + LOW in arrays:  # the rest of a recurrent state, as program/states.py splits it
                rest = (state - arrays[name].astype(np.float32)) * np.float32(LOW_SCALE)
                arrays[name + LOW] = rest.astype(arrays[name + LOW].dtype)
        return States(saved.length, arrays)

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact)


class EvaluatorRunner(CoreMLRunner):
    """A CoreMLRunner over our evaluator, which also shows values between ops and the magnitudes of fp16."""

    def __init__(self, artifact: Artifact, evaluator: Evaluated) -> None:
        super().__init__(artifact, evaluator)
        self._evaluator = evaluator

    def observe(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States, dict[str, Array]]:
        held = self._hold(ids, mask, states)
        names = {layout.probe_output(name): name for name in probe_names(self._config.num_hidden_layers)}
        found = observe(self._evaluator, held, ids, position=states.length, max_context=self._max_context, watch=names)
        logits = np.asarray(found.pop(layout.LOGITS), np.float32)
        probes = {names[key]: value.astype(np.float32).reshape(*ids.shape, -1) for key, value in found.items()}
        after = States(states.length + ids.shape[1], self._executor.fetch(held))
        return logits if self._all_logits else logits[:, -1:], after, probes

    def magnitudes(self) -> Mapping[str, float]:
        return self._evaluator.magnitudes()


def load(artifact: Artifact) -> CoreMLRunner:
    """Load ``artifact`` into what executes packages on this machine."""
    package = artifact.folder / layout.PACKAGE
    passed = {state_name(tensor): output_name(tensor) for tensor in StateSpec.of(artifact.config).tensors}
    if not CoreMLOptions.read(artifact).state_io:
        passed = {}
    if sys.platform == "darwin":
        return CoreMLRunner(artifact, OnMac(package, passed))
    return EvaluatorRunner(artifact, Evaluated(package, passed))


class CoreMLSession:
    """A session of one sequence, whose states stay in the executor's own form. It takes one call at a time."""

    def __init__(
        self,
        runner: CoreMLRunner,
        executor: Executor,
        advance: Callable[..., Array],
        *,
        states: States,
        capacity: int,
    ) -> None:
        self._runner = runner
        self._executor = executor
        self._advance = advance
        self._capacity = capacity
        self._held = executor.hold(states.arrays)
        self._one_call = OneCall(WHAT)
        self.length = states.length

    @one_call
    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        end = self.length + ids.shape[-1]
        mask = np.ones((len(ids), end), np.int64)
        check_call(ids, mask, self.length, vocab_size=self._runner.config.vocab_size, keep=keep)
        if end > self._capacity or len(ids) != 1:
            what = f"{len(ids)} rows of {end} tokens"
            raise H1ExportError(
                "append", what, f"there is room for one of {self._capacity}; start with a larger capacity"
            )
        logits = self._advance(self._held, ids, position=self.length)
        self.length = end
        return kept(logits, keep)

    @one_call
    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        found = self._runner.snapshot(States(self.length, self._executor.fetch(self._held)))
        return SavedStates.of(StateSpec.of(self._runner.config), found, row, start=start, length=self.length)

    @one_call
    def restore(self, saved: SavedStates) -> None:
        saved.check(StateSpec.of(self._runner.config), self._capacity)
        self._held = self._executor.hold(self._runner.restored(saved, 1).arrays)
        self.length = saved.length


class StoredWeights(Mapping[str, Array]):
    """Every quantised checkpoint tensor as the package stores it, dequantised at each access and not kept."""

    def __init__(self, artifact: Artifact) -> None:
        self._package = Package.open(artifact.folder / layout.PACKAGE)
        self._weights = {weight.parts[0].tensor: weight for weight in artifact.manifest.weights}

    def quantized(self, name: str) -> QuantizedTensor:
        """Return the codes, scales and zero points of the tensor ``name``: the same integers on every target."""
        weight = self._weights[name]
        found = self._package.constant(weight.initializer)
        codes = found["data"]
        scales = found["scale"]
        zeros = found.get("offset")
        return QuantizedTensor(
            codes, scales.astype(np.float16), weight.parts[0].multiplier.rows(len(codes)), zeros=zeros
        )

    def __getitem__(self, name: str) -> Array:
        order = self._weights[name].parts[0].order
        return self.quantized(name).unfolded(self._package.constant(order_name(order))["val"] if order else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
