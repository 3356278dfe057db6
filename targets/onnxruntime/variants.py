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
from h1export.model.falcon_h1.states import StateKind, StateTensor
from h1export.quantize.choices import AUTO
from h1export.targets.onnx.read_back import ReadStored
from h1export.targets.onnxruntime import read_back, state_layout
from h1export.targets.onnxruntime.emit import cuda_kernels
from h1export.targets.onnxruntime.layouts import LAYOUTS
from h1export.targets.onnxruntime.options import Graph, OrtOptions

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# The session option for the MatMulNBits nodes that onnxruntime makes of DequantizeLinear and MatMul.
FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"
ONNX_NAMES: Mapping[Any, str] = {np.float32: "FLOAT", np.float16: "FLOAT16", ml_dtypes.bfloat16: "BFLOAT16"}
GROWING = frozenset(kind for kind in StateKind if kind.grows)


@dataclass(frozen=True)
class GraphVariant:
    """One value of --graph: how its graph is run, and read back.

    Attributes:
        provider: ONNX Runtime's name of the execution provider that runs the graph.
        permutation: kind of state -> the order of its axes in the graph.
        halves: the kinds of states that have 16 bits; the others are float32.
        half: the dtype of 16 bits, float16 or ml_dtypes.bfloat16.
        half_activations: whether activations and weights in floats have 16 bits too.
        batched_append: whether several rows may take several tokens each after a past.
        bound: whether past and present keys may be one buffer longer than the sequence, as BoundSession needs.
        read_stored: reads the integers of a weight from the initializers.
        longest_call: returns the most tokens of a row in one call, by the convolution's taps; None: no limit.
    """

    provider: str = CPU
    permutation: state_layout.Permutation = field(default_factory=lambda: state_layout.PERMUTATION)
    halves: frozenset[StateKind] = frozenset()
    half: type[Any] = np.float16
    half_activations: bool = False
    batched_append: bool = False
    bound: bool = False
    read_stored: ReadStored = read_back.read_matmul_nbits
    longest_call: Callable[[int], int] | None = None

    def shape(self, tensor: StateTensor) -> tuple[int | str, ...]:
        """Return the dims of a state in this graph."""
        return state_layout.shape(tensor, self.permutation)

    def sized(self, tensor: StateTensor, batch: int, past: int) -> tuple[int, ...]:
        """Return the shape of a state in this graph in numbers, for ``batch`` sequences of ``past`` tokens."""
        sizes = tensor.sized(batch, past)
        return tuple(sizes[axis] for axis in self.permutation.get(tensor.kind, range(len(sizes))))

    def dtype(self, kind: StateKind) -> str:
        """Return ONNX's name of the dtype of states of this kind."""
        return ONNX_NAMES[self.half if kind in self.halves else np.float32]


GRAPH_VARIANTS: Mapping[Graph, GraphVariant] = {
    "cpu": GraphVariant(bound=True),
    "cuda": GraphVariant(
        provider=CUDA,
        permutation=state_layout.CUDA_PERMUTATION,
        halves=GROWING | {StateKind.CONV},
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
        variant = replace(variant, half=ml_dtypes.bfloat16)
    if options.kv == "fp16" or (options.kv == AUTO and integers and options.narrow_cache):
        variant = replace(variant, halves=variant.halves | GROWING)
    return variant


def variant_in(artifact: Artifact) -> GraphVariant:
    """Return the variant that ``artifact`` has; its manifest says which states have 16 bits."""
    options = OrtOptions.read(artifact)
    inputs = artifact.manifest.inputs
    wide = ONNX_NAMES[np.float32]
    narrow = {
        tensor.kind
        for tensor in LAYOUTS[options.layout].states(artifact.config).tensors
        if tensor.past in inputs and inputs[tensor.past][0] != wide
    }
    return replace(variant_of(options, integers=False), halves=frozenset(narrow))
