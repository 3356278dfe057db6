"""The import boundary of gguf, which writes and reads the file, and of xllamacpp, which is llama.cpp."""

from __future__ import annotations

from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError

# The release whose C structures llama.py describes. Its files name the release of llama.cpp in their version.
XLLAMACPP = "2026.10.11549"
INSTALL = "pip install 'h1export[gguf]'"


def gguf() -> Any:
    """Return the module gguf.

    Raises:
        H1ExportError: it is not installed.
    """
    if find_spec("gguf") is None:
        raise H1ExportError("gguf", "is not installed", INSTALL)
    return import_module("gguf")


def library() -> Path:
    """Return xllamacpp's shared library, which exports llama.cpp's C API.

    Raises:
        H1ExportError: xllamacpp is not installed, is of another release, or has no such library.
    """
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise H1ExportError("xllamacpp", "is not installed", INSTALL)
    found = version()
    if found != XLLAMACPP:
        what = f"is of release {found}, and h1export knows the C structures of {XLLAMACPP}"
        raise H1ExportError("xllamacpp", what, f"pip install xllamacpp=={XLLAMACPP}")
    files = sorted(Path(spec.origin).parent.glob("xllamacpp.*"))
    libraries = [file for file in files if file.suffix in (".so", ".pyd", ".dylib")]
    if not libraries:
        raise H1ExportError("xllamacpp", "has no shared library", f"pip install --force-reinstall xllamacpp=={found}")
    return libraries[0]


def version() -> str:
    """Return the version of the installed xllamacpp."""
    return metadata.version("xllamacpp")
