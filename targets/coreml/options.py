"""Options of the target "coreml"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.targets.options import COMPUTE, MAX_CONTEXT, Flag, TargetOptions

Compute = Literal["fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class CoreMLOptions(TargetOptions):
    """What a build for CoreML can choose.

    Attributes:
        max_context: the columns of the keys' and values' states.
        compute: the dtype of activations.
        state_io: whether states are inputs and outputs of every call instead of the runtime's own.
    """

    max_context: Annotated[int, MAX_CONTEXT] = 2048
    compute: Annotated[Compute, COMPUTE] = "fp16"
    state_io: Annotated[bool, Flag("Make states inputs and outputs of each call instead of the runtime's own.")] = False


Options = CoreMLOptions
