"""Load artifacts of the target "trt"."""

from __future__ import annotations

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.options import OWN_KERNELS, Kernels
from h1export.targets.tensorrt.emulator.runner import NetworkRunner
from h1export.targets.tensorrt.gpu.runner import EngineRunner


def load(
    artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
) -> EngineRunner | NetworkRunner:
    """Load the engine on this machine's GPU, or else the network that it was built from, on the CPU; see Load.

    Only the network has a ``float32`` form.
    """
    if float32 or kernels == "stock":
        return NetworkRunner(artifact, threads, float32)
    try:
        return EngineRunner(artifact)
    except H1ExportError as error:
        if kernels in OWN_KERNELS:
            raise
        why = f"is computed on the CPU, and not by its engine: {error}"
        return NetworkRunner(artifact, threads, float32, why=why)
