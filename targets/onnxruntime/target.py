"""The target "ort": one ONNX model with external data, for ONNX Runtime and onnxruntime-genai on CPUs."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from h1export.core.artifact import Artifact
from h1export.core.progress import Progress
from h1export.core.quant import QuantScheme
from h1export.core.spec import HybridSpec
from h1export.core.stage import Stage
from h1export.core.state import ATTENTION_MASK, BATCH, INPUT_IDS, LOGITS, PAST, SEQUENCE, TOTAL, StateTensor
from h1export.core.weights import WeightExpr, WeightStore
from h1export.errors import H1ExportError
from h1export.graphs.passes import KindOf, fusions, run_passes
from h1export.graphs.programs import Program
from h1export.targets.base import BuildOptions, Lowered
from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.onnx.emit import emit
from h1export.targets.onnx.external import ExternalData
from h1export.targets.onnxruntime import genai, layout
from h1export.targets.onnxruntime.nbits import INT8_BLOCKS, OrtContext
from h1export.targets.onnxruntime.ops import OPSETS, TABLE
from h1export.targets.onnxruntime.runner import MODEL, OnnxRuntimeRunner

DATA = MODEL + ".data"
ACCURACY_LEVELS = (0, 1, 4)  # of MatMulNBits on CPUs: unset and float32 compute in float32, 4 in int8

Dims = tuple[int | str, ...]


class OnnxRuntimeTarget:
    name = "ort"
    packages = ("numpy", "onnx-ir", "torch")

    def lower(
        self, program: Program, store: WeightStore, scheme: QuantScheme, options: BuildOptions, stage: Stage, progress: Progress
    ) -> Lowered:
        if options.accuracy_level not in ACCURACY_LEVELS:
            what = f"{options.accuracy_level} is not a level that ONNX Runtime's CPU kernels have"
            raise H1ExportError("--accuracy-level", what, f"one of {', '.join(map(str, ACCURACY_LEVELS))}")
        program = run_passes(program, fusions(_kinds(scheme, program.spec), align=max(scheme.block, INT8_BLOCKS[0])))
        progress.stage("weights", store.nbytes)
        builder = GraphBuilder(OPSETS)
        inputs, outputs = _inputs(program), _outputs(program, options)
        with ExternalData(stage, DATA) as data:
            context = OrtContext(program, store, scheme, builder, data)
            context.accuracy_level = options.accuracy_level
            graph_inputs = [_declare(name, dtype, dims) for name, (dtype, dims) in inputs.items()]
            by_name = {value.name: value for value in graph_inputs}
            for node in program.graph.nodes:
                if node.op == "placeholder" and node.name in program.inputs:
                    context.set(node, by_name[program.inputs[node.name]])
            results = emit(context, TABLE)
        for value, (name, (dtype, dims)) in zip(results, outputs.items(), strict=True):
            value.name, value.type, value.shape = name, ir.TensorType(ir.DataType[dtype]), ir.Shape(dims)
        progress.stage("graph")
        ir.save(builder.model(graph_inputs, results, "falcon_h1"), stage.folder / MODEL)
        genai.write_config(program.spec, MODEL, stage.folder)
        return Lowered(inputs, outputs, tuple(context.stored))

    def load(self, artifact: Artifact, threads: int = 0, float32: bool = False) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(artifact, threads, float32)


def _kinds(scheme: QuantScheme, spec: HybridSpec) -> KindOf:
    """Weights of one precision may share an initializer."""

    def kind_of(expr: WeightExpr) -> Hashable:
        return tuple({scheme.precision(part.tensor, spec) for part in expr.parts})

    return kind_of


def _declare(name: str, dtype: str, dims: Dims) -> Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType[dtype]))


def _inputs(program: Program) -> dict[str, tuple[str, Dims]]:
    states = {tensor.past: ("FLOAT", layout.shape(tensor)) for tensor in program.states.tensors}
    return {INPUT_IDS: ("INT64", (BATCH, SEQUENCE)), ATTENTION_MASK: ("INT64", (BATCH, TOTAL)), **states}


def _outputs(program: Program, options: BuildOptions) -> dict[str, tuple[str, Dims]]:
    def dims(tensor: StateTensor) -> Dims:
        return tuple(TOTAL if dim == PAST else dim for dim in layout.shape(tensor))

    logits: Dims = (BATCH, 1 if options.last_logits else SEQUENCE, program.spec.vocab_size)
    return {LOGITS: ("FLOAT", logits), **{tensor.present: ("FLOAT", dims(tensor)) for tensor in program.states.tensors}}


target = OnnxRuntimeTarget()
