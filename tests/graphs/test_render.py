"""Programs as text: every node is there, sizes have names, later layers can be left out, rewrites are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gptq_files import Written

from h1export.checkpoint.weight_expr import Multiplier, WeightExpr
from h1export.graphs.passes import PASSES, fusions, passes_for, run_passes
from h1export.graphs.program import Rewrites
from h1export.graphs.render import Listing, expression
from h1export.graphs.trace import trace
from h1export.model.falcon_h1.config import FalconH1Config


def test_inputs_and_outputs_have_names_of_sizes(lab: Any) -> None:
    listing = Listing.of(lab.passed)
    config = lab.config
    inputs = {entry.name: entry.type for entry in listing.inputs}
    outputs = {entry.name: entry.type for entry in listing.outputs}
    assert inputs["input_ids"] == "int64 [batch, sequence]"
    assert inputs["attention_mask"] == "int64 [batch, total]"
    kv = f"{config.num_key_value_heads}, {{}}, {config.head_dim}]"
    assert inputs["past_key_values.0.key"] == f"float32 [batch, {kv.format('past')}"
    assert outputs["present.0.value"] == f"float32 [batch, {kv.format('past + sequence')}"
    assert outputs["logits"] == f"float32 [batch, sequence, {config.vocab_size}]"
    assert list(outputs) == list(lab.passed.outputs)


@pytest.mark.parametrize("stage", ["traced", "passed"])
def test_every_node_and_weight_is_an_entry(stage: str, lab: Any) -> None:
    program = getattr(lab, stage)
    listing = Listing.of(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [entry.name for entry in listing.nodes] == [node.name for node in nodes]
    assert {entry.name: entry.definition for entry in listing.weights} == {
        name: expression(expr) for name, expr in program.weights.items()
    }
    assert [entry.name for entry in listing.constants] == list(program.constants)


def test_a_node_has_its_op_arguments_dtype_and_shape(full_lab: Any) -> None:
    listing = Listing.of(full_lab.passed)
    (scan,) = [entry for entry in listing.nodes if entry.definition.startswith("h1.ssm_scan(")]
    config = full_lab.config
    heads = f"{config.mamba_n_heads}, {config.mamba_d_head}"
    assert scan.type == f"(float32 [batch, sequence, {heads}], float32 [batch, {heads}, {config.mamba_d_state}])"
    assert scan.definition.endswith(", {}, {:g}, {:g})".format(config.mamba_chunk_size, *config.time_step_limit))
    assert scan.layer == 0
    (embedding,) = [entry for entry in listing.nodes if entry.definition.startswith("aten.embedding(")]
    assert embedding.definition == "aten.embedding(p_model_embed_tokens_weight, input_ids)"
    assert embedding.layer is None


def test_layers_after_the_first_are_left_out_unless_wanted(make_checkpoint: Callable[..., Path]) -> None:
    listing = Listing.of(run_passes(trace(FalconH1Config.load(make_checkpoint("plain", num_hidden_layers=5)))))
    short = listing.text()
    whole = listing.text(all_layers=True)
    assert "model.layers.0.mamba.in_proj.weight" in short
    assert "model.layers.1." not in short
    assert short.count("layers 1 to 4 are like layer 0") == 4  # inputs, outputs, weights, nodes
    assert "are like layer 0" not in whole
    for layer in range(5):
        assert f"model.layers.{layer}.mamba.in_proj.weight" in whole
    entries = sum(map(len, (listing.inputs, listing.outputs, listing.weights, listing.constants, listing.nodes)))
    assert len(whole.splitlines()) == entries + 4 * 2 + 1 + len(PASSES)
    layers = [entry.layer for entry in listing.nodes if entry.layer is not None]
    assert layers == sorted(layers)
    assert len({layers.count(layer) for layer in range(5)}) == 1


def test_expressions() -> None:
    a, b = WeightExpr.of("a"), WeightExpr.of("b").times(Multiplier.scalar(0.5))
    assert expression(a.apply("exp").apply("neg")) == "neg(exp(a))"
    assert expression(b) == "0.5 * b"
    assert expression(b.sort()) == "0.5 * b[:, order]"
    assert expression(a.times(Multiplier(((2, 0.5), (3, 2.0))))) == "rows(2 x 0.5, 3 x 2) * a"
    assert expression(WeightExpr.concatenated([a, b], 0)) == "[a; 0.5 * b]"
    assert expression(WeightExpr.concatenated([a, b], 1)) == "[a | 0.5 * b]"


def test_rewrites_are_counted_through_all_runs_of_passes(make_checkpoint: Callable[..., Path]) -> None:
    """Two layers without multipliers and biases: only what is written out here is there to be rewritten."""
    traced = trace(FalconH1Config.load(make_checkpoint("no_mup")))
    assert traced.rewrites == ()
    assert "no pass was run" in Listing.of(traced).text()
    passed = run_passes(traced)
    assert passed.rewrites == (
        Rewrites("drop_metadata_asserts", 1),
        Rewrites("fold_decay", 4),  # exp and neg of two layers
        Rewrites("fold_head_multiplier", 0),
        Rewrites("fold_output_multipliers", 0),
        Rewrites("fold_input_multipliers", 0),
    )
    fused = run_passes(passed, fusions(lambda _: 0, 1))
    assert [rewrites.name for rewrites in fused.rewrites[len(PASSES) :]] == [
        "fuse_parallel_projections",
        "fuse_summed_projections",
        "flatten_splits",
    ]
    assert Listing.of(fused).text().splitlines()[-1].split() == ["flatten_splits", "2"]


def test_orders_of_columns_are_constants(make_gptq: Callable[..., Written], lab_of: Any, tmp_path: Path) -> None:
    lab = lab_of(make_gptq(tmp_path, act_order=True).folder)
    program = run_passes(lab.traced, passes_for(lab.store.order_name))
    listing = Listing.of(program)
    orders = {entry.name: entry.definition for entry in listing.constants}
    assert orders == {name: f"order of the columns of {tensor}" for name, tensor in program.orders.items()}
    assert any(entry.definition.endswith("[:, order]") for entry in listing.weights)
    assert "sort_columns" in listing.text()


def test_a_pass_has_the_name_of_its_file() -> None:
    for rewrite in (*PASSES, *fusions(lambda _: 0, 1), *passes_for(lambda _: "")):
        assert rewrite.name == type(rewrite).__module__.rpartition(".")[2]


def test_a_finished_program_cannot_be_changed(full_lab: Any) -> None:
    with pytest.raises(TypeError):
        full_lab.passed.weights["x"] = WeightExpr.of("x")
    copy = full_lab.passed.editable()
    copy.weights["x"] = WeightExpr.of("x")
    assert "x" not in full_lab.passed.weights
