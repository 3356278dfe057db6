"""The executors of a package, and how tokens become calls of its functions.

Core ML executes a package on a Mac, and our evaluator executes it anywhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from h1export.model.falcon_h1.states import Array, Ids
from h1export.targets.coreml import sdk
from h1export.targets.coreml.evaluator import Evaluator, Package
from h1export.targets.coreml.program import layout
from h1export.targets.coreml.program.layout import CALLS, DECODE, LOGITS, PREFILL, Call

Arrays = dict[str, npt.NDArray[Any]]
Held = Any  # states in an executor's own form


class Executor(Protocol):
    """An executor of the functions of a package, which threads may share: it runs one function at a time.

    Attributes:
        name: What computes, for the report.
        emulated: Whether that is not Core ML.
    """

    name: str
    emulated: bool

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        """Return states to call functions on; the arrays stay as they are."""
        ...

    def run(self, function: str, inputs: Arrays, held: Held) -> Arrays:
        """Call ``function``, which updates ``held``, and return its outputs by name."""
        ...

    def fetch(self, held: Held) -> Arrays:
        """Return the states by name, in arrays that no later call changes."""
        ...


class Evaluated:
    """Our evaluator: slow, true to the declared dtypes, on any machine.

    ``passed`` names the output of each input that stands for a state; it is empty for a package that has states.
    """

    name = "h1export's MIL evaluator, not Core ML"
    emulated = True

    def __init__(self, package: Path, passed: Mapping[str, str]) -> None:
        opened = Package.open(package)
        self._passed = passed
        self._evaluators: dict[str, Evaluator] = {call.name: Evaluator(opened, call.name) for call in CALLS}

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        return dict(states)

    def run(self, function: str, inputs: Arrays, held: Held, *, watch: Collection[str] = ()) -> Arrays:
        """Return the outputs of the call, and the values between its ops that ``watch`` names."""
        if not self._passed:
            return self._evaluators[function].run(inputs, held, watch)
        return _passed_on(self._evaluators[function].run(inputs | held, {}, watch), held, self._passed)

    def fetch(self, held: Held) -> Arrays:
        return dict(held)

    def magnitudes(self) -> Mapping[str, float]:
        """Return the largest magnitude so far by kind of op, as ``TracksMagnitudes`` has it."""
        found: dict[str, float] = {}
        for evaluator in self._evaluators.values():
            for op, magnitude in evaluator.maxima_by_op().items():
                found[op] = float(np.maximum(found.get(op, 0.0), magnitude))
        return found


class OnMac:
    """Core ML, which needs macOS 15; we have not run it. ``passed`` is as ``Evaluated`` takes it.

    Apple's documentation of MLModel asks for one thread at a time on a model.
    """

    name = "Core ML"
    emulated = False

    def __init__(self, package: Path, passed: Mapping[str, str]) -> None:
        ct = sdk.coremltools()
        units = ct.ComputeUnit.CPU_AND_GPU  # the Neural Engine has no blocks of int4
        self._passed = passed
        self._lock = Lock()
        self._models: dict[str, Any] = {
            call.name: ct.models.MLModel(str(package), function_name=call.name, compute_units=units) for call in CALLS
        }

    def hold(self, states: Mapping[str, npt.NDArray[Any]]) -> Held:
        if self._passed:
            return dict(states)
        with self._lock:
            state = self._models[DECODE.name].make_state()
            for name, array in states.items():
                state.write_state(name, array)
        return state, tuple(states)

    def run(self, function: str, inputs: Arrays, held: Held) -> Arrays:
        model = self._models[function]
        with self._lock:
            if self._passed:
                return _passed_on(dict(model.predict(inputs | held)), held, self._passed)
            return dict(model.predict(inputs, state=held[0]))

    def fetch(self, held: Held) -> Arrays:
        if self._passed:
            return dict(held)
        state, names = held
        with self._lock:
            return {name: np.array(state.read_state(name)) for name in names}


def _passed_on(outputs: Arrays, held: Held, passed: Mapping[str, str]) -> Arrays:
    """Move the states among ``outputs`` into ``held``, and return the other outputs."""
    held.update({name: outputs.pop(output) for name, output in passed.items()})
    return outputs


def advance(executor: Executor, held: Held, ids: Ids, *, position: int, max_context: int, all_logits: bool) -> Array:
    """Append ids [1, new] after ``position`` tokens, and return logits float32 [1, new or 1, vocab].

    The tokens become padded prefills and decodes.
    """
    logits = [
        executor.run(call.name, inputs, held)[LOGITS][:, :count]
        for call, inputs, count in _calls(ids, position, max_context)
    ]
    return np.asarray(np.concatenate(logits, axis=1) if all_logits else logits[-1], np.float32)


def observe(
    evaluator: Evaluated, held: Held, ids: Ids, *, position: int, max_context: int, watch: Collection[str]
) -> Arrays:
    """Append ids as ``advance`` does, and return logits and the values in ``watch`` of all tokens, [1, new, ...]."""
    found = [
        (evaluator.run(call.name, inputs, held, watch=watch), count)
        for call, inputs, count in _calls(ids, position, max_context)
    ]
    names = [name for name in found[0][0] if name == LOGITS or name in watch]
    return {name: np.concatenate([outputs[name][:, :count] for outputs, count in found], axis=1) for name in names}


def _calls(ids: Ids, position: int, max_context: int) -> Iterator[tuple[Call, Arrays, int]]:
    """Yield each call with its inputs, and how many of its rows are tokens."""
    start = 0
    while start < ids.shape[1]:
        call, count = _next_call(position + start, ids.shape[1] - start, max_context)
        yield call, _inputs(call, ids[:, start : start + count], position + start), count
        start += count


def _next_call(position: int, left: int, max_context: int) -> tuple[Call, int]:
    """Return the next call and its tokens. A padded prefill writes keys for its pads too, and they must fit."""
    fits = position + PREFILL.tokens <= max_context
    return (PREFILL, min(PREFILL.tokens, left)) if fits and left > 1 else (DECODE, 1)


def _inputs(call: Call, ids: Ids, position: int) -> Arrays:
    padded = np.zeros((1, call.tokens), np.int32)
    padded[:, : ids.shape[1]] = ids
    inputs: Arrays = {layout.INPUT_IDS: padded, layout.POSITION: np.array([position], np.int32)}
    if call.padded:
        inputs[layout.N_VALID] = np.array([ids.shape[1]], np.int32)
    return inputs
