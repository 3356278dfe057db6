"""Where a function reads and writes its states: CoreML states, or inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from h1export.model.falcon_h1.states import StateKind, StateTensor
from h1export.targets.coreml import sdk
from h1export.targets.coreml.program.layout import LOW, LOW_SCALE, output_name, shape, state_name
from h1export.targets.coreml.program.weights import Float, Var


class States(Protocol):
    """The states of one function.

    Values of recurrent states are float32, however they are stored; the others are activations.
    """

    def placeholders(self) -> Mapping[str, Any]:
        """Return the function's inputs for its states, by name."""
        ...

    def read(self, tensor: StateTensor) -> Var:
        """Emit the state's value."""
        ...

    def write(self, tensor: StateTensor, value: Var) -> Var:
        """Emit the state's new value, and return it as the state then holds it."""
        ...

    def outputs(self) -> list[Var]:
        """Return the function's outputs for its states."""
        ...


def _cast(x: Var, dtype: Float) -> Var:
    name = {np.float16: "fp16", np.float32: "fp32"}[dtype]
    return x if x.dtype == getattr(sdk.mil().types, name) else sdk.builder().cast(x=x, dtype=name)


class HeldStates:
    """CoreML's own states, which are fp16.

    A recurrent state takes two, high and low, because slow heads drift in fp16 alone.
    """

    def __init__(self, tensors: Sequence[StateTensor], max_context: int, compute: Float) -> None:
        self._shapes = {tensor: shape(tensor, max_context) for tensor in tensors}
        self._compute = compute
        self.inputs = dict[str, Var]()

    def placeholders(self) -> Mapping[str, Any]:
        mb = sdk.builder()
        fp16 = sdk.mil().types.fp16
        names = [(name, dims) for tensor, dims in self._shapes.items() for name in state_names(tensor)]
        return {name: mb.state_tensor_placeholder(shape=dims, dtype=fp16) for name, dims in names}

    def read(self, tensor: StateTensor) -> Var:
        mb = sdk.builder()
        names = state_names(tensor)
        high, *low = [mb.read_state(input=self.inputs[name]) for name in names]
        if not low:
            return _cast(high, self._compute)
        return mb.add(x=_cast(high, np.float32), y=mb.mul(x=_cast(low[0], np.float32), y=np.float32(1 / LOW_SCALE)))

    def write(self, tensor: StateTensor, value: Var) -> Var:
        mb = sdk.builder()
        name = state_name(tensor)
        held = mb.coreml_update_state(state=self.inputs[name], value=_cast(value, np.float16))
        if tensor.kind is not StateKind.RECURRENT:
            return _cast(held, self._compute)
        rest = mb.mul(x=mb.sub(x=value, y=_cast(held, np.float32)), y=np.float32(LOW_SCALE))
        mb.coreml_update_state(state=self.inputs[name + LOW], value=_cast(rest, np.float16))
        return value

    def outputs(self) -> list[Var]:
        return []


class PassedStates:
    """States as inputs and outputs of every call."""

    def __init__(self, tensors: Sequence[StateTensor], max_context: int, compute: Float) -> None:
        self._shapes = {tensor: shape(tensor, max_context) for tensor in tensors}
        self._compute = compute
        self.inputs = dict[str, Var]()
        self._outputs = dict[StateTensor, Var]()

    def placeholders(self) -> Mapping[str, Any]:
        mb = sdk.builder()
        types = sdk.mil().types
        names = {np.float16: types.fp16, np.float32: types.fp32}
        return {
            state_name(tensor): mb.placeholder(shape=dims, dtype=names[passed_dtype(tensor, self._compute)])
            for tensor, dims in self._shapes.items()
        }

    def read(self, tensor: StateTensor) -> Var:
        return self.inputs[state_name(tensor)]

    def write(self, tensor: StateTensor, value: Var) -> Var:
        self._outputs[tensor] = value
        return value

    def outputs(self) -> list[Var]:
        mb = sdk.builder()
        return [mb.identity(x=self._outputs[tensor], name=output_name(tensor)) for tensor in self._shapes]


def passed_dtype(tensor: StateTensor, compute: Float) -> Float:
    """Return the dtype of a state that is an input and an output."""
    return np.float32 if tensor.kind is StateKind.RECURRENT else compute


def state_names(tensor: StateTensor) -> tuple[str, ...]:
    """Return the names of CoreML's states for one of the model's."""
    name = state_name(tensor)
    return (name, name + LOW) if tensor.kind is StateKind.RECURRENT else (name,)
