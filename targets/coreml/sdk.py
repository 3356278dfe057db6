"""The import boundary of coremltools: every other module gets its parts from here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from h1export.errors import H1ExportError


class Proto(NamedTuple):
    """The protobuf modules of an .mlpackage's model file, and the exception of a message that cannot be decoded."""

    Model_pb2: ModuleType
    MIL_pb2: ModuleType
    DecodeError: type[Exception]


def coremltools() -> Any:
    """Import and return the module coremltools.

    Raises:
        H1ExportError: coremltools is not installed.
    """
    return module("coremltools")


def builder() -> Any:
    """Return the MIL Builder, which has a method for each op.

    Raises:
        H1ExportError: coremltools is not installed.
    """
    return module("coremltools.converters.mil.mil").Builder


def mil() -> Any:
    """Return the module that has MIL's Function, Program and types.

    Raises:
        H1ExportError: coremltools is not installed.
    """
    return module("coremltools.converters.mil.mil")


def int4() -> Any:
    """Return the numpy type that stands for MIL's int4: int8 with a note of its true type.

    Raises:
        H1ExportError: coremltools is not installed.
    """
    return module("coremltools.converters.mil.mil.types.type_mapping").nptype_from_builtin(mil().types.int4)


def proto() -> Proto:
    """Return the protobuf modules alone; they use no op definition and no converter of coremltools.

    Raises:
        H1ExportError: coremltools is not installed.
    """
    error: Any = import_module("google.protobuf.message").DecodeError
    return Proto(module("coremltools.proto.Model_pb2"), module("coremltools.proto.MIL_pb2"), error)


@cache  # every op that is emitted asks for one
def module(name: str) -> ModuleType:
    """Import and return a module of coremltools.

    Raises:
        H1ExportError: coremltools is not installed.
    """
    if find_spec("coremltools") is None:
        raise H1ExportError("coremltools", "is not installed", "pip install 'h1export[coreml]'")
    with _quiet():
        return import_module(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of coremltools about the eight parts that exist on macOS only."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
