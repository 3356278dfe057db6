"""The half of a target that runs its artifacts: the function ``load`` of its module loading.py.

Such a module should import nothing that only a build needs, so that a program which runs artifacts starts fast. That of
--target ort does without torch and onnx-ir, which a test checks; those of other targets still import torch.
"""

from __future__ import annotations

from typing import Any, Protocol

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.runtime.runner import Inspectable
from h1export.targets.options import OWN_KERNELS, Kernels


class Load(Protocol):
    """Loads what the target has written."""

    def __call__(
        self, artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
    ) -> Inspectable[Any]:
        """Return a Runner over ``artifact``.

        Args:
            artifact: the artifact.
            threads: the runtime's number of threads; 0 leaves it to the runtime.
            float32: whether to compute in float32 even where the artifact rounds activations, so that a lowering error
                cannot hide behind the rounding.
            kernels: "native" means h1export's own, "compiled" means the same, compiled on this machine even where the
                installed wheel has them, "stock" means the runtime's, and "auto" means native where they are
                available; where they are not, ``Provenance.fallback`` says why. A target with ``other_runtimes`` gets
                their names too, and computes in that one.

        Raises:
            H1ExportError: The runtime is not installed, or the requested kernels are not available.
        """
        ...


def refuse_native(artifact: Artifact, kernels: Kernels, runtime: str) -> None:
    """Raise H1ExportError where h1export's own kernels are asked for, of a ``runtime`` for which there are none."""
    if kernels in OWN_KERNELS:
        raise H1ExportError(
            artifact.folder, f"{runtime} has no kernels of h1export's own", f"leave out --kernels {kernels}"
        )
