"""The only door to the coremltools package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from h1export.errors import H1ExportError


class Proto(NamedTuple):
    """The message classes of an .mlpackage's model file."""

    Model_pb2: ModuleType
    MIL_pb2: ModuleType
    DecodeError: type[Exception]


def coremltools() -> Any:
    """The module.

    Raises:
        H1ExportError: not installed.
    """
    return module("coremltools")


def builder() -> Any:
    """MIL's Builder: a method for each op."""
    return module("coremltools.converters.mil.mil").Builder


def mil() -> Any:
    """MIL's Function, Program and types."""
    return module("coremltools.converters.mil.mil")


def int4() -> Any:
    """numpy's form of MIL's int4: int8 with a note of its true dtype."""
    return module("coremltools.converters.mil.mil.types.type_mapping").nptype_from_builtin(mil().types.int4)


def proto() -> Proto:
    """The message classes alone: no op definition, no converter of the package takes part in what is read with them.

    Raises:
        H1ExportError: not installed.
    """
    error: Any = import_module("google.protobuf.message").DecodeError
    return Proto(module("coremltools.proto.Model_pb2"), module("coremltools.proto.MIL_pb2"), error)


def module(name: str) -> ModuleType:
    """A module of the package.

    Raises:
        H1ExportError: not installed.
    """
    if find_spec("coremltools") is None:
        raise H1ExportError("coremltools", "is not installed", "pip install 'h1export[coreml]'")
    with _quiet():
        return import_module(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Away from macOS every import of the package warns of eight parts that only macOS has."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
