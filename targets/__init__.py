"""The runtimes that a program can be lowered to, by name. A target's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from h1export.targets.base import BuildOptions, Compute, Kernels, ProviderName, RuntimeName, Target

# name -> module with a class `target`; one line a target
MODULES: Mapping[str, str] = {
    "ort": "h1export.targets.onnxruntime.target",
    "trt": "h1export.targets.tensorrt.target",
    "coreml": "h1export.targets.coreml.target",
}

__all__ = ["MODULES", "BuildOptions", "Compute", "Kernels", "ProviderName", "RuntimeName", "Target", "get_target"]


def get_target(name: str) -> Target:
    """The target called ``name``; its vendor SDK is not imported yet."""
    return cast(Target, import_module(MODULES[name]).target)
