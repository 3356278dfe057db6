"""Options of the target "mlx"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.quantize.choices import AUTO, Embedding
from h1export.targets.options import COMPUTE, EMBEDDING, TargetOptions, need_halves

Compute = Literal["fp16", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class MlxOptions(TargetOptions):
    """What a build for MLX can choose.

    Attributes:
        embedding: the precision of the embedding; fp16 needs activations in fp16, whose dtype floats have.
        compute: the dtype of activations, and of scales and every other float of the folder, because mlx-lm computes in
            the dtype of its weights.
    """

    embedding: Annotated[Embedding, EMBEDDING] = AUTO
    compute: Annotated[Compute, COMPUTE] = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        need_halves(self.embedding, self.compute)


Options = MlxOptions
