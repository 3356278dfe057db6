"""How each graph of variants.py is emitted, by the value of --graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from h1export.graphs.passes import KindOf, Pass, fusions
from h1export.graphs.passes.flatten_splits import FlattenSplits
from h1export.graphs.passes.fuse_parallel_projections import FuseParallelProjections
from h1export.graphs.passes.narrow_summands import NarrowSummands
from h1export.quantize.precision import Precision
from h1export.targets.onnx.emit import Emitter
from h1export.targets.onnxruntime.emit import cpu, cuda, portable, wasm
from h1export.targets.onnxruntime.emit import native as emitters
from h1export.targets.onnxruntime.emit.matmul_nbits import OrtContext
from h1export.targets.onnxruntime.options import Graph, OrtOptions


@dataclass(frozen=True)
class Lowering:
    """One value of --graph: how its graph is emitted.

    Attributes:
        table: operator -> the function that emits it.
        opsets: returns domain -> version for the precisions of the weights.
        fuse: returns the passes to run first, by the precision of weights and the columns that a fusion may not cut.
        context: the class of the context that the emitters get.
        native: the table of a second graph over the same weights, for our own kernels; None where there is none.
    """

    table: Mapping[Any, Emitter[Any]]
    opsets: Callable[[Collection[Precision]], dict[str, int]]
    fuse: Callable[[KindOf, int], tuple[Pass, ...]]
    context: type[OrtContext] = OrtContext
    native: Mapping[Any, Emitter[Any]] | None = None


def _microsoft(precisions: Collection[Precision]) -> dict[str, int]:
    return dict(cpu.OPSETS)


def _fused(kind_of: KindOf, align: int) -> tuple[Pass, ...]:
    return (NarrowSummands(), *fusions(kind_of, align))


LOWERINGS: Mapping[Graph, Lowering] = {
    "cpu": Lowering(cpu.TABLE, _microsoft, _fused, native=emitters.TABLE),
    "cuda": Lowering(
        cuda.TABLE,
        _microsoft,
        # no FuseSummedProjections: here multipliers apply to products, and the two projections differ in theirs
        lambda kind_of, align: (FuseParallelProjections(kind_of), FlattenSplits()),
        context=cuda.CudaContext,
    ),
    "portable": Lowering(
        portable.TABLE,
        lambda precisions: {"": portable.opset(precisions)},
        lambda kind_of, align: (NarrowSummands(),),
    ),
    "wasm": Lowering(wasm.TABLE, _microsoft, _fused),
}


def lowering_of(options: OrtOptions) -> Lowering:
    """Return the lowering of a build's options."""
    lowering = LOWERINGS[options.graph]
    return replace(lowering, context=cuda.Bfloat16Context) if options.activations == "bf16" else lowering
