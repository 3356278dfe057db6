"""What a machine has of what a Core ML artifact needs: macOS, or else the evaluator."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.base import Finding
from h1export.targets.coreml import runner

OLDEST_MACOS = 15  # the first with states


def examine(artifact: Artifact) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``; off a Mac, h1export's evaluator computes the package."""
    if sys.platform == "darwin":
        version = platform.mac_ver()[0]
        new = int(version.partition(".")[0] or 0) >= OLDEST_MACOS
        yield Finding("macOS", new, f"{version}; {OLDEST_MACOS} or later is needed", "" if new else "update macOS")
    else:
        yield Finding("macOS", None, "is not here: h1export's evaluator computes the package, slowly")
    try:
        loaded = runner.load(artifact)
    except H1ExportError as error:
        yield Finding.of("loading", error)
        return
    yield Finding("loading", True, loaded.provenance.kernels)
