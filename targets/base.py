"""Target: the protocol of a runtime, which lowers a Program to an artifact and loads that artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.artifact.staging import Stage
from h1export.checkpoint.store import WeightStore
from h1export.progress import Progress
from h1export.quantize.source import QuantizedWeights
from h1export.runtime.runner import Inspectable
from h1export.targets.options import Kernels, TargetOptions

if TYPE_CHECKING:  # the command line names targets without loading torch
    from h1export.graphs.program import Program


OptionsT = TypeVar("OptionsT", bound=TargetOptions, contravariant=True)


@dataclass(frozen=True)
class Lowered:
    """The facts about the written files that the manifest records; its fields have the same names."""

    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    weights: tuple[StoredWeight, ...]
    weights_file: str  # the file from which the runtime reads the weights
    requirements: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol[OptionsT]):
    """A runtime.

    Attributes:
        name: what --target takes.
        packages: those whose versions may change the bytes it writes.
    """

    name: str
    packages: tuple[str, ...]

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: OptionsT,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        """Write the runtime's files into ``stage.folder``, which has the checkpoint's config and tokenizer.

        ``program`` is never changed. Raises H1ExportError where this runtime cannot take the model or the integers.
        """
        ...

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        """Return graph -> type of op -> its number of nodes, those of subgraphs included.

        Raises:
            H1ExportError: a damaged artifact.
        """
        ...

    def load(
        self, artifact: Artifact, threads: int = 0, float32: bool = False, *, kernels: Kernels = "auto"
    ) -> Inspectable[Any]:
        """Load what ``lower`` wrote.

        Args:
            artifact: what to load.
            threads: for the runtime; 0: its own choice.
            float32: compute in float32 even where the artifact rounds activations, so that a lowering error cannot hide
                behind the rounding.
            kernels: "native": h1export's own, where the target has some; "stock": the runtime's; "auto": native where
                they can be had, with a note where not.

        Raises:
            H1ExportError: without the runtime, or without the requested kernels.
        """
        ...
