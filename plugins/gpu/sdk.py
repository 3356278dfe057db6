"""The only door to Triton, and to the modules that are written in it: kernels.py of an op."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from h1export.errors import H1ExportError


def triton() -> Any:
    """The module.

    Raises:
        H1ExportError: not installed.
    """
    if find_spec("triton") is None:
        raise H1ExportError("triton", "is not installed", "pip install 'h1export[trt]'")
    return import_module("triton")


def target(architecture: int) -> Any:
    """Triton's description of an NVIDIA GPU, such as 80 for sm_80."""
    return import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32)


def kernels(op: str) -> ModuleType:
    """kernels.py of ``op``: run by Triton's interpreter where TRITON_INTERPRET was set before the first call, otherwise compiled.

    Raises:
        H1ExportError: Triton is not installed.
    """
    triton()
    return import_module(f"h1export.plugins.{op}.kernels")
