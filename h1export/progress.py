"""Progress: how long work reports its stages and the bytes that are done."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """The receiver of progress reports, such as the progress bars of the command line."""

    def stage(self, name: str, total_bytes: int = 0) -> None:
        """Begin a stage of ``total_bytes`` bytes; 0 means that the length is unknown."""
        ...

    def advance(self, nbytes: int) -> None:
        """Report that ``nbytes`` more bytes of the stage are done."""
        ...


class Silent:
    """A Progress that ignores every report."""

    def stage(self, name: str, total_bytes: int = 0) -> None:
        """Do nothing."""

    def advance(self, nbytes: int) -> None:
        """Do nothing."""


SILENT = Silent()
