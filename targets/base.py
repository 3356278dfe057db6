"""The protocol of a target: it lowers a Program to the runtime's files. Its other half, loading.py, runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.progress import Progress
from h1export.quantize.grid import OwnTensor
from h1export.quantize.source import QuantizedWeights
from h1export.targets.options import TargetOptions

if TYPE_CHECKING:  # the command line names targets without loading torch
    from h1export.graphs.program import Program


@dataclass(frozen=True)
class Finding:
    """One thing that an artifact needs of a machine, or that the machine has.

    Attributes:
        name: what was looked at, such as "GPU".
        passed: whether the artifact can run with it; None where that does not depend on it.
        detail: what was found.
        next_step: what to do where it did not pass; empty otherwise.
    """

    name: str
    passed: bool | None
    detail: str
    next_step: str = ""

    @classmethod
    def of(cls, name: str, error: H1ExportError) -> Finding:
        """Return the finding that ``error`` is."""
        return cls(name, False, f"{error.where}: {error.what}", error.next_step)


OptionsT = TypeVar("OptionsT", bound=TargetOptions, contravariant=True)


@dataclass(frozen=True)
class Lowered:
    """What a target wrote, for the manifest.

    Attributes:
        inputs: name -> (dtype, shape), where a dim that varies is a name.
        outputs: the same of the outputs.
        weights: the quantised weights.
        weights_file: the file from which the runtime reads the weights.
        requirements: what the runtime's files need of a machine.
    """

    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    weights: tuple[StoredWeight, ...]
    weights_file: str
    requirements: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol[OptionsT]):
    """One runtime, as h1export writes for it and runs it.

    Attributes:
        name: the value of --target.
        packages: the packages whose versions may change the bytes that it writes.
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

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        """Yield what this machine has of what ``artifact`` needs; nothing that is missing raises.

        Args:
            artifact: the artifact, whose files were checked.
            build: whether to build what is missing and can be built here.
            progress: shows the stages of such a build.
        """
        ...


@runtime_checkable
class SelectiveTarget(Protocol):
    """A Target whose runtime cannot take every model, or computes some of them wrongly."""

    def check(self, config: FalconH1Config, options: Any) -> None:
        """Refuse a model or options before anything of the checkpoint but its config is used.

        Raises:
            H1ExportError: the runtime cannot take the model as it is; the error names the key of the config.
        """
        ...


@runtime_checkable
class HasOwnFormats(Protocol):
    """A Target that can store tensors in formats that no other target has, and whose integers are its own."""

    def own_tensors(
        self, program: Program, store: WeightStore, integers: QuantizedWeights, *, options: Any
    ) -> Mapping[str, OwnTensor]:
        """Return checkpoint tensor -> its own format, for the tensors that a method may solve for it.

        Raises:
            H1ExportError: as ``Target.lower`` does.
        """
        ...
