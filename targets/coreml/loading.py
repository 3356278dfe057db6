"""Load artifacts of the target "coreml"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.targets.coreml import runner
from h1export.targets.loading import refuse_native
from h1export.targets.options import Kernels


def load(
    artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
) -> runner.CoreMLRunner:
    """See Load."""
    refuse_native(artifact, kernels, "CoreML")
    return runner.load(artifact)
