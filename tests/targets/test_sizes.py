"""Emitters read sizes from the nodes of the graph: a config with wrong sizes changes no byte of what they emit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.graphs.passes import fusions, run_passes
from h1export.graphs.passes.flatten_splits import FlattenSplits
from h1export.graphs.passes.fuse_parallel_projections import FuseParallelProjections
from h1export.graphs.program import Program
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.plugins import h1
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import QuantizedWeights, Rounded
from h1export.targets.onnx.builder import GraphBuilder
from h1export.targets.onnx.emit import Context, Emitter, emit
from h1export.targets.onnx.external_data import ExternalData
from h1export.targets.onnxruntime.emit import cpu, cuda, native, portable
from h1export.targets.onnxruntime.emit.matmul_nbits import OrtContext
from h1export.targets.sizes import AttentionSizes, ScanSizes
from h1export.targets.tensorrt.network import ops as tensorrt
from h1export.targets.tensorrt.network.context import OPSETS, TensorRTContext, TypedBuilder

WRONG = {
    "hidden_size": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "mamba_d_ssm": 5,
    "mamba_n_heads": 5,
    "mamba_d_head": 1,
    "mamba_n_groups": 5,
    "mamba_d_state": 7,
    "mamba_d_conv": 9,
}
DTYPES = {torch.int64: ir.DataType.INT64, torch.float32: ir.DataType.FLOAT}
Make = Callable[[Program, WeightStore, QuantizedWeights, ExternalData, ir.Value], Context]
TABLES: Mapping[str, tuple[Mapping[Any, Emitter[Any]], Make]] = {
    "cpu": (cpu.TABLE, lambda p, s, q, d, _: OrtContext(p, s, q, GraphBuilder(cpu.OPSETS), d)),
    "native": (
        native.TABLE,
        lambda p, s, q, d, _: native.NativeContext(p, s, q, GraphBuilder({**cpu.OPSETS, native.DOMAIN: 1}), d),
    ),
    "cuda": (cuda.TABLE, lambda p, s, q, d, _: cuda.CudaContext(p, s, q, GraphBuilder(cpu.OPSETS), d)),
    "portable": (portable.TABLE, lambda p, s, q, d, _: OrtContext(p, s, q, GraphBuilder({"": 21}), d)),
    "tensorrt": (
        tensorrt.TABLE,
        lambda p, s, q, d, indices: TensorRTContext(
            p, s, q, TypedBuilder(OPSETS), d, own=ir.DataType.FLOAT16, write_indices=indices, max_context=64
        ),
    ),
}

PARALLEL = (FuseParallelProjections(lambda expr: None), FlattenSplits())
EVERY = fusions(lambda expr: None, 32)
FUSE = {"cpu": EVERY, "native": EVERY, "cuda": PARALLEL, "portable": (), "tensorrt": PARALLEL}


def emitted(program: Program, store: WeightStore, integers: QuantizedWeights, *, name: str, folder: Path) -> bytes:
    """Return the ONNX model that a table makes of a program, and write its weights into ``folder``."""
    table, make = TABLES[name]
    folder.mkdir()
    indices = ir.Value(name="write_indices", shape=ir.Shape(("batch",)), type=ir.TensorType(ir.DataType.INT64))
    with ExternalData(Stage(folder), "data") as data:
        context = make(program, store, integers, data, indices)
        inputs = [indices]
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in program.inputs:
                value = ir.Value(name=node.name, type=ir.TensorType(DTYPES[node.meta["val"].dtype]))
                inputs.append(value)
                context.set(node, value)
        return ir.to_proto(context.build.model(inputs, emit(context, table), "g")).SerializeToString()


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("norm_after_gate_two_groups")


@pytest.fixture(scope="module")
def program(checkpoint: Path) -> Program:
    return run_passes(trace(FalconH1Config.load(checkpoint)))


@pytest.mark.parametrize("name", TABLES)
def test_an_emitter_reads_no_size_from_the_config(
    name: str, checkpoint: Path, program: Program, tmp_path: Path
) -> None:
    store = WeightStore.open(checkpoint, program.config)
    integers = Rounded(store, QuantScheme("int4").precisions(program.config), quantize_rows)
    fused = run_passes(program, FUSE[name])
    wrong = replace(fused, config=replace(program.config, tie_word_embeddings=True, **WRONG))
    models = [
        emitted(each, store, integers, name=name, folder=tmp_path / str(index))
        for index, each in enumerate((fused, wrong))
    ]
    assert models[0] == models[1]
    assert (tmp_path / "0" / "data").read_bytes() == (tmp_path / "1" / "data").read_bytes()


def test_sizes_are_those_of_the_model(program: Program) -> None:
    config = program.config
    attention = AttentionSizes.of(next(program.calls(h1.attention.default)))
    assert attention == AttentionSizes(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert attention.group == config.num_attention_heads // config.num_key_value_heads
    scan = ScanSizes.of(next(program.calls(h1.ssm_scan.default)))
    assert scan == ScanSizes(config.mamba_n_heads, 2, config.mamba_d_head, d_state=config.mamba_d_state)


def test_our_kernels_take_heads_of_whole_vectors(program: Program) -> None:
    assert native.covers(program)
    assert not native.covers(trace(replace(program.config, head_dim=20, num_hidden_layers=1)))
