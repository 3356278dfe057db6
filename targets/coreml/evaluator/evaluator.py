"""The evaluator of one function of a saved Core ML program."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator.compiler import Compiler
from h1export.targets.coreml.evaluator.dtypes import STRING, Array, narrow, widen
from h1export.targets.coreml.evaluator.package import Package
from h1export.targets.coreml.evaluator.program import Function, TensorType
from h1export.targets.coreml.evaluator.steps import Frame


class Evaluator:
    """A function of a package, resolved once and run many times.

    Ops compute in float32; an fp16 result is rounded once, at the op's output. A device may round intermediate results
    elsewhere, so its bits may differ. Declared types, shapes and bounds are checked in every run.

    Threads may share it. All evaluators of a process take turns, because each limits torch's threads while it compiles
    or runs.

    Args:
        package: the package.
        function: the name of the function; None takes the default of the package.
        without_weights: replace large float constants by zeros, see Compiler.

    Raises:
        H1ExportError: the package has no such function, or the evaluator does not support one of its ops, inputs of
            ops or constants.
    """

    def __init__(self, package: Package, function: str | None = None, without_weights: bool = False) -> None:
        self._package = package
        self.function: Function = package.function(function or package.default_function)
        with _one_thread():
            compiler = Compiler(package, self.function, without_weights)
        self._steps = compiler.steps
        self._output_slots = compiler.output_slots
        self._input_slots = compiler.input_slots
        self._op_outputs = compiler.op_outputs
        self._values: list[Array | None] = [compiler.constants.get(slot) for slot in range(compiler.slot_count)]
        # state -> (the array that the last run wrote, the same values as float32)
        self._written: dict[str, tuple[Array, Array]] = {}

    def initial_states(self) -> dict[str, Array]:
        """Return zeros for every state, in its declared type and shape."""
        return {name: np.zeros(*_shape_and_dtype(kind)) for name, kind in self.function.states.items()}

    def run(
        self, inputs: Mapping[str, Array], states: dict[str, Array] | None = None, watch: Collection[str] = ()
    ) -> dict[str, Array]:
        """Run the function and return its outputs by name, in their declared types.

        Args:
            inputs: an array for each input, of its declared type and shape.
            states: an array for each state. The run replaces its entries by new read-only arrays; it does not write to
                the old arrays.
            watch: names of outputs of ops to return beside the outputs, as float32 if they are fp16. A name that no op
                has is ignored.

        Raises:
            H1ExportError: an input or state is missing, unknown, or of another type or shape than declared; or an op
                fails on these values, for example because an index is out of bounds. ``states`` is then unchanged.
        """
        where = f"{self._package.path}: function {self.function.name!r}"
        _check(self.function.inputs, inputs, f"{where}, input")
        _check(self.function.states, states or {}, f"{where}, state")
        with np.errstate(all="ignore"), _one_thread():  # infinities and NaN are results, which ``maxima`` shows
            frame = Frame(list(self._values), dict(states or {}), self._unchanged_states(states or {}))
            for name, slot in self._input_slots.items():
                frame.values[slot] = widen(np.asarray(inputs[name]))
            for step in self._steps:
                step(frame)
            declared = zip(self.function.outputs.items(), self._output_slots, strict=True)
            outputs = {name: narrow(frame.values[slot], kind.dtype) for (name, kind), slot in declared}
            if states is not None:
                states.update(frame.states)
                self._written = {name: (states[name], array) for name, array in frame.widened.items()}
        outputs |= {output.name: frame.values[output.slot] for output in self._op_outputs if output.name in watch}
        return outputs

    def _unchanged_states(self, states: Mapping[str, Array]) -> dict[str, Array]:
        """Return the float32 values of the states that are still the arrays that the last run wrote.

        To convert a long cache again would cost more time than a token.
        """
        return {
            name: array
            for name, (written, array) in self._written.items()
            if states.get(name) is written and not written.flags.writeable
        }

    @property
    def maxima(self) -> dict[str, float]:
        """The largest magnitude of all runs for each fp16 output of an op, before rounding.

        A value beyond 65504 became infinite in fp16; NaN means that a NaN was computed. Ops that only move values are
        not included.
        """
        return {output.name: output.maximum for output in self._op_outputs if output.maximum is not None}

    def maxima_by_op(self) -> dict[str, float]:
        """Return the largest of the ``maxima`` of each type of op; it is NaN if one of them is."""
        found: dict[str, float] = {}
        for output in self._op_outputs:
            if output.maximum is not None:
                found[output.op] = float(np.maximum(found.get(output.op, 0.0), output.maximum))
        return found


_turn = Lock()  # of all evaluators: the number of torch's threads is the process's


def _renew() -> None:
    """Make a new lock in a forked process, which may not have the thread that holds the old one."""
    global _turn
    _turn = Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread, and let one evaluator compile or run at a time.

    Its small conversions can take a hundred times as long with a second thread to wait for. And a forked process would
    wait forever for the threads that its parent's torch had.
    """
    with _turn:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _shape_and_dtype(kind: TensorType) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    return tuple(size or 0 for size in kind.shape), kind.dtype.array


def _check(declared: Mapping[str, TensorType], given: Mapping[str, Array], where: str) -> None:
    """Raise H1ExportError unless ``given`` has exactly the declared names, types and shapes."""
    if missing := [name for name in declared if name not in given]:
        raise H1ExportError(f"{where} {missing[0]!r}", "is missing", f"give it as {declared[missing[0]]}")
    if unknown := [name for name in given if name not in declared]:
        raise H1ExportError(
            f"{where} {unknown[0]!r}", "does not exist", f"the function has {', '.join(declared) or 'none'}"
        )
    for name, kind in declared.items():
        array = np.asarray(given[name])
        if array.dtype != kind.dtype.array or kind.dtype is STRING or not kind.accepts(array.shape):
            raise H1ExportError(
                f"{where} {name!r}", f"is {array.dtype} {list(array.shape)}, not {kind}", "convert it first"
            )
