"""h1export: Falcon-H1 hybrid language models, exported to the runtimes people deploy on, and checked."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

LAZY = {
    "load": ("h1export.commands.load", "load_folder"),
    "hf": ("h1export.hf", ""),
}  # name -> module, name in it; __init__.pyi has the types


def __getattr__(name: str) -> Any:
    """What Python users call. It is imported at its first use (PEP 562), so that importing the package stays light."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = LAZY[name]
    found = import_module(module)
    return getattr(found, inside) if inside else found
