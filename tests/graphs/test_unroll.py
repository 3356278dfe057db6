"""Unrolled programs are those that torch.export makes of every layer, node by node, and so are the builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.commands.build import build_artifact
from h1export.graphs.passes import run_passes
from h1export.graphs.program import Program
from h1export.graphs.trace import trace, trace_all
from h1export.graphs.unroll import TRACED, unroll
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.scheme import QuantScheme

LAYERS = 5  # copies of copies, and a first, a middle and a last one


def described(program: Program) -> list[Any]:
    """Returns all of every node but the tracer's count of calls: names, arguments, meta, and what it is mapped to."""
    return [
        (
            *(node.op, node.name, str(node.target), str(node.args), str(node.kwargs), node.type),
            {key: str(value) for key, value in node.meta.items() if key != "torch_fn"},
            *(mapping.get(node.name) for mapping in (program.weights, program.constants, program.inputs)),
        )
        for node in program.graph.nodes
    ]


def assert_same(found: Program, expected: Program) -> None:
    for node, other in zip(described(found), described(expected), strict=True):
        assert node == other
    for name in ("config", "states", "weights", "constants", "inputs", "outputs"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("weights", "constants", "inputs"):
        assert list(getattr(found, name)) == list(getattr(expected, name)), f"order of {name}"


def of_layers(folder: Path, layers: int = LAYERS) -> FalconH1Config:
    return replace(FalconH1Config.load(folder), num_hidden_layers=layers)


def test_the_unrolled_program_is_the_traced_one(checkpoint: Path) -> None:
    config = of_layers(checkpoint)
    found = trace(config)
    expected = trace_all(config)
    assert_same(found, expected)
    found.graph.lint()
    assert_same(run_passes(found), run_passes(expected))


@pytest.mark.parametrize("layers", [TRACED + 1, 12])
def test_other_numbers_of_layers_and_the_last_position_alone(layers: int, make_checkpoint: Callable[..., Path]) -> None:
    """A single copy, and numbers of two digits; behind the layers is an op that they have not."""
    config = of_layers(make_checkpoint("everything"), layers)
    assert_same(trace(config, last_only=True), trace_all(config, last_only=True))


@pytest.fixture(scope="module")
def config(make_checkpoint: Callable[..., Path]) -> FalconH1Config:
    return of_layers(make_checkpoint("all_biases"))


@pytest.fixture(scope="module")
def everything_traced(config: FalconH1Config) -> Program:
    return trace_all(config)


def another_layers_weight(program: Program) -> Program:
    """One placeholder of the fourth layer, made of the second's tensor: no shape tells."""
    name = "p_model_layers_3_mamba_d"
    return replace(program, weights={**program.weights, name: WeightExpr.of("model.layers.1.mamba.D")})


def another_layers_state(program: Program) -> Program:
    """The I/O names of two layers' keys, exchanged."""
    names = {"states_2_0": "past_key_values.3.key", "states_3_0": "past_key_values.2.key"}
    return replace(program, inputs={**program.inputs, **names})


def another_layers_result(program: Program) -> Program:
    """A layer that skips the one before it."""
    norms = {node.args[2].name: node for node in program.calls(torch.ops.aten.rms_norm.default)}
    norm, other = (norms[f"p_model_layers_{layer}_input_layernorm_weight"] for layer in (3, 2))
    norm.replace_input_with(norm.args[0], other.args[0])
    return program


def another_shape(program: Program) -> Program:
    """A result that is said to be longer than it is."""
    node = list(program.calls(torch.ops.aten.linear.default))[-2]
    node.meta["val"] = torch.cat([node.meta["val"]] * 2, dim=-1)
    return program


@pytest.mark.parametrize("fault", [another_layers_weight, another_layers_state, another_layers_result, another_shape])
def test_a_wrong_copy_would_be_seen(
    fault: Callable[[Program], Program], config: FalconH1Config, everything_traced: Program
) -> None:
    found = trace(config)
    assert_same(found, everything_traced)
    with pytest.raises(AssertionError):
        assert_same(fault(found), everything_traced)


def test_the_traced_layers_are_left_alone(config: FalconH1Config) -> None:
    program = trace_all(replace(config, num_hidden_layers=TRACED))
    before = described(program)
    unroll(program, config)
    assert described(program) == before


def test_layers_that_differ_are_refused(config: FalconH1Config) -> None:
    program = trace_all(replace(config, num_hidden_layers=TRACED))
    first, *_ = program.calls(torch.ops.aten.silu.default)
    first.target = torch.ops.aten.relu.default
    with pytest.raises(ValueError, match="not like the first"):
        unroll(program, config)


@pytest.mark.ort
def test_a_build_has_the_same_bytes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("everything", num_hidden_layers=LAYERS)
    unrolled = build_artifact(checkpoint, "ort", tmp_path / "unrolled", scheme=QuantScheme("int4"))
    monkeypatch.setattr("h1export.commands.build.trace", trace_all)
    traced = build_artifact(checkpoint, "ort", tmp_path / "traced", scheme=QuantScheme("int4"))
    files = sorted(file.name for file in traced.folder.iterdir())
    assert sorted(file.name for file in unrolled.folder.iterdir()) == files
    assert {"model.onnx", "model.onnx.data", "model.native.onnx", "manifest.json"} <= set(files)
    for name in files:
        assert (unrolled.folder / name).read_bytes() == (traced.folder / name).read_bytes(), name
