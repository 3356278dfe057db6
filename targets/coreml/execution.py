"""What executes a package: Core ML on a Mac, our evaluator anywhere else; and how tokens become calls of its functions."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array
from h1export.runtime.runner import Ids
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.layout import CALLS, DECODE, LOGITS, PREFILL, Call

Arrays = dict[str, npt.NDArray[Any]]
Held = Any  # states in an executor's own form


class Executor(Protocol):
    """The functions of a package.

    Attributes:
        name: what computes, for the report.
        emulated: whether that is not Core ML.
    """

    name: str
    emulated: bool

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        """States to call functions on; the arrays stay as they are."""
        ...

    def run(self, function: str, inputs: Arrays, held: Held, watch: Collection[str] = ()) -> Arrays:
        """Outputs of a call, which updates ``held``, and values between its ops by name, where the executor is ``emulated``."""
        ...

    def fetch(self, held: Held) -> Arrays:
        """The states by name, in arrays that no later call changes."""
        ...

    def magnitudes(self) -> Mapping[str, float]:
        """See ``Runner.magnitudes``."""
        ...


class Evaluated:
    """Our evaluator: slow, true to the declared dtypes, on any machine."""

    name = "h1export's MIL evaluator, not Core ML"
    emulated = True

    def __init__(self, package: Path) -> None:
        opened = Package.open(package)
        self._evaluators = {call.name: Evaluator(opened, call.name) for call in CALLS}

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        return dict(states)

    def run(self, function: str, inputs: Arrays, held: Held, watch: Collection[str] = ()) -> Arrays:
        return self._evaluators[function].run(inputs, held, watch)  # type: ignore[index]

    def fetch(self, held: Held) -> Arrays:
        return dict(held)

    def magnitudes(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for evaluator in self._evaluators.values():
            for op, magnitude in evaluator.maxima_by_op().items():
                found[op] = float(np.maximum(found.get(op, 0.0), magnitude))
        return found


class OnMac:
    """Core ML. Not run by us: it needs macOS 15."""

    name = "Core ML"
    emulated = False

    def __init__(self, package: Path) -> None:
        ct = sdk.coremltools()
        units = ct.ComputeUnit.CPU_AND_GPU  # the Neural Engine has no blocks of int4
        self._models = {
            call.name: ct.models.MLModel(str(package), function_name=call.name, compute_units=units) for call in CALLS
        }

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        if not states:
            return None, ()
        state = self._models[DECODE.name].make_state()
        for name, array in states.items():
            state.write_state(name, array)
        return state, tuple(states)

    def run(self, function: str, inputs: Arrays, held: Held, watch: Collection[str] = ()) -> Arrays:
        return dict(self._models[function].predict(inputs, state=held[0]))  # type: ignore[index]

    def fetch(self, held: Held) -> Arrays:
        state, names = held
        return {name: np.array(state.read_state(name)) for name in names}

    def magnitudes(self) -> Mapping[str, float]:
        return {}  # Core ML shows no value but the outputs


class Passing:
    """An executor for a package whose states are inputs and outputs; ``outputs`` names the output of each input."""

    def __init__(self, executor: Executor, outputs: Mapping[str, str]) -> None:
        self.name = executor.name
        self.emulated = executor.emulated
        self._executor = executor
        self._outputs = outputs
        self._nothing = executor.hold({})

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        return dict(states)

    def run(self, function: str, inputs: Arrays, held: Held, watch: Collection[str] = ()) -> Arrays:
        outputs = self._executor.run(function, inputs | held, self._nothing, watch)
        held.update({name: outputs.pop(output) for name, output in self._outputs.items()})
        return outputs

    def fetch(self, held: Held) -> Arrays:
        return dict(held)

    def magnitudes(self) -> Mapping[str, float]:
        return self._executor.magnitudes()


def executor(package: Path, passed: Mapping[str, str]) -> Executor:
    """What executes ``package`` on this machine; ``passed`` as ``Passing`` takes it, empty for a package that has states."""
    found: Executor = OnMac(package) if sys.platform == "darwin" else Evaluated(package)
    return Passing(found, passed) if passed else found


def advance(executor: Executor, held: Held, ids: Ids, position: int, max_context: int, all_logits: bool) -> Array:
    """Append ids [1, new] after ``position`` tokens, as padded prefills and decodes; logits float32 [1, new or 1, vocab]."""
    logits = [outputs[LOGITS][:, :count] for outputs, count in _calls(executor, held, ids, position, max_context)]
    return np.asarray(np.concatenate(logits, axis=1) if all_logits else logits[-1], np.float32)


def observe(
    executor: Executor, held: Held, ids: Ids, position: int, max_context: int, watch: Collection[str]
) -> Arrays:
    """As ``advance``: every row of the outputs and of the values that ``watch`` names, [1, new, ...]."""
    calls = list(_calls(executor, held, ids, position, max_context, watch))
    names = [name for name in calls[0][0] if name == LOGITS or name in watch]
    return {name: np.concatenate([outputs[name][:, :count] for outputs, count in calls], axis=1) for name in names}


def _calls(
    executor: Executor, held: Held, ids: Ids, position: int, max_context: int, watch: Collection[str] = ()
) -> Iterator[tuple[Arrays, int]]:
    """The outputs of each call, and how many of its rows are tokens."""
    start = 0
    while start < ids.shape[1]:
        call, count = _next_call(position + start, ids.shape[1] - start, max_context)
        yield _call(executor, held, call, ids[:, start : start + count], position + start, watch), count
        start += count


def _next_call(position: int, left: int, max_context: int) -> tuple[Call, int]:
    """A padded prefill writes keys for its pads too, and they must fit."""
    fits = position + PREFILL.tokens <= max_context
    return (PREFILL, min(PREFILL.tokens, left)) if fits and left > 1 else (DECODE, 1)


def _call(executor: Executor, held: Held, call: Call, ids: Ids, position: int, watch: Collection[str]) -> Arrays:
    padded = np.zeros((1, call.tokens), np.int32)
    padded[:, : ids.shape[1]] = ids
    inputs: Arrays = {layout.INPUT_IDS: padded, layout.POSITION: np.array([position], np.int32)}
    if call.padded:
        inputs[layout.N_VALID] = np.array([ids.shape[1]], np.int32)
    return executor.run(call.name, inputs, held, watch)
