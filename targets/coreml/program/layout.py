"""The package's functions and states: the only place of this target that knows names and shapes of its I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from h1export.model.falcon_h1.probes import PREFIX
from h1export.model.falcon_h1.states import Array, StateKind, StateTensor

PACKAGE = "model.mlpackage"
DATA = f"{PACKAGE}/Data/com.apple.CoreML"
MODEL = f"{DATA}/model.mlmodel"
WEIGHTS = f"{DATA}/weights/weight.bin"

INPUT_IDS = "input_ids"
POSITION = "position"
N_VALID = "n_valid"
LOGITS = "logits"
# in the package's metadata
MAX_CONTEXT = "max_context"
PREFILL_TOKENS = "prefill_tokens"
LOW_SCALE = 2048.0  # the low half of a recurrent state is stored times this: fp16 has 11 bits
LOW = "_low"

FunctionName = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Call:
    """A function of the package: how many tokens a call of it takes.

    ``prefill`` also takes fewer, padded on the right.
    """

    name: FunctionName
    tokens: int

    @property
    def padded(self) -> bool:
        return self.tokens > 1


DECODE = Call("decode", 1)
PREFILL = Call("prefill", 64)
CALLS = (DECODE, PREFILL)


def state_name(tensor: StateTensor) -> str:
    """Return the name of a state, or of the input that stands for it: MIL's names have no dots."""
    return tensor.past.replace(".", "_")


def output_name(tensor: StateTensor) -> str:
    """Return the name of the output that a state becomes in a package without states."""
    return tensor.present.replace(".", "_")


def probe_output(probe: str) -> str:
    """Return the name of a probe in a function: MIL's names have no dots."""
    return (PREFIX + probe).replace(".", "_")


def shape(tensor: StateTensor, max_context: int) -> tuple[int, ...]:
    """Return the shape for one sequence, with ``max_context`` keys and values, and a convolution's channels last."""
    sizes = tuple({"batch": 1, "past": max_context}[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
    return (sizes[0], sizes[2], sizes[1]) if tensor.kind is StateKind.CONV else sizes


def canonical(tensor: StateTensor, state: Array, length: int) -> Array:
    """Return the state of a sequence of ``length`` tokens in StateSpec's layout."""
    if tensor.kind is StateKind.CONV:
        return np.ascontiguousarray(state.transpose(0, 2, 1))
    return np.ascontiguousarray(state[:, :, :length]) if tensor.kind.grows else state


def stored(tensor: StateTensor, saved: Array, max_context: int) -> Array:
    """Return a state in StateSpec's layout as the package stores it: the inverse of ``canonical``."""
    if tensor.kind is StateKind.CONV:
        return np.ascontiguousarray(saved.transpose(0, 2, 1))
    if not tensor.kind.grows:
        return saved
    wide = np.zeros(shape(tensor, max_context), np.float32)
    wide[:, :, : saved.shape[2]] = saved
    return wide
