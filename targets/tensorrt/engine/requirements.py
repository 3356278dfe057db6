"""What an engine is tied to, and whether a machine has it: to be asked before an engine is read, because engines are executable."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, EngineConfig
from h1export.targets.tensorrt.options import RuntimeName

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
MAJOR = 75
MINOR = 76
DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class EngineRequirements:
    """``runtime`` and ``version`` that built the engine, ``architectures`` that it is for, sha256 of ``plugin`` and ``engine``.

    Without an engine, ``version`` and ``engine`` are empty. ``kernels``: what the plugin's machine code takes of a GPU.
    """

    runtime: RuntimeName
    version: str
    architectures: tuple[int, ...]
    plugin: str
    engine: str
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values, for the manifest."""
        return asdict(self) | {"architectures": list(self.architectures)}

    @classmethod
    def of(cls, artifact: Artifact) -> EngineRequirements:
        """Raises H1ExportError for an artifact without one."""
        data: Mapping[str, Any] = artifact.manifest.requirements
        try:
            return cls(**{**data, "architectures": tuple(data["architectures"])})
        except (TypeError, KeyError):
            raise H1ExportError(
                artifact.folder, "has no passport of an engine", "give an artifact of --target trt"
            ) from None


@dataclass(frozen=True)
class Host:
    """A machine: ``versions`` of the runtimes installed, and the compute capability of its GPU."""

    versions: Mapping[RuntimeName, str]
    architecture: int

    @classmethod
    def here(cls, recipe: EngineConfig) -> Host:
        """This machine. Raises H1ExportError without an NVIDIA GPU, or without the recipe's runtime."""
        architecture = gpu_architecture()
        return cls({recipe.runtime: str(sdk.module(recipe.runtime, recipe.versions).__version__)}, architecture)


def gpu_architecture() -> int:
    """The compute capability of the first GPU, 89 for 8.9. Raises H1ExportError where there is none."""
    missing = H1ExportError("NVIDIA GPU", "there is none here, or no driver for it", "go on on a machine that has one")
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise missing from None
    device = ctypes.c_int()
    major = ctypes.c_int()
    minor = ctypes.c_int()
    done = [driver.cuInit(0), driver.cuDeviceGet(ctypes.byref(device), 0)]
    done += [
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        for value, which in ((major, MAJOR), (minor, MINOR))
    ]
    if any(done):
        raise missing
    return 10 * major.value + minor.value


def check(folder: Path, requirements: EngineRequirements, host: Host) -> None:
    """Whether ``host`` may read the engine in ``folder``.

    Raises:
        H1ExportError: no engine, changed files, another version, or a GPU that the engine is not for; it names the mismatch.
    """
    if not requirements.engine:
        raise H1ExportError(folder, "has no engine yet", "run h1export trt build-engine on it, on the GPU host")
    for name, digest in ((ENGINE, requirements.engine), (LIBRARY, requirements.plugin)):
        if _sha256(folder / name) != digest:
            raise H1ExportError(
                folder / name, "is not the file that the manifest's passport names", "build the artifact again"
            )
    version = host.versions.get(requirements.runtime)
    if version != requirements.version:
        what = f"the engine was built with {sdk.NAMES[requirements.runtime]} {requirements.version}, and here is {version or 'none'}"
        raise H1ExportError(folder / ENGINE, what, "install that version, or build the engine again with this one")
    if host.architecture not in requirements.architectures:
        built = ", ".join(f"sm_{architecture}" for architecture in requirements.architectures)
        what = f"the engine is for {built}, and this GPU is sm_{host.architecture}"
        raise H1ExportError(folder / ENGINE, what, f"build it with --sm {host.architecture}")


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise H1ExportError(file, f"cannot be read ({error.strerror})", "build the artifact again") from None
