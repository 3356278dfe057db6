"""What a machine has of what a GGUF artifact needs: gguf, and llama.cpp of the release that h1export knows."""

from __future__ import annotations

from collections.abc import Iterator

from h1export.artifact.artifact import Artifact
from h1export.errors import H1ExportError
from h1export.targets.base import Finding
from h1export.targets.gguf import sdk
from h1export.targets.gguf.llama import api
from h1export.targets.gguf.read_back import GgufFile
from h1export.targets.gguf.runner import LlamaRunner, coarse_notes
from h1export.targets.gguf.writer import MODEL


def examine(artifact: Artifact) -> Iterator[Finding]:
    """Yield the findings of ``Target.examine``."""
    try:
        api()
    except H1ExportError as error:
        yield Finding.of("llama.cpp", error)
        return
    yield Finding("llama.cpp", True, f"in xllamacpp {sdk.version()}, with the structures that h1export knows")
    try:
        runner = LlamaRunner(artifact, 0, False)
        notes = coarse_notes(GgufFile(artifact.folder / MODEL))
    except H1ExportError as error:
        yield Finding.of("loading", error)
        return
    yield Finding("loading", True, runner.provenance.kernels)
    for note in notes:
        yield Finding("scales", None, note)
