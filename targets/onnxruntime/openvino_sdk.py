"""The only door to the openvino package, which runs the graph of --graph portable too."""

from __future__ import annotations

from importlib import import_module, metadata
from types import ModuleType

from h1export.errors import H1ExportError, reason

NAME = "openvino"  # what --kernels takes, the package, its module, and the extra that installs it
INSTALL = f"pip install 'h1export[{NAME}]'"


def openvino() -> ModuleType:
    """Return the module. Raises H1ExportError where it is not installed, or cannot be loaded."""
    try:
        return import_module("openvino")
    except ModuleNotFoundError:
        raise H1ExportError(NAME, "is not installed", INSTALL) from None
    except (ImportError, OSError) as error:  # one of its libraries does not fit this system
        raise H1ExportError(NAME, f"cannot be loaded ({reason(error)})", INSTALL) from None


def version() -> str:
    """Return the installed version. Raises H1ExportError where there is none."""
    openvino()
    return metadata.version(NAME)
