"""What is left to do on the machine with the GPU: build the engine where there is none, and see that it fits the machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from h1export.artifact.artifact import MANIFEST, Artifact, file_table
from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.targets.tensorrt.engine import build
from h1export.targets.tensorrt.engine.config import ENGINE, EngineConfig
from h1export.targets.tensorrt.engine.requirements import EngineRequirements, Host, check


def finish(folder: Path, progress: Progress) -> EngineRequirements:
    """Make the artifact in ``folder`` ready to run here; one that is already is left as it is.

    Raises:
        H1ExportError: no artifact of TensorRT, no GPU or runtime here, one that the artifact is not for, or the builder's refusal.
    """
    artifact = Artifact.open(folder)
    requirements = EngineRequirements.of(artifact)
    recipe = EngineConfig.read(folder)
    host = Host.here(recipe)
    artifact.check_hashes()
    if not requirements.engine:
        if host.architecture not in requirements.architectures:
            built = ", ".join(f"sm_{architecture}" for architecture in requirements.architectures)
            what = f"its kernels are compiled for {built}, and this GPU is sm_{host.architecture}"
            raise H1ExportError(folder, what, f"build it with --sm {host.architecture}")
        requirements = _build(artifact, requirements, host, progress=progress)
    check(folder, requirements, host)
    return requirements


def _build(
    artifact: Artifact, requirements: EngineRequirements, host: Host, *, progress: Progress
) -> EngineRequirements:
    """The engine first, then the manifest that names it: a kill between the two leaves the artifact as it was."""
    folder = artifact.folder
    build_log = build.build(folder, progress)
    entry = file_table(folder)[ENGINE]
    made = dataclasses.replace(
        requirements, version=build_log.version, architectures=(host.architecture,), engine=entry[0]
    )
    manifest = dataclasses.replace(
        artifact.manifest, files={**artifact.manifest.files, ENGINE: entry}, requirements=made.to_json()
    )
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)
    return made
