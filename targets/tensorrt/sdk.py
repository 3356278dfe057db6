"""The import boundary of TensorRT-RTX and TensorRT, which have the same interface: no other module imports them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.specifiers import SpecifierSet

from h1export.errors import H1ExportError
from h1export.targets.tensorrt.options import RuntimeName

MODULES: Mapping[RuntimeName, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
NAMES: Mapping[RuntimeName, str] = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
INSTALL: Mapping[RuntimeName, str] = {
    "rtx": "pip install 'h1export[trt]' on Linux",
    "tensorrt": "install TensorRT 10.15 or later on a machine with an NVIDIA GPU",
}
RTX_LIBRARIES = "tensorrt-rtx-cu13-libs"
# RTX's parser opens its library by this name when it adds a plugin; the package has it under a longer name.
RTX_LIBRARY = "libtensorrt_rtx.so"


def has(runtime: RuntimeName) -> bool:
    """Return whether the package of ``runtime`` is installed; it is not imported."""
    return find_spec(MODULES[runtime]) is not None


def module(runtime: RuntimeName, versions: str) -> Any:
    """Import the package of ``runtime`` and check its version against the version specifier ``versions``.

    Raises:
        H1ExportError: the package is not installed, cannot be imported, or has another version.
    """
    if not has(runtime):
        raise H1ExportError(NAMES[runtime], "is not installed", INSTALL[runtime])
    try:
        found: Any = import_module(MODULES[runtime])
    except (ImportError, OSError) as error:  # its shared libraries are missing
        raise H1ExportError(
            NAMES[runtime], f"is installed and cannot be imported ({error})", INSTALL[runtime]
        ) from None
    if not SpecifierSet(versions).contains(found.__version__, prereleases=True):
        raise H1ExportError(NAMES[runtime], f"is {found.__version__}, and {versions} is needed", INSTALL[runtime])
    return found


def logger(trt: Any, on_error: Callable[[str], object]) -> Any:
    """Return an ILogger of the module ``trt`` that calls ``on_error`` with the text of every error."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                on_error(text)

    return Logger()


def _rtx_library() -> Path:
    """Return the shared library of TensorRT-RTX in its installed package."""
    try:
        shipped = [file for file in metadata.files(RTX_LIBRARIES) or [] if file.name.startswith(RTX_LIBRARY)]
    except metadata.PackageNotFoundError:
        shipped = []
    if not shipped:
        raise H1ExportError(NAMES["rtx"], f"is installed without {RTX_LIBRARY}", INSTALL["rtx"])
    return Path(str(shipped[0].locate()))


@contextmanager
def environment(runtime: RuntimeName) -> Iterator[dict[str, str]]:
    """Yield the environment variables of a build process, in which RTX's parser finds its library under RTX_LIBRARY.

    Raises:
        H1ExportError: TensorRT-RTX is installed without its libraries.
    """
    with TemporaryDirectory(prefix="h1export-tensorrt-") as folder:
        paths = os.environ.get("LD_LIBRARY_PATH", "")
        if runtime == "rtx":
            Path(folder, RTX_LIBRARY).symlink_to(_rtx_library())
            paths = os.pathsep.join(filter(None, (folder, paths)))
        yield os.environ | {"LD_LIBRARY_PATH": paths}
