"""What a target is. It lives on this floor and not in core, because it speaks of the graph's Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import StoredWeight
from h1export.artifact.staging import Stage
from h1export.checkpoint.store import WeightStore
from h1export.progress import Progress
from h1export.quantize.source import QuantizedWeights
from h1export.runtime.runner import Inspectable

if TYPE_CHECKING:  # the command line names targets without loading torch
    from h1export.graphs.program import Program


ProviderName = Literal["cpu", "cuda"]
Kernels = Literal["auto", "native", "stock"]
Compute = Literal["fp16", "bf16", "fp32"]
RuntimeName = Literal["rtx", "tensorrt"]


@dataclass(frozen=True)
class BuildOptions:
    """Switches of a build; a target reads those it has a use for, and the manifest records them.

    Attributes:
        accuracy_level: ONNX Runtime's MatMulNBits: 0 computes in float32, 4 rounds activations to int8 (fastest).
        last_logits: logits of the last position only.
        provider: the ONNX Runtime execution provider that the graph is for.
        opset_only: ONNX's own operators alone, for any runtime.
        max_context: tokens of a sequence, where a runtime wants buffers of fixed length.
        compute: dtype of activations, where a runtime has several.
        state_io: CoreML: states are inputs and outputs of every call instead of the runtime's own.
        max_batch: sequences of a call, where a runtime's buffers have a fixed size.
        runtime: TensorRT: whose engine; None: TensorRT-RTX where it is installed.
        architectures: TensorRT: compute capabilities of the GPUs that the artifact is for; empty: the runtime's usual ones.
    """

    accuracy_level: int = 4
    last_logits: bool = False
    provider: ProviderName = "cpu"
    opset_only: bool = False
    max_context: int = 2048
    compute: Compute = "fp16"
    state_io: bool = False
    max_batch: int = 1
    runtime: RuntimeName | None = None
    architectures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """What a target wrote, for the manifest."""

    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    weights: tuple[StoredWeight, ...]
    weights_file: str  # the file from which the runtime reads the weights
    requirements: Mapping[str, Any] = field(default_factory=dict)


class Target(Protocol):
    """A runtime.

    Attributes:
        name: what --target takes.
        packages: those whose versions may change the bytes it writes.
        options: the fields of BuildOptions that it reads.
    """

    name: str
    packages: tuple[str, ...]
    options: frozenset[str]

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        options: BuildOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        """Write the runtime's files into ``stage.folder``, which holds the checkpoint's config and tokenizer files already.

        ``program`` is never changed. Raises H1ExportError where this runtime cannot take the model or the integers.
        """
        ...

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        """Graph -> type of op -> how many nodes of it, those of subgraphs too. Raises H1ExportError for a damaged artifact."""
        ...

    def load(
        self, artifact: Artifact, threads: int = 0, float32: bool = False, kernels: Kernels = "auto"
    ) -> Inspectable[Any]:
        """Load what ``lower`` wrote.

        ``threads`` 0: the runtime's own choice. ``float32``: compute in float32 even where the artifact rounds activations,
        so that a lowering error cannot hide behind the rounding. ``kernels``: h1export's own where the target has some ("native"),
        the runtime's ("stock"), or native where they can be had, with a note where not ("auto").

        Raises:
            H1ExportError: without the runtime, or without the kernels asked for.
        """
        ...
