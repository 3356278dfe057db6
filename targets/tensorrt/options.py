"""Options of the target "trt"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.quantize.choices import AUTO, Embedding
from h1export.targets.options import COMPUTE, EMBEDDING, MAX_CONTEXT, Flag, TargetOptions, need_halves

Compute = Literal["fp16", "bf16"]
RuntimeName = Literal["rtx", "tensorrt"]


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(TargetOptions):
    """What a build for TensorRT can choose.

    Attributes:
        embedding: the precision of the embedding; fp16 needs activations in fp16, whose dtype floats have.
        max_context: the columns of the keys' and values' buffers.
        compute: the dtype of activations.
        max_batch: the sequences that the buffers have room for.
        runtime: whose engine; None: TensorRT-RTX where it is installed.
        architectures: compute capabilities of the GPUs that the artifact is for; empty: the runtime's usual ones.
    """

    embedding: Annotated[Embedding, EMBEDDING] = AUTO
    max_context: Annotated[int, MAX_CONTEXT] = 2048
    compute: Annotated[Compute, COMPUTE] = "fp16"
    max_batch: Annotated[int, Flag("The most sequences of a call.", minimum=1)] = 1
    runtime: Annotated[
        RuntimeName | None,
        Flag(
            "rtx: TensorRT-RTX, whose engine is built here; tensorrt: TensorRT, whose engine "
            "`h1export trt build-engine` builds on a machine with a GPU.",
            default="rtx, if installed",
        ),
    ] = None
    architectures: Annotated[
        tuple[int, ...], Flag("Compute capability of a GPU that the engine is for, such as 89.", name="--sm")
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        need_halves(self.embedding, self.compute)


Options = TensorRTOptions
