"""Types of what __init__.py imports when asked for."""

from h1export import hf as hf
from h1export.commands.load import load_folder as load

__all__ = ["__version__", "hf", "load"]

__version__: str
