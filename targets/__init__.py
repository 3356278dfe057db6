"""The runtimes that a program can be lowered to: every folder here with a target.toml.

A target is imported when it is first used, so that naming the targets costs nothing.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from h1export.targets.info import TargetInfo, discover
from h1export.targets.options import KERNELS, Kernels, TargetOptions

if TYPE_CHECKING:  # the command line names targets without loading numpy
    from h1export.targets.base import Target
    from h1export.targets.loading import Load

__all__ = [
    "Kernels",
    "TargetInfo",
    "TargetOptions",
    "all_kernels",
    "get_target",
    "load_function",
    "options_class",
    "target_infos",
]


@cache
def target_infos() -> dict[str, TargetInfo]:
    """Return name -> the facts of target.toml, without importing a target."""
    return discover(__path__)


@cache
def all_kernels() -> tuple[str, ...]:
    """Return every value of --kernels."""
    return (*KERNELS, *sorted({name for info in target_infos().values() for name in info.other_runtimes}))


def get_target(name: str) -> Target[Any]:
    """Return the target called ``name``: `target` of its module target.py, which does not import the vendor SDK yet."""
    return cast("Target[Any]", _module(name, "target").target)


def load_function(name: str) -> Load:
    """Return what loads artifacts of the target called ``name``: `load` of its module loading.py."""
    return cast("Load", _module(name, "loading").load)


def options_class(name: str) -> type[TargetOptions]:
    """Return the options class of the target called ``name``: `Options` of its module options.py."""
    return cast(type[TargetOptions], _module(name, "options").Options)


def _module(name: str, module: str) -> Any:
    return import_module(f"{__name__}.{target_infos()[name].folder}.{module}")
