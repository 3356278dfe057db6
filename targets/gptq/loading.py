"""Load artifacts of the target "gptq"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.targets.gptq.runner import GptqRunner
from h1export.targets.loading import refuse_native
from h1export.targets.options import Kernels


def load(artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto") -> GptqRunner:
    """See Load."""
    refuse_native(artifact, kernels, "h1export's graph of a GPTQ folder")
    return GptqRunner(artifact)
