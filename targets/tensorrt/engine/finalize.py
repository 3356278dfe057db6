"""Finishes an artifact on the machine with the GPU: builds a missing engine and checks that it fits the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from h1export.artifact.artifact import Artifact, file_table
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.targets.onnx.graph_file import read_graph
from h1export.targets.tensorrt.engine import build
from h1export.targets.tensorrt.engine.config import ENGINE, EngineConfig
from h1export.targets.tensorrt.engine.requirements import EngineRequirements, Host, check
from h1export.targets.tensorrt.network.layout import MODEL
from h1export.writing import write_into


def build_engine_here(folder: Path, progress: Progress) -> EngineRequirements:
    """Make the artifact in ``folder`` ready to run on this machine; an engine that is already there is kept.

    Returns the requirements of the engine, which the manifest records.

    Raises:
        H1ExportError: ``folder`` is not an artifact for TensorRT, this machine has no GPU or no runtime, the artifact
            is not for this GPU, or the builder refuses it.
    """
    artifact = Artifact.open(folder)
    requirements = EngineRequirements.of(artifact)
    host = Host.here(EngineConfig.read(folder))
    artifact.check_hashes()
    if not requirements.engine:
        read_graph(folder / MODEL, artifact.manifest.files)
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
    """Build the engine, then replace the manifest by one that lists it: a kill in between leaves a valid artifact."""
    folder = artifact.folder
    build_log = build.build(folder, progress)
    entry = file_table(folder)[ENGINE]
    made = dataclasses.replace(
        requirements, version=build_log.version, architectures=(host.architecture,), engine=entry[0]
    )
    manifest = dataclasses.replace(
        artifact.manifest, files={**artifact.manifest.files, ENGINE: entry}, requirements=made.to_json()
    )
    try:
        write_into(folder, MANIFEST, manifest.to_json().encode())
    except H1ExportError:
        (folder / ENGINE).unlink(missing_ok=True)  # the manifest that stays does not list it
        raise
    return made
