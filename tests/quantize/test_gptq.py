"""GPTQ against the textbook: one column at a time, with a new inverse of the remaining moments in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.quantize.methods.gptq import DAMPING, LAZY_COLUMNS, Inverse, fitted_scales, invert, round_rows, solve_rows
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.scale_search import search_rows
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor

INT4 = Precision(4, 32)


def codes_of(weight: Any, scales: Any, precision: Precision, *, inverse: Inverse) -> Any:
    """What round_rows does, for NumPy's arrays."""
    return round_rows(torch.from_numpy(weight), scales, precision, inverse=inverse).numpy()


def scales_of(weight: Any, codes: Any, scales: Any, *, inverse: Inverse) -> Any:
    """What fitted_scales does, for NumPy's arrays."""
    return fitted_scales(torch.from_numpy(weight), torch.from_numpy(codes), scales, inverse=inverse)


def problem(rows: int, columns: int, seed: int) -> tuple[Any, Any]:
    """Returns a weight, and the moments of its inputs, float64 [columns, columns].

    The inputs are mixed from half as many sources, and are of unequal size.
    """
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(4 * columns, columns // 2)) @ rng.normal(size=(columns // 2, columns))
    inputs = (mixed + 0.3 * rng.normal(size=mixed.shape)) * np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)).astype(np.float32), inputs.T @ inputs


def damage(found: QuantizedTensor, weight: Any, moments: Any) -> Any:
    """What rounding does to the product's outputs, squared, a row: e H e^T."""
    error = found.unfolded().astype(np.float64) - weight
    return np.einsum("rc,cd,rd->r", error, moments, error)


def textbook(weight: Any, moments: Any, scales: Any, width: int, top: int) -> Any:
    """Codes [rows, columns] by optimal brain compression: w_F += -(w_q - quant(w_q)) / [H_F^-1]_qq (H_F^-1)_:,q."""
    moments = moments + DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    left = list(np.argsort(-np.diag(moments), kind="stable"))
    rest = weight.astype(np.float64)
    codes = np.zeros(weight.shape, int)
    while left:
        inverse = np.linalg.inv(moments[np.ix_(left, left)])
        column = left[0]
        scale = scales[:, column // width].astype(np.float64)
        codes[:, column] = np.clip(np.rint(rest[:, column] / scale), -top, top)
        error = (rest[:, column] - codes[:, column] * scale) / inverse[0, 0]
        rest[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("precision", [INT4, Precision(4, 64), Precision(8, 0)], ids=str)
def test_it_is_the_textbooks(precision: Precision) -> None:
    """There are more columns than a lazy block has, so that both corrections take part.

    float32 may decide a tie the other way.
    """
    weight, moments = problem(8, 2 * LAZY_COLUMNS, 0)
    scales = quantize_rows(weight, precision, np.ones(8, np.float32)).scales
    codes = codes_of(weight, scales, precision, inverse=invert(torch.from_numpy(moments), "x"))
    truth = textbook(weight, moments, scales, precision.columns_per_group(2 * LAZY_COLUMNS), precision.top)
    same = (codes == truth).all(axis=1)
    assert same.mean() >= 0.75
    ours, theirs = (QuantizedTensor(found.astype(np.int8), scales, np.ones(8, np.float32)) for found in (codes, truth))
    ratio = damage(ours, weight, moments) / damage(theirs, weight, moments)
    assert ratio[same] == pytest.approx(1)
    assert ratio == pytest.approx(1, abs=0.15)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 8), groups=st.integers(1, 6), seed=st.integers(0, 1 << 30))
def test_it_beats_rounding_where_inputs_are_mixed(rows: int, groups: int, seed: int) -> None:
    weight, moments = problem(8 + rows, 32 * groups, seed)
    found = solve_rows(weight, INT4, invert(torch.from_numpy(moments), "x"), name="w")
    plain = quantize_rows(weight, INT4, np.ones(8 + rows, np.float32))
    assert damage(found, weight, moments).sum() < 0.8 * damage(plain, weight, moments).sum()
    assert np.abs(found.codes.astype(int)).max() <= INT4.top


def test_unmixed_inputs_leave_nothing_to_make_up_for() -> None:
    """Moments that are the identity: every column is rounded as the search does it."""
    weight = np.random.default_rng(3).normal(size=(6, 192)).astype(np.float32)
    searched = search_rows(weight, INT4, np.ones(6, np.float32))
    codes = codes_of(weight, searched.scales, INT4, inverse=invert(torch.eye(192, dtype=torch.float64), "x"))
    np.testing.assert_array_equal(codes, searched.codes)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 8), groups=st.integers(1, 6), seed=st.integers(0, 1 << 30))
def test_fitted_scales_are_the_least_squares_ones(rows: int, groups: int, seed: int) -> None:
    """Against numpy's solver in float64, on the inputs themselves.

    And no row whose scales are all fitted gets worse by the damped moments, but for the rounding to fp16.
    """
    weight, moments = problem(rows, 32 * groups, seed)
    inverse = invert(torch.from_numpy(moments), "x")
    start = search_rows(weight, INT4, np.ones(rows, np.float32))
    codes = codes_of(weight, start.scales, INT4, inverse=inverse)
    fitted = scales_of(weight, codes, start.scales, inverse=inverse)
    damped = inverse.moments.double().numpy()
    root = np.linalg.cholesky(damped).T
    all_fitted = np.zeros(rows, bool)
    for row in range(rows):
        parts = np.stack([root[:, k : k + 32] @ codes[row, k : k + 32] for k in range(0, 32 * groups, 32)], axis=1)
        exact = np.linalg.lstsq(parts, root @ weight[row].astype(np.float64), rcond=None)[0]
        tame = (exact > start.scales[row] / 1.4) & (exact < start.scales[row] * 1.4)
        all_fitted[row] = tame.all()
        if all_fitted[row]:
            np.testing.assert_allclose(fitted[row].astype(np.float64), exact, rtol=5e-3)
    before, after = (
        damage(QuantizedTensor(codes, scales, start.row_scale), weight, damped) for scales in (start.scales, fitted)
    )
    assert (after <= before * 1.001)[all_fitted].all()


def test_fits_that_say_nothing_leave_the_scales() -> None:
    weight, moments = problem(4, 64, 2)
    start = search_rows(weight, INT4, np.ones(4, np.float32))
    nothing = np.zeros((4, 64), np.int8)
    np.testing.assert_array_equal(
        scales_of(weight, nothing, start.scales, inverse=invert(torch.from_numpy(moments), "x")), start.scales
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(groups=st.integers(1, 4), noise=st.sampled_from([0.1, 0.5]), seed=st.integers(0, 1 << 30))
def test_a_product_makes_up_for_what_its_inputs_lost(groups: int, noise: float, seed: int) -> None:
    """Inputs x that are a shrunk and noisy version of t: the outputs come nearer to those of the weight on t."""
    rng = np.random.default_rng(seed)
    columns = 32 * groups
    t = rng.normal(size=(8 * columns, columns)) @ rng.normal(size=(columns, columns)) / columns**0.5
    x = (1 - noise) * t + noise * rng.normal(size=t.shape)
    weight = rng.normal(size=(16, columns)).astype(np.float32)

    def distance(found: Any) -> float:
        return float(np.square(t @ weight.T - x @ found.T).sum())

    moments, drift = (torch.from_numpy(matrix) for matrix in (x.T @ x, (t - x).T @ x))
    blind, seeing = (
        solve_rows(weight, INT4, invert(moments, "x", known), name="w").unfolded().astype(np.float64)
        for known in (None, drift)
    )
    best = np.linalg.lstsq(x, t @ weight.T, rcond=None)[0].T
    assert distance(seeing) < distance(blind)
    rounding = solve_rows(best.astype(np.float32), INT4, invert(moments, "x"), name="w").unfolded().astype(np.float64)
    assert distance(seeing) < 1.1 * distance(rounding)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e8])
def test_the_size_of_the_moments_does_not_matter(factor: float) -> None:
    """So one set of moments serves products whose inputs differ by a multiplier."""
    weight, moments = problem(4, 96, 5)
    one, other = (
        solve_rows(weight, INT4, invert(torch.from_numpy(moments * size), "x"), name="w") for size in (1.0, factor)
    )
    assert (one.codes == other.codes).mean() > 0.99  # another power of two would change no bit


def test_rows_do_not_influence_each_other() -> None:
    weight, moments = problem(7, 160, 1)
    inverse = invert(torch.from_numpy(moments), "x")
    whole = solve_rows(weight, INT4, inverse, name="w")
    parts = [solve_rows(weight[rows], INT4, inverse, name="w") for rows in (slice(0, 3), slice(3, 7))]
    assert (
        np.concatenate([part.codes for part in parts]) == whole.codes
    ).mean() > 0.99  # products of other shapes sum in another order
    np.testing.assert_allclose(
        np.concatenate([part.scales for part in parts]).astype(float), whole.scales.astype(float), rtol=2e-3
    )


def test_inputs_that_are_always_zero() -> None:
    """One such column costs the others nothing.

    Where all are so, nothing is known, and the search's integers are left.
    """
    weight, moments = problem(4, 64, 2)
    moments[3] = 0
    moments[:, 3] = 0
    found = solve_rows(weight, INT4, invert(torch.from_numpy(moments), "x"), name="w")
    plain = search_rows(weight, INT4, np.ones(4, np.float32))
    assert damage(found, weight, moments).sum() < 0.8 * damage(plain, weight, moments).sum()
    blind = solve_rows(weight, INT4, invert(torch.zeros(64, 64, dtype=torch.float64), "x"), name="w")
    np.testing.assert_array_equal(blind.codes, plain.codes)


def test_neither_argument_is_written_to() -> None:
    weight, moments = problem(4, 160, 4)
    before = weight.copy(), moments.copy()
    solve_rows(weight, INT4, invert(torch.from_numpy(moments), "x"), name="w")
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(moments, before[1])


def test_inputs_that_are_not_finite() -> None:
    moments = torch.eye(32, dtype=torch.float64)
    moments[3, 4] = float("nan")
    with pytest.raises(
        H1ExportError, match=r'inputs of "model\.x": are not finite on the calibration text; use --method rtn'
    ):
        invert(moments, "model.x")
