"""Options of the target "mlx"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from h1export.targets.options import COMPUTE, TargetOptions

Compute = Literal["fp16", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class MlxOptions(TargetOptions):
    """What a build for MLX can choose.

    Attributes:
        compute: the dtype of activations, and of scales and every other float of the folder, because mlx-lm computes in
            the dtype of its weights.
    """

    compute: Annotated[Compute, COMPUTE] = "fp16"


Options = MlxOptions
