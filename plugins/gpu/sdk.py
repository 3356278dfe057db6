"""The import boundary of Triton, and of the kernels.py modules that are written in it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from h1export.errors import H1ExportError


def installed() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def triton() -> Any:
    """Import and return the module triton.

    Raises:
        H1ExportError: Triton is not installed.
    """
    if not installed():
        raise H1ExportError("triton", "is not installed", "pip install 'h1export[trt]'")
    return import_module("triton")


def target(architecture: int) -> Any:
    """Return Triton's description of an NVIDIA GPU; ``architecture`` is a number such as 80 for sm_80."""
    return import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)


def kernels(op: str) -> ModuleType:
    """Return the module kernels.py of ``op``.

    Triton interprets its kernels if TRITON_INTERPRET was set before the first call, and compiles them otherwise.

    Raises:
        H1ExportError: Triton is not installed.
    """
    triton()
    return import_module(f"h1export.plugins.{op}.kernels")
