"""The graphs that this target writes, by the value of --graph: what running and reading them back needs to know.

lowerings.py has how they are emitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.errors import H1ExportError
from h1export.model.config_reader import shown
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import StateKind
from h1export.quantize.choices import AUTO
from h1export.targets.onnx.read_back import ReadStored
from h1export.targets.onnxruntime import int8_rows, read_back
from h1export.targets.onnxruntime.emit import cuda_kernels
from h1export.targets.onnxruntime.layouts import LAYOUTS
from h1export.targets.onnxruntime.options import Graph, OrtOptions
from h1export.targets.onnxruntime.state_layout import CUDA_PERMUTATION, ONNX_NAMES, StateLayout

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# The session option for the MatMulNBits nodes that onnxruntime makes of DequantizeLinear and MatMul.
FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"
GROWING = tuple(kind for kind in StateKind if kind.grows)


@dataclass(frozen=True)
class GraphVariant:
    """One value of --graph: how its graph is run, and read back.

    Attributes:
        provider: ONNX Runtime's name of the execution provider that runs the graph.
        state_layout: how the graph stores states.
        half_activations: whether activations and weights in floats have 16 bits.
        batched_append: whether several rows may take several tokens each after a past.
        bound: whether past and present keys may be one buffer longer than the sequence, as BoundSession needs.
        read_stored: reads the integers of a weight from the initializers.
        longest_call: returns the most tokens of a row in one call, by the convolution's taps; None: no limit.
    """

    provider: str = CPU
    state_layout: StateLayout = field(default_factory=StateLayout)
    half_activations: bool = False
    batched_append: bool = False
    bound: bool = False
    read_stored: ReadStored = read_back.read_matmul_nbits
    longest_call: Callable[[int], int] | None = None

    def with_dtypes(self, dtypes: Mapping[StateKind, type[Any]]) -> GraphVariant:
        """Return the variant with states of these dtypes, and float32 where there is none."""
        return replace(self, state_layout=replace(self.state_layout, dtypes=dtypes))


GRAPH_VARIANTS: Mapping[Graph, GraphVariant] = {
    "cpu": GraphVariant(bound=True),
    "cuda": GraphVariant(
        provider=CUDA,
        state_layout=StateLayout(CUDA_PERMUTATION, dict.fromkeys((*GROWING, StateKind.CONV), np.float16)),
        half_activations=True,
        bound=True,
        longest_call=cuda_kernels.longest_call,
    ),
    "portable": GraphVariant(batched_append=True, read_stored=read_back.read_dequantize_linear),
    "wasm": GraphVariant(bound=True),
}


def variant_of(options: OrtOptions, integers: bool) -> GraphVariant:
    """Return the variant that a build with these options writes.

    Args:
        options: The options.
        integers: Whether weights are stored in integers, beside which the default of --kv is fp16.
    """
    variant = GRAPH_VARIANTS[options.graph]
    if options.activations == "bf16":
        variant = variant.with_dtypes(dict.fromkeys(variant.state_layout.dtypes, ml_dtypes.bfloat16))
    if options.kv == "fp16" or (options.kv == AUTO and integers and options.narrow_cache):
        variant = variant.with_dtypes(dict.fromkeys(GROWING, np.float16))
    if options.kv == "int8":
        variant = variant.with_dtypes(dict.fromkeys(GROWING, np.int8))
    return variant


def check_heads(config: FalconH1Config, options: OrtOptions) -> None:
    """Check that the heads of a model fit the dtype of keys and values.

    Raises:
        H1ExportError: they do not.
    """
    if options.kv == "int8" and config.head_dim % int8_rows.BLOCK:
        what = (
            f"int8 has a scale for every {int8_rows.BLOCK} columns, and the heads of this model have {config.head_dim}"
        )
        raise H1ExportError("--kv", what, "use fp16 or fp32, or leave --kv out")


def variant_in(artifact: Artifact) -> GraphVariant:
    """Return the variant that ``artifact`` has; its manifest says which dtypes its states have.

    Raises:
        H1ExportError: The manifest has a dtype that states do not have.
    """
    options = OrtOptions.read(artifact)
    inputs = artifact.manifest.inputs
    dtypes: dict[StateKind, type[Any]] = {}
    for tensor in LAYOUTS[options.layout].states(artifact.config).tensors:
        name, dims = inputs.get(tensor.past, (ONNX_NAMES[np.float32], ()))
        dtype = next((dtype for dtype, known in ONNX_NAMES.items() if known == name), None)
        heads = artifact.config.head_dim
        as_rows = tensor.kind.grows and not heads % int8_rows.BLOCK and dims[-1:] == (int8_rows.width(heads),)
        if dtype is None or (dtype is np.int8 and not as_rows):
            what = f"has the state {tensor.past} in {shown(name)} {shown(list(dims))}, which no graph has"
            raise H1ExportError(artifact.folder / MANIFEST, what, "build the artifact again")
        if dtype is not np.float32:
            dtypes[tensor.kind] = dtype
    return variant_of(options, integers=False).with_dtypes(dtypes)
