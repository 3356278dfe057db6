"""Load artifacts of the target "mlx"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.targets.loading import refuse_native
from h1export.targets.mlx.runner import MlxRunner
from h1export.targets.options import Kernels


def load(artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto") -> MlxRunner:
    """See Load."""
    refuse_native(artifact, kernels, "MLX")
    return MlxRunner(artifact, float32)
