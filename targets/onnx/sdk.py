"""The only door to the onnxruntime package."""

from __future__ import annotations

from importlib import import_module, metadata
from types import ModuleType

from h1export.errors import H1ExportError

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both install the module onnxruntime: the later one overwrites the other


def installed() -> dict[str, str]:
    """Distribution -> version of what provides the module ``onnxruntime``."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def onnxruntime() -> ModuleType:
    """The module.

    Raises:
        H1ExportError: not installed, or both packages installed over each other.
    """
    packages = installed()
    if not packages:
        raise H1ExportError("onnxruntime", "is not installed", "pip install 'h1export[ort]'")
    if len(packages) > 1:
        what = f"{' and '.join(packages)} are both installed and overwrite each other's files"
        raise H1ExportError(
            "onnxruntime", what, f"pip uninstall {' '.join(PACKAGES)}, then install the extra ort or the extra cuda"
        )
    return import_module("onnxruntime")


def check_provider(provider: str) -> None:
    """Raises H1ExportError where the installed onnxruntime lacks the execution provider."""
    available = onnxruntime().get_available_providers()
    if provider not in available:
        what = f"this onnxruntime does not have it, only {', '.join(available)}"
        raise H1ExportError(
            provider, what, "pip install 'h1export[cuda]' on a machine with an NVIDIA GPU, or build with --graph cpu"
        )
