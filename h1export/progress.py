"""How long work reports to whoever watches: a stage by name, then bytes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where long work says how far it is."""

    def stage(self, name: str, total_bytes: int = 0) -> None:
        """A new stage begins; ``total_bytes`` 0: its length is unknown."""
        ...

    def advance(self, nbytes: int) -> None:
        """``nbytes`` more of the stage are done."""
        ...


class Silent:
    """A Progress that nobody watches."""

    def stage(self, name: str, total_bytes: int = 0) -> None:
        return

    def advance(self, nbytes: int) -> None:
        return


SILENT = Silent()
