"""What one call of the network takes, for every Runner over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.tensorrt.network.layout import PREFILL_TOKENS
from h1export.targets.tensorrt.options import TensorRTOptions


@dataclass(frozen=True)
class Limits:
    """The sizes that an artifact's buffers were built with."""

    max_batch: int
    max_context: int

    @classmethod
    def of(cls, artifact: Artifact) -> Limits:
        options = TensorRTOptions.read(artifact)
        return cls(options.max_batch, options.max_context)

    @property
    def note(self) -> str:
        """For a report."""
        return f"{self.max_batch} sequences of {self.max_context} tokens at most"

    def check_rows(self, where: str, rows: int) -> None:
        """Raises H1ExportError for more sequences than the network takes."""
        if rows > self.max_batch:
            raise H1ExportError(
                where, f"{rows} rows, and the network takes {self.max_batch}", f"build it with --max-batch {rows}"
            )

    def check_room(self, where: str, tokens: int) -> None:
        """Raises H1ExportError for longer sequences than the buffers of keys hold."""
        if tokens > self.max_context:
            what = f"{tokens} tokens, and the network has room for {self.max_context}"
            raise H1ExportError(where, what, f"build it with --max-context {tokens}")


def calls(tokens: int) -> Iterator[slice]:
    """The tokens of a prompt, in calls that fit the profiles."""
    for start in range(0, tokens, PREFILL_TOKENS):
        yield slice(start, min(start + PREFILL_TOKENS, tokens))
