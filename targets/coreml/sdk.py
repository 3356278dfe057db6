"""The only door to the coremltools package."""

from __future__ import annotations

import logging
from importlib import import_module, metadata
from typing import Any

from h1export.errors import H1ExportError

PACKAGE = "coremltools"


def _module(name: str) -> Any:
    """Raises H1ExportError without coremltools."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise H1ExportError(PACKAGE, "is not installed", "pip install 'h1export[coreml]'") from None
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # off a Mac it warns of every library that it does not find
    return import_module(name)


def coremltools() -> Any:
    """The package."""
    return _module(PACKAGE)


def builder() -> Any:
    """MIL's Builder: a method an op."""
    return _module("coremltools.converters.mil.mil").Builder


def mil() -> Any:
    """MIL's Function, Program and types."""
    return _module("coremltools.converters.mil.mil")


def serializer() -> Any:
    """MILProtoExporter and CoreMLProtoExporter."""
    return _module("coremltools.converters.mil.backend.mil.load")


def protobuf_values() -> Any:
    """Makers of single protobuf values."""
    return _module("coremltools.converters.mil.backend.mil.helper")


def int4() -> Any:
    """numpy's form of MIL's int4: int8 with a note of its true dtype."""
    return _module("coremltools.converters.mil.mil.types.type_mapping").nptype_from_builtin(mil().types.int4)
