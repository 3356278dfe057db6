"""Options of the target "coreml"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.quantize.choices import AUTO, Embedding
from h1export.targets.options import COMPUTE, EMBEDDING, MAX_CONTEXT, Flag, TargetOptions, need_halves

Compute = Literal["fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class CoreMLOptions(TargetOptions):
    """What a build for CoreML can choose.

    Attributes:
        embedding: the precision of the embedding; fp16 needs activations in fp16, whose dtype floats have.
        max_context: the columns of the keys' and values' states.
        compute: the dtype of activations.
        state_io: whether states are inputs and outputs of every call instead of the runtime's own.
    """

    embedding: Annotated[Embedding, EMBEDDING] = AUTO
    max_context: Annotated[int, MAX_CONTEXT] = 2048
    compute: Annotated[Compute, COMPUTE] = "fp16"
    state_io: Annotated[bool, Flag("Make states inputs and outputs of each call instead of the runtime's own.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need_halves(self.embedding, self.compute)


Options = CoreMLOptions
