"""The graphs that this target writes, by the value of --graph, and everything in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from h1export.graphs.passes import KindOf, Pass, fusions
from h1export.graphs.passes.flatten_splits import FlattenSplits
from h1export.graphs.passes.fuse_parallel_projections import FuseParallelProjections
from h1export.model.falcon_h1.states import StateKind, StateTensor
from h1export.quantize.precision import Precision
from h1export.targets.onnx.emit import Emitter
from h1export.targets.onnx.read_back import ReadStored
from h1export.targets.onnxruntime import read_back, state_layout
from h1export.targets.onnxruntime.emit import cpu, cuda, cuda_kernels, dequantize_linear, portable, wasm
from h1export.targets.onnxruntime.emit import native as emitters
from h1export.targets.onnxruntime.emit.matmul_nbits import OrtContext
from h1export.targets.onnxruntime.options import Graph, OrtOptions

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# The session option for the MatMulNBits nodes that onnxruntime makes of DequantizeLinear and MatMul.
FUSED_LEVEL = "session.qdq_matmulnbits_accuracy_level"


@dataclass(frozen=True)
class GraphVariant:
    """One value of --graph: how its graph is emitted, run, and read back.

    Attributes:
        table: operator -> the function that emits it.
        opsets: returns domain -> version for the precisions of the weights.
        fuse: returns the passes to run first, by the precision of weights and the columns that a fusion may not cut.
        provider: ONNX Runtime's name of the execution provider that runs the graph.
        context: the class of the context that the emitters get.
        permutation: kind of state -> the order of its axes in the graph.
        halves: the kinds of states that have 16 bits; the others are float32.
        half: the dtype of 16 bits, float16 or ml_dtypes.bfloat16.
        batched_append: whether several rows may take several tokens each after a past.
        bound: whether past and present keys may be one buffer longer than the sequence, as BoundSession needs.
        read_stored: reads the integers of a weight from the initializers.
        longest_call: returns the most tokens of a row in one call, by the convolution's taps; None: no limit.
        native: the table of a second graph over the same weights, for our own kernels; None where there is none.
    """

    table: Mapping[Any, Emitter[Any]]
    opsets: Callable[[Collection[Precision]], dict[str, int]]
    fuse: Callable[[KindOf, int], tuple[Pass, ...]]
    provider: str = CPU
    context: type[OrtContext] = OrtContext
    permutation: state_layout.Permutation = field(default_factory=lambda: state_layout.PERMUTATION)
    halves: frozenset[StateKind] = frozenset()
    half: type[Any] = np.float16
    batched_append: bool = False
    bound: bool = False
    read_stored: ReadStored = read_back.read_stored
    longest_call: Callable[[int], int] | None = None
    native: Mapping[Any, Emitter[Any]] | None = None

    def shape(self, tensor: StateTensor) -> tuple[int | str, ...]:
        """Return the dims of a state in this graph."""
        return state_layout.shape(tensor, self.permutation)

    def dtype(self, kind: StateKind) -> str:
        """Return ONNX's name of the dtype of states of this kind."""
        return ir.DataType.from_numpy(np.dtype(self.half if kind in self.halves else np.float32)).name


def _microsoft(precisions: Collection[Precision]) -> dict[str, int]:
    return dict(cpu.OPSETS)


GRAPH_VARIANTS: Mapping[Graph, GraphVariant] = {
    "cpu": GraphVariant(cpu.TABLE, _microsoft, fusions, bound=True, native=emitters.TABLE),
    "cuda": GraphVariant(
        cuda.TABLE,
        _microsoft,
        # no FuseSummedProjections: here multipliers apply to products, and the two projections differ in theirs
        lambda kind_of, align: (FuseParallelProjections(kind_of), FlattenSplits()),
        provider=CUDA,
        context=cuda.CudaContext,
        permutation=state_layout.CUDA_PERMUTATION,
        halves=frozenset({StateKind.KEY, StateKind.VALUE, StateKind.CONV}),
        bound=True,
        longest_call=cuda_kernels.longest_call,
    ),
    "portable": GraphVariant(
        portable.TABLE,
        lambda precisions: {"": portable.opset(precisions)},
        lambda kind_of, align: (),
        batched_append=True,
        read_stored=dequantize_linear.read_stored,
    ),
    "wasm": GraphVariant(wasm.TABLE, _microsoft, fusions, bound=True),
}


def variant_of(options: OrtOptions) -> GraphVariant:
    """Return the variant of a build's options."""
    variant = GRAPH_VARIANTS[options.graph]
    if options.activations == "bf16":
        return replace(variant, half=ml_dtypes.bfloat16, context=cuda.Bfloat16Context)
    return variant
