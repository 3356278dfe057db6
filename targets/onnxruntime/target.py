"""The target "ort": one ONNX model with external data, for ONNX Runtime and onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from h1export.artifact.artifact import Artifact
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import WeightExpr
from h1export.errors import H1ExportError
from h1export.graphs.passes import KindOf, run_passes
from h1export.graphs.program import Program
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import (
    ALL,
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    KEPT,
    LOGITS,
    PAST,
    POSITIONS,
    SEQUENCE,
    TOTAL,
)
from h1export.progress import Progress
from h1export.quantize.source import QuantizedWeights
from h1export.targets.base import Finding, Lowered
from h1export.targets.onnx.builder import GraphBuilder, Value
from h1export.targets.onnx.emit import Emitter, emit, name_probes
from h1export.targets.onnx.external_data import ExternalData
from h1export.targets.onnx.op_counts import node_counts
from h1export.targets.onnxruntime import examine, genai_config, readme, transformers_js
from h1export.targets.onnxruntime.emit import wasm
from h1export.targets.onnxruntime.emit.matmul_nbits import OrtContext
from h1export.targets.onnxruntime.emit.native import DOMAIN, NativeContext, covers
from h1export.targets.onnxruntime.emit.packing import INT8_BLOCKS
from h1export.targets.onnxruntime.inference_session import NATIVE_MODEL
from h1export.targets.onnxruntime.layouts import LAYOUTS, Layout
from h1export.targets.onnxruntime.lowerings import lowering_of
from h1export.targets.onnxruntime.options import OrtOptions
from h1export.targets.onnxruntime.runner import ROUNDED_LEVEL
from h1export.targets.onnxruntime.state_layout import StateLayout
from h1export.targets.onnxruntime.variants import check_heads, variant_of

Dims = tuple[int | str, ...]
Ports = Mapping[str, tuple[str, Dims]]  # input or output of the graph -> (ONNX name of its dtype, dims)


class OnnxRuntimeTarget:
    """The Target that writes ONNX models for ONNX Runtime."""

    name = "ort"
    packages = ("numpy", "onnx-ir", "torch")

    def check(self, config: FalconH1Config, options: OrtOptions) -> None:
        """See SelectiveTarget."""
        if options.asks_for_logits and options.last_logits:
            what = f"the graph of --graph {options.graph} computes the logits that a call asks for"
            raise H1ExportError("--logits", what, f"leave --logits out, and give the input {KEPT}")
        if options.graph == "wasm":
            wasm.check(config)
        check_heads(config, options)

    def lower(
        self,
        program: Program,
        store: WeightStore,
        integers: QuantizedWeights,
        *,
        options: OrtOptions,
        stage: Stage,
        progress: Progress,
    ) -> Lowered:
        lowering = lowering_of(options)
        precisions = set(integers.precisions.values())
        variant = variant_of(options, integers=bool(precisions))
        align = max([INT8_BLOCKS[0], *(precision.group_size for precision in precisions)])
        program = run_passes(program, lowering.fuse(_kind_of(integers), align))
        progress.stage("weights", store.nbytes)
        layout = LAYOUTS[options.layout]
        states = variant.state_layout
        inputs = _inputs(program, options, states, layout=layout)
        outputs = _outputs(program, options, states, layout=layout)
        graph, dtype = layout.graph(precisions)
        weights = graph + layout.data
        (stage.folder / graph).parent.mkdir(exist_ok=True)
        with ExternalData(stage, weights) as data:
            context = lowering.context(program, store, integers, GraphBuilder(lowering.opsets(precisions)), data)
            context.accuracy_level = options.accuracy_level
            context.halves = layout.halves
            context.narrow_embedding = options.embedding == "fp16"
            ir.save(_model(context, lowering.table, layout, inputs=inputs, outputs=outputs), stage.folder / graph)
            if layout.native and lowering.native is not None and covers(program):
                native = NativeContext(
                    program, store, integers, GraphBuilder({**lowering.opsets(precisions), DOMAIN: 1}), data
                )
                native.accuracy_level = options.accuracy_level // ROUNDED_LEVEL * ROUNDED_LEVEL  # QMatMul has 0 and 4
                native.narrow_embedding = context.narrow_embedding
                ir.save(
                    _model(native, lowering.native, layout, inputs=inputs, outputs=outputs), stage.folder / NATIVE_MODEL
                )
        if options.layout == "genai":
            genai_config.write_config(program.config, stage.folder, options, states=states)
            readme.write(stage.folder, options, states)
        else:
            transformers_js.write(stage.folder, program.config, options, dtype=dtype)
        return Lowered(inputs, outputs, tuple(context.stored), weights_file=weights)

    def operations(self, artifact: Artifact) -> dict[str, dict[str, int]]:
        graph = LAYOUTS[OrtOptions.read(artifact).layout].graph_of(artifact)
        graphs = [graph, *(name for name in (NATIVE_MODEL,) if name in artifact.manifest.files)]
        return {name: node_counts(artifact.folder / name) for name in graphs}

    def examine(self, artifact: Artifact, *, build: bool, progress: Progress) -> Iterator[Finding]:
        return examine.examine(artifact)


def _kind_of(integers: QuantizedWeights) -> KindOf:
    """Return the kind of a weight for fusions: weights of one precision may share an initializer."""

    def kind_of(expr: WeightExpr) -> Hashable:
        return tuple({integers.precisions.get(part.tensor) for part in expr.parts})

    return kind_of


def _model(
    context: OrtContext, table: Mapping[Any, Emitter[Any]], layout: Layout, *, inputs: Ports, outputs: Ports
) -> ir.Model:
    """Emit the context's program by the emitters of ``table``, and name the values that probes read."""
    declared = {name: _declare(name, dtype, dims) for name, (dtype, dims) in inputs.items()}
    if KEPT in declared:
        if layout.optional_kept:
            declared[KEPT] = context.build.overridable(KEPT, np.array(ALL, np.int64))
        context.kept = declared[KEPT]
    graph_inputs = list(declared.values())
    names = (INPUT_IDS, ATTENTION_MASK, *(tensor.past for tensor in context.program.states.tensors))
    by_name = dict(zip(names, graph_inputs, strict=False))  # the layout has other names for the same states
    for node in context.program.graph.nodes:
        if node.op == "placeholder" and node.name in context.program.inputs:
            context.set(node, by_name[context.program.inputs[node.name]])
    logits, *states = emit(context, table)
    results = [context.as_float32(logits), *states]
    for value, (name, (dtype, dims)) in zip(results, outputs.items(), strict=True):
        value.name = name
        value.type = ir.TensorType(ir.DataType[dtype])
        value.shape = ir.Shape(dims)
    name_probes(context)
    return context.build.model(graph_inputs, results, "falcon_h1")


def _declare(name: str, dtype: str, dims: Dims) -> Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType[dtype]))


def _inputs(
    program: Program, options: OrtOptions, states: StateLayout, *, layout: Layout
) -> dict[str, tuple[str, Dims]]:
    """Return the inputs of the graph: those of the program in its order, and then how many positions get logits."""
    ports: dict[str, tuple[str, Dims]] = {
        INPUT_IDS: ("INT64", (BATCH, SEQUENCE)),
        ATTENTION_MASK: ("INT64", (BATCH, TOTAL)),
    }
    for tensor in layout.states(program.config).tensors:
        ports[tensor.past] = (states.dtype_name(tensor.kind), states.shape(tensor))
    if options.asks_for_logits:
        ports[KEPT] = ("INT64", ())
    return {name: (dtype, layout.dims(dims)) for name, (dtype, dims) in ports.items()}


def _outputs(
    program: Program, options: OrtOptions, states: StateLayout, *, layout: Layout
) -> dict[str, tuple[str, Dims]]:
    """Return the outputs of the graph in the order of the program's."""
    positions = POSITIONS if options.asks_for_logits else 1 if options.last_logits else SEQUENCE
    logits: Dims = (BATCH, positions, program.config.vocab_size)
    ports: dict[str, tuple[str, Dims]] = {LOGITS: ("FLOAT", logits)}
    for tensor in layout.states(program.config).tensors:
        dims = tuple(TOTAL if dim == PAST else dim for dim in states.shape(tensor))
        ports[tensor.present] = (states.dtype_name(tensor.kind), dims)
    return {name: (dtype, layout.dims(dims)) for name, (dtype, dims) in ports.items()}


target = OnnxRuntimeTarget()
