"""The only door to the packages mlx and mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from types import ModuleType

from h1export.errors import H1ExportError, reason

INSTALL = "pip install 'h1export[mlx]'"
FOLDED_FOR = "0.32.2"  # the release of mlx-lm whose Falcon-H1 was read and run


def core() -> ModuleType:
    """Return mlx.core. Raises H1ExportError where it is not installed, or no backend of it is."""
    return _imported("mlx.core", "mlx")


def utils() -> ModuleType:
    """Return mlx_lm.utils. Raises H1ExportError where mlx or mlx-lm is not installed."""
    core()
    return _imported("mlx_lm.utils", "mlx-lm")


def versions() -> str:
    """Return the installed versions in words. Raises H1ExportError where one is not installed."""
    utils()
    return f"mlx-lm {metadata.version('mlx-lm')}, mlx {metadata.version('mlx')}"


def _imported(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise H1ExportError(package, "is not installed", INSTALL) from None
    except (ImportError, OSError) as error:  # mlx without a backend, for example
        raise H1ExportError(package, f"cannot be loaded ({reason(error)})", INSTALL) from None


@contextmanager
def refused(where: object, what: str) -> Iterator[None]:
    """Turn any exception of mlx or mlx-lm, whose types share no base class, into one about ``where``.

    Raises:
        H1ExportError: they raised.
    """
    try:
        yield
    except H1ExportError:
        raise
    except Exception as error:
        raise H1ExportError(where, f"{what} ({reason(error)})", "build the artifact again") from None
