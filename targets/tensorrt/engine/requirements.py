"""EngineRequirements: the runtime, GPU and files that an engine was built for, and the check that a machine has them.

An engine holds executable code, so the check comes before the engine is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from h1export import forms
from h1export.artifact.artifact import Artifact
from h1export.artifact.files import sha256_file
from h1export.errors import H1ExportError
from h1export.forms import Count, Sha256
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, EngineConfig
from h1export.targets.tensorrt.options import RuntimeName

MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
NAME_BYTES = 256  # of a GPU's name, more than any has
DRIVER = "libcuda.so.1"
OLDEST_DRIVER = 12  # major version of CUDA that the driver must support for the plugin


@dataclass(frozen=True)
class EngineRequirements:
    """What the machine that runs an engine must have.

    Attributes:
        runtime: the runtime that built the engine.
        version: its version; empty where there is no engine yet.
        architectures: compute capabilities of the GPUs that the engine is for; without an engine, those of the kernels.
        plugin: sha256 of the plugin library.
        engine: sha256 of the engine; empty where there is none yet.
        kernels: kernel and architecture -> its registers per thread, spilled bytes and bytes of shared memory.
    """

    runtime: RuntimeName
    version: str
    architectures: tuple[Count, ...]
    plugin: Sha256
    engine: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]
    kernels: Mapping[str, Mapping[str, Count]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the requirements as JSON values, for the manifest."""
        return asdict(self) | {"architectures": list(self.architectures)}

    @classmethod
    def of(cls, artifact: Artifact) -> EngineRequirements:
        """Read the requirements from the manifest of ``artifact``.

        Raises:
            H1ExportError: the manifest has no requirements of an engine.
        """
        try:
            return forms.fill(cls, artifact.manifest.requirements)
        except forms.FormError as error:
            what = f"has no requirements of an engine in its manifest ({error})"
            raise H1ExportError(artifact.folder, what, "give an artifact of --target trt") from None


@dataclass(frozen=True)
class Host:
    """A machine that may run engines.

    Attributes:
        versions: installed runtime -> its version.
        architecture: compute capability of the first GPU, 89 for 8.9.
    """

    versions: Mapping[RuntimeName, str]
    architecture: int

    @classmethod
    def here(cls, config: EngineConfig) -> Host:
        """Return this machine, with the runtime that ``config`` names.

        Raises:
            H1ExportError: this machine has no NVIDIA GPU, or the runtime is not installed in one of the versions of
                ``config``.
        """
        architecture = gpu_architecture()
        return cls({config.runtime: str(sdk.module(config.runtime, config.versions).__version__)}, architecture)


def gpu_architecture() -> int:
    """Return the compute capability of the first GPU, 89 for 8.9.

    Raises:
        H1ExportError: this machine has no NVIDIA GPU, or no driver for it.
    """
    what = "there is none here, or no driver for it"
    missing = H1ExportError("NVIDIA GPU", what, "continue on a machine that has both")
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


def gpu_name() -> str:
    """Return the product name of the first GPU as its driver gives it; it is empty where there is none."""
    text = ctypes.create_string_buffer(NAME_BYTES)
    device = ctypes.c_int()
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ""
    if any((driver.cuInit(0), driver.cuDeviceGet(ctypes.byref(device), 0))):
        return ""
    if driver.cuDeviceGetName(text, NAME_BYTES, device):
        return ""
    return text.value.decode("utf-8", "replace")


def driver_version() -> tuple[int, int]:
    """Return the version of CUDA that the driver supports, (12, 4) for 12.4; (0, 0) where there is no driver."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0, 0
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return 0, 0
    return version.value // 1000, version.value % 1000 // 10


def check(folder: Path, requirements: EngineRequirements, host: Host) -> None:
    """Check that ``host`` may run the engine in ``folder``.

    Raises:
        H1ExportError: there is no engine, a file was changed, or the host has another version of the runtime or another
            GPU than the engine was built for; the error names both.
    """
    if not requirements.engine:
        raise H1ExportError(folder, "has no engine yet", "run h1export trt build-engine on it, on the GPU host")
    for name, digest in ((ENGINE, requirements.engine), (LIBRARY, requirements.plugin)):
        if sha256_file(folder / name) != digest:
            what = "is not the file that the requirements in the manifest name"
            raise H1ExportError(folder / name, what, "build the artifact again")
    version = host.versions.get(requirements.runtime)
    if version != requirements.version:
        built_with = f"{sdk.NAMES[requirements.runtime]} {requirements.version}"
        what = f"the engine was built with {built_with}, and here is {version or 'none'}"
        raise H1ExportError(folder / ENGINE, what, "install that version, or build the engine again with this one")
    if host.architecture not in requirements.architectures:
        built = ", ".join(f"sm_{architecture}" for architecture in requirements.architectures)
        what = f"the engine is for {built}, and this GPU is sm_{host.architecture}"
        raise H1ExportError(folder / ENGINE, what, f"build it with --sm {host.architecture}")
