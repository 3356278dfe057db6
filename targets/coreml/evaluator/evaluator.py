"""Runs one function of a saved CoreML program on arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.compiler import Compiler
from h1export.targets.coreml.evaluator.dtypes import STRING, Array, narrow, widen
from h1export.targets.coreml.evaluator.package import Package
from h1export.targets.coreml.evaluator.program import Function, TensorType
from h1export.targets.coreml.evaluator.steps import Frame


class Evaluator:
    """A function, resolved once and run many times. ops compute in float32; an fp16 result is rounded once, at the op's output.

    A device may keep or round intermediate results elsewhere, so equal bits are not to be expected there; declared types, shapes and
    bounds are checked as a device would at the latest. ``hollow``: see Compiler.

    Raises:
        H1ExportError: no such function, or one with an op, an input of an op or a constant that the evaluator cannot take.
    """

    def __init__(self, package: Package, function: str | None = None, hollow: bool = False) -> None:
        self._package = package
        self.function: Function = package.function(function or package.default_function)
        compiler = Compiler(package, self.function, hollow)
        self._steps = compiler.steps
        self._returned = compiler.returned
        self._slots = compiler.inputs
        self._computed = compiler.outputs
        self._values: list[Array | None] = [compiler.constants.get(slot) for slot in range(compiler.slots)]
        self._held: dict[str, tuple[Array, Array]] = {}

    def initial_states(self) -> dict[str, Array]:
        """Zeros for every state, in its declared type."""
        return {name: np.zeros(*_layout(kind)) for name, kind in self.function.states.items()}

    def run(
        self, inputs: Mapping[str, Array], states: dict[str, Array] | None = None, watch: Collection[str] = ()
    ) -> dict[str, Array]:
        """The outputs by name, in their declared types; ``states`` gets new read-only arrays, the old ones stay.

        ``watch`` names outputs of ops that are returned beside them, float32 where they are fp16; one that no op has is left out.

        Raises:
            H1ExportError: inputs or states that are missing, unknown, or of another type or shape than declared; an op that fails on
                these values, an index out of bounds for one. ``states`` is then as it was.
        """
        where = f"{self._package.path}: function {self.function.name!r}"
        _check(self.function.inputs, inputs, f"{where}, input")
        _check(self.function.states, states or {}, f"{where}, state")
        frame = Frame(list(self._values), dict(states or {}), self._still_held(states or {}))
        for name, slot in self._slots.items():
            frame.values[slot] = widen(np.asarray(inputs[name]))
        with np.errstate(all="ignore"), _one_thread():  # infinities and NaN are results here, and shown by ``maxima``
            for step in self._steps:
                step(frame)
            returned = zip(self.function.outputs.items(), self._returned, strict=True)
            outputs = {name: narrow(frame.values[slot], kind.dtype) for (name, kind), slot in returned}
        outputs |= {output.name: frame.values[output.slot] for output in self._computed if output.name in watch}
        if states is not None:
            states.update(frame.states)
            self._held = {name: (states[name], array) for name, array in frame.held.items()}
        return outputs

    def _still_held(self, states: Mapping[str, Array]) -> dict[str, Array]:
        """What the last run left of states that are the very arrays it wrote; to widen a long cache again costs more than a token."""
        return {
            name: array
            for name, (written, array) in self._held.items()
            if states.get(name) is written and not written.flags.writeable
        }

    @property
    def maxima(self) -> dict[str, float]:
        """fp16 output of an op -> largest magnitude of all runs, before rounding: beyond 65504 it became infinite.

        Ops that only move values are left out. NaN: a NaN was computed.
        """
        return {output.name: output.maximum for output in self._computed if output.maximum is not None}

    def maxima_by_op(self) -> dict[str, float]:
        """Type of op -> the largest of its ``maxima``; NaN where one is."""
        found: dict[str, float] = {}
        for output in self._computed:
            if output.maximum is not None:
                found[output.op] = float(np.maximum(found.get(output.op, 0.0), output.maximum))
        return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch alone does small conversions here, and waiting for a second thread can take it a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _layout(kind: TensorType) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    return tuple(size or 0 for size in kind.shape), kind.dtype.array


def _check(declared: Mapping[str, TensorType], given: Mapping[str, Array], where: str) -> None:
    """Raises H1ExportError unless ``given`` is exactly what is declared."""
    if missing := [name for name in declared if name not in given]:
        raise H1ExportError(f"{where} {missing[0]!r}", "is missing", f"give it as {declared[missing[0]]}")
    if unknown := [name for name in given if name not in declared]:
        raise H1ExportError(
            f"{where} {unknown[0]!r}", "is not one of the function's", f"it has {', '.join(declared) or 'none'}"
        )
    for name, kind in declared.items():
        array = np.asarray(given[name])
        if array.dtype != kind.dtype.array or kind.dtype in (STRING,) or not kind.holds(array.shape):
            raise H1ExportError(
                f"{where} {name!r}", f"is {array.dtype} {list(array.shape)}, not {kind}", "convert it first"
            )
