"""Run an artifact: with Core ML on a Mac, with our evaluator anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from h1export.core.artifact import Artifact, StoredWeight
from h1export.core.protocols import Capabilities, Ids, SteppedSequences, check_call
from h1export.core.quant import QuantizedTensor
from h1export.core.spec import HybridSpec
from h1export.core.state import Array, StateKind, StateSpec
from h1export.errors import H1ExportError
from h1export.targets.coreml import layout
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.layout import DECODE, LOGITS, LOW, LOW_SCALE, PREFILL, Call, output_name, state_name
from h1export.targets.coreml.mac.player import MacFunctions

Arrays = dict[str, npt.NDArray[Any]]
NO_PADS = "one sequence at a time, without padding on the left"


@dataclass(frozen=True)
class States:
    """A sequence of ``length`` tokens: the package's states, or the inputs that stand for them, by name."""

    length: int
    arrays: Arrays


class Functions(Protocol):
    """The functions of a package, by whatever executes them."""

    @property
    def engine(self) -> str:
        """What computes, for the report."""
        ...

    def run(self, function: str, inputs: Mapping[str, npt.NDArray[Any]], states: Arrays) -> Arrays:
        """Outputs of a call; ``states`` are replaced in the dict, never in their arrays."""
        ...


class EvaluatedFunctions:
    """Functions in our evaluator: slow, exact to the declared dtypes, on any machine."""

    engine = "h1export's MIL evaluator, not Core ML"

    def __init__(self, package: Path) -> None:
        opened = Package.open(package)
        self._evaluators = {call.name: Evaluator(opened, call.name) for call in (DECODE, PREFILL)}

    def run(self, function: str, inputs: Mapping[str, npt.NDArray[Any]], states: Arrays) -> Arrays:
        return dict(self._evaluators[function].run(inputs, states))  # type: ignore[index]


class CoreMLRunner:
    """Runner over model.mlpackage: any number of tokens as padded prefills and decodes."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact, self._spec = artifact, artifact.spec
        self._states = StateSpec.of(self._spec)
        options = artifact.manifest.options
        self._max_context, self._state_io = int(options["max_context"]), bool(options["state_io"])
        self._exact, self._all_logits = options["compute"] == "fp32" and self._state_io, not options["last_logits"]
        self._types = {name.partition(".")[2]: port for name, port in artifact.manifest.inputs.items()}
        package = artifact.folder / layout.PACKAGE
        self._functions: Functions = MacFunctions(package) if sys.platform == "darwin" else EvaluatedFunctions(package)

    @property
    def spec(self) -> HybridSpec:
        return self._spec

    @property
    def capabilities(self) -> Capabilities:
        notes = (NO_PADS, f"{self._max_context} tokens at most")
        return Capabilities(1, self._all_logits, self._exact, notes, self._functions.engine, max_context=self._max_context)

    def initial(self, batch: int) -> States:
        if batch != 1:
            raise H1ExportError("initial", f"{batch} rows", "CoreML takes one at a time")
        dtypes = {"FLOAT16": np.float16, "FLOAT": np.float32}
        held = {name: port for name, port in self._types.items() if name.startswith(state_name(self._states.tensors[0])[:4])}
        return States(0, {name: np.zeros(dims, dtypes[dtype]) for name, (dtype, dims) in held.items()})  # type: ignore[arg-type]

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        check_call(ids, mask, states.length, self._spec.vocab_size)
        end = states.length + ids.shape[1]
        if len(ids) != 1 or not mask.all():
            raise H1ExportError("step", f"{len(ids)} rows, {int((mask == 0).sum())} pads", f"CoreML takes {NO_PADS}")
        if end > self._max_context:
            raise H1ExportError("step", f"{end} tokens", f"the package has room for {self._max_context}; build it with --max-context {end}")
        answers, position, after = [], states.length, dict(states.arrays)
        while position < end:
            call, count = self._next_call(position, end)
            logits = self._call(call, ids[:, position - states.length :][:, :count], position, after)
            answers.append(logits[:, :count] if self._all_logits else logits)
            position += count
        joined = np.concatenate(answers, axis=1) if self._all_logits else answers[-1]
        return joined, States(end, after)

    def _next_call(self, position: int, end: int) -> tuple[Call, int]:
        """A padded prefill writes keys for its pads too, which must fit."""
        fits = position + PREFILL.tokens <= self._max_context
        return (PREFILL, min(PREFILL.tokens, end - position)) if fits and end - position > 1 else (DECODE, 1)

    def _call(self, call: Call, ids: Ids, position: int, arrays: Arrays) -> Array:
        padded = np.zeros((1, call.tokens), np.int32)
        padded[:, : ids.shape[1]] = ids
        inputs: Arrays = {layout.INPUT_IDS: padded, layout.POSITION: np.array([position], np.int32)}
        if call.padded:
            inputs[layout.N_VALID] = np.array([ids.shape[1]], np.int32)
        if self._state_io:
            outputs = self._functions.run(call.name, inputs | arrays, {})
            arrays.update({state_name(tensor): outputs[output_name(tensor)] for tensor in self._states.tensors})
        else:
            outputs = self._functions.run(call.name, inputs, arrays)
        return np.asarray(outputs[LOGITS], np.float32)

    def start(self, batch: int, capacity: int) -> SteppedSequences:
        if capacity > self._max_context:
            what = f"room for {capacity} tokens"
            raise H1ExportError("start", what, f"the package has {self._max_context}; build it with --max-context {capacity}")
        return SteppedSequences(self, batch)

    def snapshot(self, states: States) -> dict[str, Array]:
        found = {}
        for tensor in self._states.tensors:
            name = state_name(tensor)
            state = states.arrays[name].astype(np.float32)
            if tensor.kind is StateKind.RECURRENT and not self._state_io:
                state = state + states.arrays[name + LOW].astype(np.float32) / np.float32(LOW_SCALE)
            found[tensor.key] = layout.canonical(tensor, state, states.length)
        return found

    def stored_weights(self) -> StoredWeights:
        return StoredWeights(self._artifact)


class StoredWeights(Mapping[str, Array]):
    """What the package stores for each quantised checkpoint tensor, dequantised when asked for and not kept."""

    def __init__(self, artifact: Artifact) -> None:
        self._package = Package.open(artifact.folder / layout.PACKAGE)
        self._weights = {weight.parts[0].tensor: weight for weight in artifact.manifest.weights}

    def quantized(self, name: str) -> QuantizedTensor:
        """What lies behind ``name``: the same integers on every target."""
        weight: StoredWeight = self._weights[name]
        codes, scales = self._package.quantized(weight.initializer)
        return QuantizedTensor(codes, scales.astype(np.float16), weight.parts[0].multiplier.rows(len(codes)))

    def __getitem__(self, name: str) -> Array:
        return self.quantized(name).unfolded()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


