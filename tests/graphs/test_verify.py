"""verify refuses what targets would misread, and names the node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.passes import PASSES, run_passes
from h1export.graphs.program import EditableProgram, Program
from h1export.graphs.verify import VerifyError, verify
from h1export.plugins import h1

aten = torch.ops.aten


def named(program: Program, name: str) -> torch.fx.Node:
    (node,) = [node for node in program.graph.nodes if node.name == name]
    return node


def weight_node(program: Program, tensor: str) -> torch.fx.Node:
    (name,) = [name for name, expr in program.weights.items() if expr.only.tensor.endswith(tensor)]
    return named(program, name)


@pytest.fixture
def program(full_lab: Any) -> EditableProgram:
    """A legal program that the test may spoil."""
    copy: EditableProgram = full_lab.passed.editable()
    return copy


def test_every_config_passes(lab: Any) -> None:
    verify(lab.passed)


def test_an_unfolded_mup_vector_is_named(full_lab: Any) -> None:
    with pytest.raises(VerifyError, match=r"b_model_layers_0_mamba_mup: neither an input nor a weight"):
        verify(full_lab.traced)


def test_an_illegal_op_is_named(program: EditableProgram) -> None:
    (silu, *_) = program.calls(aten.silu.default)
    silu.target = aten.gelu.default
    with pytest.raises(VerifyError, match=rf"{silu.name}: aten\.gelu\.default is not a legal op"):
        verify(program)


def test_a_left_over_assertion_is_named(full_lab: Any, apply_pass: Callable[..., Program]) -> None:
    program = full_lab.traced
    for rewrite in PASSES[1:]:
        program = apply_pass(rewrite, program)
    with pytest.raises(VerifyError, match=r"_assert_tensor_metadata_default: .* is not a legal op"):
        verify(program)


def test_an_op_of_the_right_name_and_another_overload_is_illegal(program: EditableProgram) -> None:
    (clamp,) = program.calls(aten.clamp.default)
    clamp.target = aten.clamp.Tensor
    with pytest.raises(VerifyError, match=rf"{clamp.name}: aten\.clamp\.Tensor"):
        verify(program)


def test_a_weight_inside_the_module_is_named(program: EditableProgram) -> None:
    program.module.register_buffer("inside", torch.ones(1))
    first = next(iter(program.calls(aten.embedding.default)))
    with program.graph.inserting_before(first):
        inside = program.graph.get_attr("inside")
    with pytest.raises(VerifyError, match=rf"{inside.name}: weights do not live inside a program \(get_attr\)"):
        verify(program)


def test_a_submodule_is_named(program: EditableProgram) -> None:
    program.module.add_module("sub", torch.nn.Identity())
    first = next(iter(program.calls(aten.embedding.default)))
    with program.graph.inserting_before(first):
        called = program.graph.call_module("sub", ())
    with pytest.raises(VerifyError, match=rf"{called.name}: .*call_module"):
        verify(program)


def test_a_placeholder_without_meaning_is_named(program: EditableProgram) -> None:
    node = weight_node(program, "mamba.D")
    del program.weights[node.name]
    with pytest.raises(VerifyError, match=f"{node.name}: neither an input nor a weight"):
        verify(program)


def test_a_weight_of_another_shape_is_named(program: EditableProgram) -> None:
    node = weight_node(program, "q_proj.weight")
    program.weights[node.name] = WeightExpr.of("model.layers.0.self_attn.k_proj.weight")
    with pytest.raises(VerifyError, match=rf"{node.name}: the graph says \(128, 128\), its expression \(64, 128\)"):
        verify(program)


def test_a_concatenation_has_the_shape_of_its_parts(program: EditableProgram) -> None:
    """k and v in q's place have q's shape; what they displaced is then missing."""
    node = weight_node(program, "q_proj.weight")
    prefix = "model.layers.0.self_attn"
    parts = (*WeightExpr.of(f"{prefix}.k_proj.weight").parts, *WeightExpr.of(f"{prefix}.v_proj.weight").parts)
    program.weights[node.name] = WeightExpr(parts)
    with pytest.raises(VerifyError, match=r"no initializer is made of.*q_proj\.weight"):
        verify(program)


def test_a_tensor_that_nothing_is_made_of_is_named(program: EditableProgram) -> None:
    """A projection's bias dropped together with its placeholder."""
    bias = weight_node(program, "q_proj.bias")
    (linear,) = bias.users
    linear.args = linear.args[:2]
    program.graph.erase_node(bias)
    with pytest.raises(VerifyError, match=r"self_attn\.q_proj\.bias"):
        verify(program)


def test_a_weight_that_nothing_reads_is_named(program: EditableProgram) -> None:
    """A projection's bias dropped, its placeholder left behind."""
    (linear,) = weight_node(program, "q_proj.bias").users
    linear.args = linear.args[:2]
    with pytest.raises(VerifyError, match=r"self_attn\.q_proj\.bias"):
        verify(program)


def test_a_missing_output_is_counted(program: EditableProgram) -> None:
    result = program.graph.output_node()
    result.args = (result.args[0][:-1],)
    with pytest.raises(VerifyError, match="4 outputs for the names"):
        verify(program)


def lost_output_name(program: Program) -> Program:
    result = program.graph.output_node()
    result.args = (result.args[0][:-1],)
    return replace(program, outputs=program.outputs[:-1])


def lost_input_name(program: Program) -> Program:
    name = next(node for node, io in program.inputs.items() if io.endswith("recurrent_state"))
    (scan,) = program.calls(h1.ssm_scan.default)
    scan.update_arg(7, scan.args[0])
    program.graph.erase_node(named(program, name))
    return replace(program, inputs={node: io for node, io in program.inputs.items() if node != name})


def swapped_output_names(program: Program) -> Program:
    *others, conv, recurrent = program.outputs
    return replace(program, outputs=(*others, recurrent, conv))


def state_left_unread(program: Program) -> Program:
    """Nothing reads the past recurrent state; its placeholder is left behind."""
    (scan,) = program.calls(h1.ssm_scan.default)
    scan.update_arg(7, scan.args[0])
    return program


def state_never_read(program: Program) -> Program:
    """Nothing reads the past recurrent state, and its placeholder is gone."""
    (scan,) = program.calls(h1.ssm_scan.default)
    state = scan.args[7]
    scan.update_arg(7, scan.args[0])
    program.graph.erase_node(state)
    return program


@pytest.mark.parametrize(
    "spoil", [lost_output_name, lost_input_name, swapped_output_names, state_never_read, state_left_unread]
)
def test_a_state_that_does_not_come_in_and_go_out_is_refused(
    spoil: Callable[[Program], Program], program: Program
) -> None:
    with pytest.raises(VerifyError, match=r"recurrent_state|outputs"):
        verify(spoil(program))


def test_run_passes_verifies_its_result(full_lab: Any) -> None:
    with pytest.raises(VerifyError):
        run_passes(full_lab.traced, [])
