"""The network: a Program in ONNX, as TensorRT's parser takes it."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.errors import H1ExportError
from h1export.graphs.passes import KindOf, run_passes
from h1export.graphs.passes.flatten_splits import FlattenSplits
from h1export.graphs.passes.fuse_parallel_projections import FuseParallelProjections
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.quantize.methods.prequantized import need_symmetric
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Lowered
from h1export.targets.onnx.emit import emit, name_probes
from h1export.targets.onnx.external_data import ExternalData
from h1export.targets.tensorrt.network import layout
from h1export.targets.tensorrt.network.context import OPSETS, TensorRTContext, TypedBuilder
from h1export.targets.tensorrt.network.layout import DATA, MODEL, WRITE_INDICES, Dims
from h1export.targets.tensorrt.network.ops import TABLE
from h1export.targets.tensorrt.options import TensorRTOptions

ZERO_POINTS = "use --target ort or coreml, or give a checkpoint with sym true, or the unquantised one"


def check(config: FalconH1Config, integers: QuantizedWeights, options: TensorRTOptions) -> None:
    """Raises H1ExportError for integers and options that TensorRT does not take."""
    need_symmetric(integers, "TensorRT", next_step=ZERO_POINTS)
    gathered = {EMBEDDING} if not config.tie_word_embeddings else set()  # never multiplied by
    wide = [name for name, precision in integers.precisions.items() if precision.bits != 4 and name not in gathered]
    if wide:
        where = "--quant int8" if len(wide) >= len(integers.precisions) - 1 else f'tensor "{wide[0]}" in int8'
        what = "TensorRT multiplies int8 weights by int8 activations only; for weights alone it has int4"
        raise H1ExportError(where, what, "use --quant int4 or none, or --target ort, which has int8")


def write(
    program: Program, store: WeightStore, integers: QuantizedWeights, *, options: TensorRTOptions, stage: Stage
) -> Lowered:
    """Write model.onnx and its data into ``stage``. Raises H1ExportError for weights beyond fp16."""
    program = run_passes(program, (FuseParallelProjections(_kinds(store, integers)), FlattenSplits()))
    inputs = layout.inputs(program, options)
    outputs = layout.outputs(program, options)
    declared = [_declare(name, *port) for name, port in inputs.items()]
    by_name = {value.name: value for value in declared}
    with ExternalData(stage, DATA) as data:
        context = TensorRTContext(
            program,
            store,
            integers,
            TypedBuilder(OPSETS),
            data,
            own=layout.OWN[options.compute],
            write_indices=by_name[WRITE_INDICES],
            max_context=options.max_context,
        )
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in program.inputs:
                context.set(node, by_name[program.inputs[node.name]])
        logits, *states = emit(context, TABLE)
        results = [context.as_float32(logits), *states]
        name_probes(context)
        for value, (name, (dtype, dims)) in zip(results, outputs.items(), strict=True):
            assert value.dtype == ir.DataType[dtype], f"{name} is {value.dtype}"
            value.name = name
            value.shape = ir.Shape(dims)
        ir.save(context.build.model(declared, results, "falcon_h1"), stage.folder / MODEL)
    return Lowered(inputs, outputs, tuple(context.stored), weights_file=DATA)


def _kinds(store: WeightStore, integers: QuantizedWeights) -> KindOf:
    """Return what weights that may share an initializer have in common: their precision, and an even number of rows."""

    def kind_of(expr: WeightExpr) -> Hashable:
        odd = tuple(part.tensor for part in expr.parts if store.shape(part.tensor)[0] % 2)
        return odd, *{integers.precisions.get(part.tensor) for part in expr.parts}

    return kind_of


def _declare(name: str, dtype: str, dims: Dims) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType[dtype]))
