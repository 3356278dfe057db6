"""The fusions of projections: which they join, that numbers stay, and what keeps projections apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch

from h1export.checkpoint.weight_expr import WeightExpr
from h1export.graphs.passes import PassError, fusions, run_passes
from h1export.graphs.passes.flatten_splits import FlattenSplits
from h1export.graphs.passes.fuse_parallel_projections import FuseParallelProjections
from h1export.graphs.passes.fuse_summed_projections import FuseSummedProjections
from h1export.graphs.passes.narrow_summands import NarrowSummands
from h1export.graphs.program import Program
from h1export.graphs.trace import trace

aten = torch.ops.aten
SAME = 1e-6  # of the range: a sum over concatenated columns is taken in another order
CHUNKS = [5, 20, 1, 1]


def alike(_: WeightExpr) -> Hashable:
    return 0


def weights(program: Program) -> list[list[str]]:
    """Of each projection, in order: the last names of the tensors that its weight is made of."""
    exprs = [program.weight_of(node.args[1]) for node in program.calls(aten.linear.default)]
    return [[part.tensor.split(".")[-2] for part in expr.parts] for expr in exprs if expr is not None]


@pytest.fixture(scope="module")
def passed(full_lab: Any) -> Program:
    return run_passes(full_lab.traced)


def test_numbers_stay(passed: Program, full_lab: Any, deviation: Callable[..., float]) -> None:
    fused = run_passes(passed, fusions(alike, 1))
    assert deviation(full_lab.run(fused, CHUNKS), full_lab.run(passed, CHUNKS)) < SAME


def test_different_kinds_stay_apart(passed: Program) -> None:
    def kind_of(expr: WeightExpr) -> Hashable:
        return any(name in part.tensor for part in expr.parts for name in ("k_proj", "o_proj"))

    fused = weights(run_passes(passed, fusions(kind_of, 1)))
    assert ["k_proj"] in fused
    assert ["o_proj"] in fused
    assert ["out_proj"] in fused
    assert any(names[-2:] == ["q_proj", "v_proj"] for names in fused)


def test_columns_that_are_not_whole_blocks_stay_apart(passed: Program) -> None:
    fused = weights(run_passes(passed, fusions(alike, 7)))
    assert ["out_proj"] in fused
    assert ["o_proj"] in fused


def test_one_product_each(make_checkpoint: Callable[..., Any], lab_of: Callable[..., Any]) -> None:
    """A model without biases, as all published ones: four products a layer, no split of a split."""
    program = run_passes(run_passes(lab_of(make_checkpoint("plain", num_hidden_layers=1)).traced), fusions(alike, 32))
    projections = [
        ["in_proj", "q_proj", "k_proj", "v_proj"],
        ["out_proj", "o_proj"],
        ["up_proj", "gate_proj"],
        ["down_proj"],
    ]
    assert weights(program)[:-1] == projections
    assert (
        len(list(program.calls(aten.split_with_sizes.default))) == 3
    )  # of the first product, of the convolution's output, of up and gate


@pytest.mark.parametrize(
    "promise",
    [FuseParallelProjections(alike), FuseSummedProjections(alike, 1)],
    ids=lambda promise: type(promise).__name__,
)
def test_a_fusion_that_did_nothing_breaks_its_promise(
    promise: Any, make_checkpoint: Callable[..., Any], lab_of: Callable[..., Any]
) -> None:
    program = run_passes(lab_of(make_checkpoint("plain", num_hidden_layers=1)).traced)
    with pytest.raises(PassError, match=type(promise).__name__):
        promise.ensures(program)


def test_a_split_of_a_split_breaks_the_promise(passed: Program) -> None:
    nested = run_passes(passed, [FuseParallelProjections(alike)])
    with pytest.raises(PassError, match="splits of splits"):
        FlattenSplits().ensures(nested)


def test_a_narrowed_sum_is_a_sum_of_what_is_narrowed(full_lab: Any, deviation: Callable[..., float]) -> None:
    before = run_passes(trace(full_lab.config, last_only=True))
    after = run_passes(before, [NarrowSummands()])
    assert deviation(full_lab.run(after, CHUNKS), full_lab.run(before, CHUNKS)) == 0
    (norm,) = [node.args[0] for node in after.calls(aten.rms_norm.default) if _is_final(after, node)]
    assert [x.target for x in norm.all_input_nodes] == [aten.narrow.default] * 2
    with pytest.raises(PassError, match="narrowed sums"):
        NarrowSummands().ensures(before)


def test_sums_of_every_position_stay(passed: Program) -> None:
    assert run_passes(passed, [NarrowSummands()]).rewrites[-1].count == 0


def _is_final(program: Program, norm: Any) -> bool:
    expr = program.weight_of(norm.args[2])
    return expr is not None and expr.only.tensor.endswith("final_layernorm.weight")
