"""Each pass: what it changes, that numbers stay, and that it refuses graphs it would ruin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_files import Written
from torch.fx import Node

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.graphs.passes import PASSES, Pass, PassError, run_passes
from h1export.graphs.passes.base import multiplier_of
from h1export.graphs.passes.drop_metadata_asserts import DropMetadataAsserts
from h1export.graphs.passes.fold_decay import FoldDecay
from h1export.graphs.passes.fold_head_multiplier import FoldHeadMultiplier
from h1export.graphs.passes.fold_input_multipliers import FoldInputMultipliers
from h1export.graphs.passes.fold_output_multipliers import FoldOutputMultipliers
from h1export.graphs.passes.sort_columns import SortColumns
from h1export.graphs.program import EditableProgram, Program
from h1export.graphs.trace import trace
from h1export.plugins import h1
from h1export.quantize.methods.prequantized import Prequantized
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.source import Rounded, quantized_blocks

Apply = Callable[[Pass, Program], Program]
aten = torch.ops.aten
LINEAR = aten.linear.default
MUL = aten.mul.Tensor
NORM = aten.rms_norm.default
SELECT = aten.index_select.default

SAME = 1e-6  # of the range: a folded multiplier rounds once more or once less
CHUNKS = [5, 20, 1, 1]


def scalars(program: Program) -> list[float]:
    """Every number that the graph multiplies by, in order."""
    return [node.args[1] for node in program.calls(MUL) if isinstance(node.args[1], (int, float))]


def counts(program: Program, *ops: Any) -> tuple[int, ...]:
    return tuple(len(list(program.calls(op))) for op in ops)


def linear_of(program: Program, name: str) -> Node:
    """The projection whose weight is the checkpoint's ``name``."""
    for node in program.calls(LINEAR):
        expr = program.weight_of(node.args[1])
        if expr is not None and expr.only.tensor.endswith(f"{name}.weight"):
            return node
    raise AssertionError(name)


def runs(program: Program, name: str) -> tuple[tuple[int, float], ...]:
    """The multiplier of the weight ``name``."""
    (part,) = [expr.only for expr in program.weights.values() if expr.only.tensor.endswith(name)]
    return part.multiplier.runs


@pytest.fixture(scope="session")
def stages(full_lab: Any, apply_pass: Apply) -> list[Program]:
    """The program before the first pass, and after each."""
    programs = [full_lab.traced]
    for rewrite in PASSES:
        programs.append(apply_pass(rewrite, programs[-1]))
    return programs


def before_and_after(stages: list[Program], kind: type[Pass]) -> tuple[Program, Program]:
    index = [type(rewrite) for rewrite in PASSES].index(kind)
    return stages[index], stages[index + 1]


def test_drop_metadata_asserts(stages: list[Program]) -> None:
    before, after = before_and_after(stages, DropMetadataAsserts)
    assert counts(before, aten._assert_tensor_metadata.default) == (1,)
    assert counts(after, aten._assert_tensor_metadata.default) == (0,)
    assert len(after.graph.nodes) == len(before.graph.nodes) - 1


def test_fold_decay(stages: list[Program]) -> None:
    before, after = before_and_after(stages, FoldDecay)
    assert counts(before, aten.exp.default, aten.neg.default) == (1, 1)
    assert counts(after, aten.exp.default, aten.neg.default) == (0, 0)
    (scan,) = after.calls(h1.ssm_scan.default)
    expr = after.weight_of(scan.args[2])
    assert expr is not None
    assert expr.only.tensor.endswith("A_log")
    assert expr.only.functions == ("exp", "neg")


def test_fold_head_multiplier(stages: list[Program], full_lab: Any) -> None:
    before, after = before_and_after(stages, FoldHeadMultiplier)
    assert scalars(before)[-1] == full_lab.config.lm_head_multiplier
    assert scalars(after) == scalars(before)[:-1]
    assert runs(after, "final_layernorm.weight") == ((0, full_lab.config.lm_head_multiplier),)
    assert runs(after, "lm_head.weight") == ((0, 1.0),)


def test_fold_output_multipliers(stages: list[Program], full_lab: Any) -> None:
    before, after = before_and_after(stages, FoldOutputMultipliers)
    config = full_lab.config
    assert sorted(set(scalars(before)) - set(scalars(after))) == sorted(
        {config.ssm_out_multiplier, config.attention_out_multiplier, config.key_multiplier, *config.mlp_multipliers}
    )
    for name in ("weight", "bias"):
        assert runs(after, f"in_proj.{name}") == tuple(zip(config.in_proj_parts, config.ssm_multipliers, strict=True))
        assert runs(after, f"out_proj.{name}") == ((0, config.ssm_out_multiplier),)
        assert runs(after, f"k_proj.{name}") == ((0, config.key_multiplier),)
        assert runs(after, f"o_proj.{name}") == ((0, config.attention_out_multiplier),)
        assert runs(after, f"gate_proj.{name}") == ((0, config.mlp_multipliers[0]),)
        assert runs(after, f"down_proj.{name}") == ((0, config.mlp_multipliers[1]),)
        assert runs(after, f"up_proj.{name}") == runs(after, f"q_proj.{name}") == ((0, 1.0),)
    assert before.constants
    assert not after.constants
    assert not [node for node in after.graph.nodes if node.name in before.constants]


def test_fold_input_multipliers(stages: list[Program], full_lab: Any) -> None:
    before, after = before_and_after(stages, FoldInputMultipliers)
    config = full_lab.config
    assert scalars(before) == [config.embedding_multiplier, config.ssm_in_multiplier, config.attention_in_multiplier]
    assert scalars(after) == [config.embedding_multiplier]
    for name, others in {"q_proj": 1.0, "k_proj": config.key_multiplier, "v_proj": 1.0}.items():
        assert runs(after, f"{name}.weight") == ((0, others * config.attention_in_multiplier),)
        assert runs(after, f"{name}.bias") == ((0, others),)
    expected = [
        (rows, factor * config.ssm_in_multiplier)
        for rows, factor in zip(config.in_proj_parts, config.ssm_multipliers, strict=True)
    ]
    assert runs(after, "in_proj.weight") == tuple(expected)
    assert runs(after, "in_proj.bias") == tuple(zip(config.in_proj_parts, config.ssm_multipliers, strict=True))


@pytest.mark.parametrize("index", range(1, len(PASSES)), ids=[type(rewrite).__name__ for rewrite in PASSES[1:]])
def test_numbers_stay(index: int, stages: list[Program], full_lab: Any, deviation: Callable[..., float]) -> None:
    """The first pass drops what makes the traced program refuse to run on a CPU, and no arithmetic."""
    assert deviation(full_lab.run(stages[index + 1], CHUNKS), full_lab.run(stages[index], CHUNKS)) < SAME


def test_the_list_is_complete(stages: list[Program], full_lab: Any) -> None:
    assert str(stages[-1].graph) == str(full_lab.passed.graph)
    assert stages[-1].weights == full_lab.passed.weights


def test_last_only_folds_as_well(full_lab: Any) -> None:
    program = run_passes(trace(full_lab.config, last_only=True))
    assert scalars(program) == [full_lab.config.embedding_multiplier]


def test_a_tied_head_stays_tied(make_checkpoint: Callable[..., Any], lab_of: Callable[..., Any]) -> None:
    """Lookup and head read the embedding as it is, bit for bit: the head's multiplier goes into the final norm."""
    program = lab_of(make_checkpoint("tied")).passed
    (lookup,) = program.calls(aten.embedding.default)
    head = program.graph.output_node().args[0][0]
    assert (
        program.weight_of(lookup.args[0])
        == program.weight_of(head.args[1])
        == WeightExpr.of("model.embed_tokens.weight")
    )
    assert {expr for expr in program.weights.values() if "embed_tokens" in expr.only.tensor} == {
        program.weight_of(lookup.args[0])
    }
    assert runs(program, "final_layernorm.weight") == ((0, program.config.lm_head_multiplier),)


def facts(program: Program) -> tuple[str, Any, Any, Any]:
    return str(program.graph), dict(program.weights), dict(program.constants), dict(program.inputs)


class Fails(Pass):
    """Ruins the graph, then does not keep its promise."""

    def run(self, program: Program) -> int:
        program.graph.output_node().args = ((),)
        return 1

    def ensures(self, program: Program) -> None:
        self.check(False, "a promise")


def test_the_input_is_never_changed(lab: Any) -> None:
    before = facts(lab.traced)
    run_passes(lab.traced)
    with pytest.raises(PassError, match="Fails: a promise"):
        run_passes(lab.traced, [*PASSES, Fails()])
    assert facts(lab.traced) == before


def test_requirements_are_checked_before_anything_is_changed(full_lab: Any) -> None:
    class Picky(Fails):
        def requires(self, program: Program) -> None:
            self.check(False, "a requirement")

    with pytest.raises(PassError, match="Picky: a requirement"):
        run_passes(full_lab.traced, [Picky()])


@pytest.mark.parametrize("rewrite", PASSES, ids=[type(rewrite).__name__ for rewrite in PASSES])
def test_a_pass_that_did_nothing_breaks_its_promise(rewrite: Pass, full_lab: Any) -> None:
    with pytest.raises(PassError, match=f"{type(rewrite).__name__}: "):
        rewrite.ensures(full_lab.traced)


def test_a_left_over_constant_breaks_the_promise(full_lab: Any) -> None:
    program = full_lab.passed.editable()
    program.constants["planted"] = Multiplier.scalar(2.0)
    with pytest.raises(PassError, match="planted"):
        FoldOutputMultipliers().ensures(program)


# Graphs that a pass would ruin: what is planted, and the pass that has to refuse it.


def shared_weight(program: Program) -> None:
    """k_proj and v_proj share one weight, and only keys have a multiplier."""
    k = linear_of(program, "k_proj")
    v = linear_of(program, "v_proj")
    v.update_arg(1, k.args[1])


def shared_bias(program: Program) -> None:
    k = linear_of(program, "k_proj")
    v = linear_of(program, "v_proj")
    v.update_arg(2, k.args[2])


def second_reader(program: Program) -> None:
    """Something besides its multiplier reads a projection."""
    gate = linear_of(program, "gate_proj")
    up = linear_of(program, "up_proj")
    up.replace_all_uses_with(gate)


def shared_final_norm(program: Program) -> None:
    """A state output reads the final norm besides the head."""
    result = program.graph.output_node()
    norm = linear_of(program, "lm_head").args[0]
    result.args = ((*result.args[0][:-1], norm),)


def no_final_norm(program: Program) -> None:
    head = linear_of(program, "lm_head")
    head.update_arg(0, head.args[0].args[0])


def shared_decay(program: Program) -> None:
    """The scan reads A_log a second time, as D."""
    (scan,) = program.calls(h1.ssm_scan.default)
    (exp,) = program.calls(aten.exp.default)
    scan.update_arg(5, exp.args[0])


def vector_before_projection(program: Program) -> None:
    """A µP vector scales a projection's input, which no row multiplier can stand for."""
    name = next(iter(program.constants))
    (vector,) = [node for node in program.graph.nodes if node.name == name]
    (scaled,) = [node for node in program.calls(MUL) if node.args[1] == program.config.ssm_in_multiplier]
    scaled.update_arg(1, vector)


def weight_of_two_inputs(program: Program) -> None:
    """q_proj and v_proj share one weight, and their common input has a multiplier."""
    q = linear_of(program, "q_proj")
    v = linear_of(program, "v_proj")
    v.update_arg(1, q.args[1])


PLANTED: dict[str, tuple[Callable[[Program], None], Pass, str]] = {
    "weight shared, output": (
        shared_weight,
        FoldOutputMultipliers(),
        r"k_proj_weight: only a weight with a single reader",
    ),
    "bias shared": (shared_bias, FoldOutputMultipliers(), r"k_proj_bias: only a weight with a single reader"),
    "projection read twice": (second_reader, FoldOutputMultipliers(), "has readers besides its multiplier"),
    "weight shared, input": (
        weight_of_two_inputs,
        FoldInputMultipliers(),
        r"q_proj_weight: only a weight with a single reader",
    ),
    "vector before a projection": (
        vector_before_projection,
        FoldInputMultipliers(),
        "scales a projection's input by a vector",
    ),
    "final norm read twice": (shared_final_norm, FoldHeadMultiplier(), "no final norm of its own"),
    "no final norm": (no_final_norm, FoldHeadMultiplier(), "no final norm of its own"),
    "A_log read twice": (shared_decay, FoldDecay(), "a_log has other readers"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_graph_that_a_pass_would_ruin_is_refused(planted: str, full_lab: Any, apply_pass: Apply) -> None:
    plant, rewrite, message = PLANTED[planted]
    program = full_lab.unfolded.editable()
    plant(program)
    with pytest.raises(PassError, match=message):
        apply_pass(rewrite, program)


# Passes with a bug, and the numbers that show it.


class ForgetsBias(FoldOutputMultipliers):
    def run(self, program: EditableProgram) -> int:
        biases = {name: expr for name, expr in program.weights.items() if expr.only.tensor.endswith(".bias")}
        count = super().run(program)
        program.weights.update(biases)
        return count


class DropsMultipliers(FoldInputMultipliers):
    def run(self, program: EditableProgram) -> int:
        weights = dict(program.weights)
        count = super().run(program)
        program.weights.update(weights)
        return count


class ForgetsNegation(FoldDecay):
    def run(self, program: EditableProgram) -> int:
        for node in program.calls(aten.neg.default):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        return super().run(program)


class FoldsHeadTwice(FoldHeadMultiplier):
    def run(self, program: EditableProgram) -> int:
        norm = linear_of(program, "lm_head").args[0]
        name = norm.args[2].name
        program.weights[name] = program.weights[name].times(Multiplier.scalar(2.0))
        return super().run(program)


@pytest.mark.parametrize(
    "buggy", [ForgetsBias(), DropsMultipliers(), ForgetsNegation(), FoldsHeadTwice()], ids=lambda p: type(p).__name__
)
def test_a_pass_that_changes_numbers_would_be_seen(
    buggy: Pass, full_lab: Any, apply_pass: Apply, deviation: Callable[..., float]
) -> None:
    wrong = apply_pass(buggy, full_lab.unfolded)
    assert not deviation(full_lab.run(wrong, CHUNKS), full_lab.run(full_lab.unfolded, CHUNKS)) < 1000 * SAME


def test_a_multiplier_is_a_number_or_a_mup_vector(full_lab: Any) -> None:
    """Products of two activations, and products with a weight, are none."""
    found = [multiplier_of(full_lab.unfolded, node) for node in full_lab.unfolded.calls(MUL)]
    vectors = [match for match in found if match and not match[1].is_scalar]
    assert len(vectors) == full_lab.config.num_hidden_layers
    assert None in found


def test_sort_columns(make_gptq: Callable[..., Written], lab_of: Any, tmp_path: Path) -> None:
    """One gather for products of one input and one order, of columns that the weights have in that order too."""
    like = {"self_attn.q_proj": "mamba.in_proj", "feed_forward.up_proj": "feed_forward.gate_proj"}
    lab = lab_of(make_gptq(tmp_path, act_order=True, like=like).folder)
    program = run_passes(lab.passed, (SortColumns(lab.store.order_name),))
    assert counts(lab.passed, SELECT) == (0,)
    assert counts(program, SELECT) == (7,)  # nine products
    assert len(program.orders) == 7
    assert {
        part.sorted for expr in program.weights.values() for part in expr.parts if part.tensor in lab.store.packed
    } == {True}
    (logits, states), (same, same_states) = (lab.run(which, CHUNKS) for which in (lab.passed, program))
    assert np.abs(logits - same).max() <= SAME * np.ptp(logits)
    for key, state in states.items():
        assert np.abs(state - same_states[key]).max() <= SAME * np.ptp(state), key
    assert run_passes(program, (SortColumns(lab.store.order_name),)).orders == program.orders


def test_integers_and_graph_agree_on_the_order_of_columns(
    make_gptq: Callable[..., Written], lab_of: Any, tmp_path: Path
) -> None:
    lab = lab_of(make_gptq(tmp_path, act_order=True).folder)
    integers = Prequantized.of(lab.store, Rounded(lab.store, {}, quantize_rows))
    with pytest.raises(ValueError, match="another order than the graph"):
        list(
            quantized_blocks(
                WeightExpr.of("model.layers.0.mamba.out_proj.weight"), lab.store, integers, max_bytes=1 << 20
            )
        )
