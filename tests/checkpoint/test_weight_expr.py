"""WeightExpr and Multiplier: the rules of the expressions, and the values that they give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import FUNCTIONS, Function, Multiplier, WeightExpr, WeightPart
from h1export.model.falcon_h1.config import FalconH1Config

A_LOG = "model.layers.0.mamba.A_log"
CONV = "model.layers.0.mamba.conv1d.weight"
Q, K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
IN_PROJ = "model.layers.0.mamba.in_proj.weight"
ROWS = {Q: 128, K: 64, V: 64, IN_PROJ: 422, A_LOG: 6, CONV: 224}

# A result is rounded to float32 once per function, for the factor of the row and for the product: at most four times.
ROUNDING = 4 * 2.0**-24

FACTORS = st.floats(1e-3, 1e3) | st.sampled_from([1.0, 0.5, -2.0])
PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def runs_of(draw: st.DrawFn, rows: int) -> Multiplier:
    """Draw a row multiplier for ``rows`` rows."""
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1), max_size=4))) if rows > 1 else []
    lengths = np.diff([0, *cuts, rows]).tolist()
    return Multiplier(tuple((length, draw(FACTORS)) for length in lengths))


def multipliers(rows: int) -> st.SearchStrategy[Multiplier]:
    return FACTORS.map(Multiplier.scalar) | runs_of(rows)


@st.composite
def like(draw: st.DrawFn, other: Multiplier) -> Multiplier:
    """Draw a multiplier that ``other`` can be multiplied with: a scalar, or the same runs with other factors."""
    same = Multiplier(tuple((rows, draw(FACTORS)) for rows, _ in other.runs))
    return draw(st.just(same) | FACTORS.map(Multiplier.scalar))


def exact(multiplier: Multiplier, rows: int) -> Any:
    """Return the factor of each row in float64, computed in another way than the product code does."""
    if multiplier.runs[0][0] == 0:
        return np.array([multiplier.runs[0][1]] * rows)
    return np.array([factor for count, factor in multiplier.runs for _ in range(count)])


@pytest.fixture(scope="module")
def store(make_checkpoint: Callable[..., Path]) -> WeightStore:
    folder = make_checkpoint("plain", num_hidden_layers=1)
    return WeightStore.open(folder, FalconH1Config.load(folder))


def whole(store: WeightStore, tensor: str) -> Any:
    """The tensor in float64."""
    return np.concatenate(list(store.blocks(tensor, 1 << 30))).astype(np.float64)


@PROPERTY
@given(st.data(), st.integers(1, 40))
def test_the_product_is_the_product_of_the_rows(data: st.DataObject, rows: int) -> None:
    one = data.draw(multipliers(rows))
    other = data.draw(like(one))
    product = one.times(other)
    assert np.allclose(exact(product, rows), exact(one, rows) * exact(other, rows), rtol=1e-15, atol=0)
    assert product == other.times(one)
    assert product.is_scalar == (one.is_scalar and other.is_scalar)


@PROPERTY
@given(st.data(), st.integers(1, 40))
def test_one_changes_nothing(data: st.DataObject, rows: int) -> None:
    multiplier = data.draw(multipliers(rows))
    assert multiplier.times(Multiplier()) == Multiplier().times(multiplier) == multiplier


@PROPERTY
@given(st.data(), st.integers(1, 40))
def test_rows_are_the_factors_in_float32(data: st.DataObject, rows: int) -> None:
    multiplier = data.draw(multipliers(rows))
    found = multiplier.rows(rows)
    assert found.dtype == np.float32
    assert np.array_equal(found, exact(multiplier, rows).astype(np.float32))


def test_a_scalar_fits_any_number_of_rows() -> None:
    assert [Multiplier.scalar(2.0).rows(count).shape for count in (0, 1, 7)] == [(0,), (1,), (7,)]


@pytest.mark.parametrize("count", [0, 4, 6])
def test_rows_of_another_number_are_misuse(count: int) -> None:
    with pytest.raises(ValueError, match=f"5 rows on a tensor of {count}"):
        Multiplier(((2, 1.0), (3, 2.0))).rows(count)


@pytest.mark.parametrize("other", [((5, 1.0),), ((3, 1.0), (2, 1.0)), ((2, 1.0), (3, 1.0), (1, 1.0))])
def test_row_multipliers_of_other_parts_are_misuse(other: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="different parts"):
        Multiplier(((2, 1.0), (3, 2.0))).times(Multiplier(other))


@PROPERTY
@given(st.data(), st.sampled_from(sorted(ROWS)), st.integers(4000, 1 << 17))
def test_a_part_is_functions_then_multiplier(store: WeightStore, data: st.DataObject, tensor: str, budget: int) -> None:
    """The result is compared with float64. The order of functions and runs cut by block boundaries are covered."""
    functions = data.draw(st.sampled_from([(), ("neg",), ("exp",), ("exp", "neg"), ("neg", "exp"), ("neg", "neg")]))
    multiplier = data.draw(multipliers(ROWS[tensor]))
    expected = whole(store, tensor)
    expression = WeightExpr.of(tensor)
    for function in functions:
        expected = -expected if function == "neg" else np.exp(expected)
        expression = expression.apply(function)
    expected = expected * exact(multiplier, ROWS[tensor]).reshape(-1, *[1] * (expected.ndim - 1))
    found = np.concatenate(list(expression.times(multiplier).blocks(store, budget)))
    assert found.dtype == np.float32
    assert np.all(np.abs(found - expected) <= ROUNDING * np.abs(expected))


def test_every_function_has_a_float64_counterpart_in_this_file() -> None:
    assert set(get_args(Function)) == FUNCTIONS.keys() == {"neg", "exp"}


def test_a_plain_tensor_is_exact(store: WeightStore) -> None:
    for tensor in ROWS:
        assert np.array_equal(WeightExpr.of(tensor).dense(store), whole(store, tensor))


def test_the_decay_is_rounded_once(store: WeightStore) -> None:
    """-exp(A_log) is float64's value, rounded: half a unit in the last place of float32."""
    found = WeightExpr.of(A_LOG).apply("exp").apply("neg").dense(store)
    assert np.array_equal(found, (-np.exp(whole(store, A_LOG))).astype(np.float32))
    x = np.linspace(-8, 8, 20_001, dtype=np.float32)
    assert np.array_equal(FUNCTIONS["exp"](x), np.exp(x.astype(np.float64)).astype(np.float32))


@PROPERTY
@given(st.data(), st.lists(st.sampled_from([Q, K, V, IN_PROJ]), min_size=1, max_size=4), st.integers(4000, 1 << 17))
def test_parts_are_concatenated_in_order(
    store: WeightStore, data: st.DataObject, tensors: list[str], budget: int
) -> None:
    parts = tuple(WeightPart(tensor, multiplier=data.draw(multipliers(ROWS[tensor]))) for tensor in tensors)
    scalar = data.draw(FACTORS)
    expression = WeightExpr(parts).times(Multiplier.scalar(scalar))
    expected = np.concatenate(
        [whole(store, p.tensor) * exact(p.multiplier, ROWS[p.tensor])[:, None] * scalar for p in parts]
    )
    blocks = list(expression.blocks(store, budget))
    found = np.concatenate(blocks)
    assert found.shape == expression.shape(store.shape) == expected.shape
    assert np.all(np.abs(found - expected) <= ROUNDING * np.abs(expected))
    assert all(len(block) == 1 or block.nbytes <= budget for block in blocks)
    assert np.array_equal(expression.dense(store), found)


def test_the_same_bytes_whatever_the_blocks(store: WeightStore) -> None:
    expression = WeightExpr.of(IN_PROJ).times(
        Multiplier(((192, 0.3535), (192, 0.25), (16, 0.35), (16, 0.5), (6, 0.72)))
    )
    reference = expression.dense(store).tobytes()
    for budget in (1, 512, 1000, 70_000, 1 << 20):
        assert b"".join(block.tobytes() for block in expression.blocks(store, budget)) == reference


def test_shapes_of_more_than_two_axes(store: WeightStore) -> None:
    assert WeightExpr.of(CONV).shape(store.shape) == (224, 1, 4)
    assert WeightExpr((WeightPart(CONV), WeightPart(CONV))).shape(store.shape) == (448, 1, 4)


def test_a_function_after_a_multiplier_is_misuse() -> None:
    with pytest.raises(ValueError, match=r"A_log: a function after a multiplier"):
        WeightExpr.of(A_LOG).times(Multiplier.scalar(2.0)).apply("exp")


def test_a_row_multiplier_on_a_concatenation_is_misuse() -> None:
    with pytest.raises(ValueError, match="row multiplier on a concatenation"):
        WeightExpr((WeightPart(Q), WeightPart(K))).times(Multiplier(((192, 2.0),)))


def test_a_row_multiplier_of_another_height_is_misuse(store: WeightStore) -> None:
    with pytest.raises(ValueError, match="5 rows on a tensor of 64"):
        WeightExpr.of(K).times(Multiplier(((5, 2.0),))).dense(store)


def test_the_only_part_of_several_is_misuse() -> None:
    assert WeightExpr.of(Q).only == WeightPart(Q)
    with pytest.raises(ValueError, match="too many values"):
        _ = WeightExpr((WeightPart(Q), WeightPart(K))).only


def test_parts_of_different_widths_are_misuse(store: WeightStore) -> None:
    with pytest.raises(ValueError, match="dimension"):
        WeightExpr((WeightPart(Q), WeightPart(A_LOG))).dense(store)


def test_expressions_are_never_changed_in_place() -> None:
    one = WeightExpr.of(A_LOG)
    one.apply("exp")
    one.times(Multiplier.scalar(3.0))
    assert one == WeightExpr.of(A_LOG)
