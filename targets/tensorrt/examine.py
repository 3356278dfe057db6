"""What a machine has of what a TensorRT artifact needs: GPU, driver, runtime, plugin and engine."""

from __future__ import annotations

from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.artifact.files import sha256_file
from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.targets.base import Finding
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine import requirements as machine
from h1export.targets.tensorrt.engine.config import LIBRARY, EngineConfig
from h1export.targets.tensorrt.engine.finalize import build_engine_here
from h1export.targets.tensorrt.engine.requirements import OLDEST_DRIVER, EngineRequirements, Host
from h1export.targets.tensorrt.gpu.runner import EngineRunner


def examine(artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``; the engine is loaded where all else passed."""
    try:
        config = EngineConfig.read(artifact.folder)
        requirements = EngineRequirements.of(artifact)
    except H1ExportError as error:
        yield Finding.of("recipe", error)
        return
    found = [*_gpu(requirements), _runtime(config, requirements), _plugin(artifact, requirements)]
    yield from found
    engine = _engine(artifact, requirements, build=build, ready=all(one.passed for one in found), progress=progress)
    yield engine
    if engine.passed and all(one.passed for one in found):
        yield _loaded(artifact)


def _gpu(requirements: EngineRequirements) -> Iterator[Finding]:
    built = ", ".join(f"sm_{architecture}" for architecture in requirements.architectures)
    try:
        found = machine.gpu_architecture()
    except H1ExportError as error:
        yield Finding.of("GPU", error)
        return
    fits = found in requirements.architectures
    here = ", ".join(filter(None, (machine.gpu_name(), f"sm_{found}")))
    yield Finding("GPU", fits, f"{here}; the artifact is for {built}", "" if fits else f"build it with --sm {found}")
    major, minor = machine.driver_version()
    new = major >= OLDEST_DRIVER
    detail = f"supports CUDA {major}.{minor}; {OLDEST_DRIVER}.0 or later is needed"
    yield Finding("driver", new, detail, "" if new else "install a newer driver for the GPU")


def _runtime(config: EngineConfig, requirements: EngineRequirements) -> Finding:
    name = sdk.NAMES[config.runtime]
    try:
        version = str(sdk.module(config.runtime, config.versions).__version__)
    except H1ExportError as error:
        return Finding.of(name, error)
    if not requirements.version:
        return Finding(name, True, f"{version}; no engine was built with another")
    same = version == requirements.version
    next_step = "" if same else "install that version, or build the engine again with this one"
    return Finding(name, same, f"{version}; the engine was built with {requirements.version}", next_step)


def _plugin(artifact: Artifact, requirements: EngineRequirements) -> Finding:
    if sha256_file(artifact.folder / LIBRARY) == requirements.plugin:
        return Finding("plugin library", True, "has the recorded sha256")
    return Finding("plugin library", False, "has another sha256 than the recorded one", "build the artifact again")


def _engine(
    artifact: Artifact, requirements: EngineRequirements, *, build: bool, ready: bool, progress: Progress
) -> Finding:
    name = "engine"
    if not requirements.engine:
        if not build:
            return Finding(name, False, "there is none yet", "run h1export doctor with --build on the GPU host")
        if not ready:
            return Finding(name, False, "is not built on a machine that does not fit", "mend what did not pass first")
    try:
        if requirements.engine:
            machine.check(artifact.folder, requirements, Host.here(EngineConfig.read(artifact.folder)))
            return Finding(name, True, "fits this machine")
        build_engine_here(artifact.folder, progress)
    except H1ExportError as error:
        return Finding.of(name, error)
    return Finding(name, True, "was built for this machine")


def _loaded(artifact: Artifact) -> Finding:
    try:
        runner = EngineRunner(Artifact.open(artifact.folder))
    except H1ExportError as error:
        return Finding.of("loading", error)
    return Finding("loading", True, runner.provenance.kernels)
