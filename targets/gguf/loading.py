"""Load artifacts of the target "gguf"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.targets.gguf.runner import LlamaRunner
from h1export.targets.loading import refuse_native
from h1export.targets.options import Kernels


def load(artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto") -> LlamaRunner:
    """See Load."""
    refuse_native(artifact, kernels, "llama.cpp")
    return LlamaRunner(artifact, threads, float32)
