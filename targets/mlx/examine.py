"""What a machine has of what an mlx-lm folder needs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.base import Finding
from h1export.targets.mlx import sdk
from h1export.targets.mlx.model import MlxModel


def examine(artifact: Artifact) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``."""
    try:
        sdk.utils()
    except H1ExportError as error:
        yield Finding.of("mlx-lm", error)
        return
    found = metadata.version("mlx-lm")
    if found == sdk.FOLDED_FOR:
        yield Finding("mlx-lm", True, found)
    else:
        what = f"{found}; folders were checked with {sdk.FOLDED_FOR}, and another release may fold µP otherwise"
        yield Finding("mlx-lm", None, what, "run h1export validate, or install that release")
    metal = sdk.core().metal.is_available()
    yield Finding("GPU", None, "Metal" if metal else "none: MLX computes on the CPU")
    try:
        MlxModel(artifact)
    except H1ExportError as error:
        yield Finding.of("loading", error)
        return
    yield Finding("loading", True, sdk.versions())
