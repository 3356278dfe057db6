"""The only door to the onnxruntime package, whatever distribution provides it."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from h1export.errors import H1ExportError

MODULE = "onnxruntime"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both install MODULE: in one folder the later overwrites the other


def installed() -> dict[str, str]:
    """Return distribution -> version of what provides the module that an import gets; empty where there is none.

    Python imports the first module on its path. So distributions in other folders, such as those of the system below a
    virtual environment, take no part and overwrite nothing. A module that was installed without a distribution beside
    it, such as an editable one, is taken for one of the others.
    """
    try:
        found = find_spec(MODULE)
    except ValueError:  # a program put a module of its own there
        found = None
    if found is None:
        return {}
    folders = {Path(place).resolve().parent for place in found.submodule_search_locations or ()}
    elsewhere: dict[str, str] = {}
    beside: dict[str, str] = {}
    for name in PACKAGES:
        for distribution in metadata.distributions(name=name):
            near = Path(str(distribution.locate_file(""))).resolve() in folders
            (beside if near else elsewhere).setdefault(name, distribution.version)
    return beside or dict(list(elsewhere.items())[:1])


@cache  # it is asked for at every token, and a look at what is installed takes a millisecond
def onnxruntime() -> ModuleType:
    """Return the module.

    Raises:
        H1ExportError: not installed, or both packages installed over each other.
    """
    packages = installed()
    if not packages:
        raise H1ExportError("onnxruntime", "is not installed", "pip install 'h1export[ort]'")
    if len(packages) > 1:
        what = f"{' and '.join(sorted(packages))} are both installed and overwrite each other's files"
        raise H1ExportError(
            "onnxruntime", what, f"pip uninstall {' '.join(PACKAGES)}, then install the extra ort or the extra cuda"
        )
    return import_module(MODULE)


def check_provider(provider: str) -> None:
    """Raises H1ExportError where the installed onnxruntime lacks the execution provider."""
    available = onnxruntime().get_available_providers()
    if provider not in available:
        what = f"this onnxruntime does not have it, only {', '.join(available)}"
        raise H1ExportError(
            provider, what, "pip install 'h1export[cuda]' on a machine with an NVIDIA GPU, or build with --graph cpu"
        )
