"""What a machine has of what a GPTQ folder needs: h1export's reader and graph; GPTQModel where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.targets.base import Finding

ENGINE = "gptqmodel"
TRIED = "7.7.0"  # the release that tools/check_gptq_folder.py was run with


def examine(artifact: Artifact) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``."""
    try:
        store = WeightStore.open(artifact.folder, artifact.config)
    except H1ExportError as error:
        yield Finding.of("reading", error)
        return
    yield Finding("reading", True, f"{len(store.packed)} weights in integers")
    try:
        yield Finding("GPTQModel", None, metadata.version(ENGINE))
    except metadata.PackageNotFoundError:
        what = "is not installed; h1export's own graph computes the folder, slowly"
        yield Finding("GPTQModel", None, what, f"pip install {ENGINE}=={TRIED}")
