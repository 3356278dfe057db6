"""GPTQ against the textbook: one column at a time, with the inverse of the moments that are left computed anew in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.core.quant import Precision, QuantizedTensor, quantize_rows, search_rows
from h1export.core.quant.gptq import DAMPING, LAZY, invert, solve_rows
from h1export.errors import H1ExportError

INT4 = Precision(4, 32)


def problem(rows: int, columns: int, seed: int) -> tuple[Any, Any]:
    """A weight and the moments, float64 [columns, columns], of inputs that are mixed from half as many sources, and of unequal size."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(4 * columns, columns // 2)) @ rng.normal(size=(columns // 2, columns))
    inputs = (mixed + 0.3 * rng.normal(size=mixed.shape)) * np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)).astype(np.float32), inputs.T @ inputs


def damage(found: QuantizedTensor, weight: Any, moments: Any) -> Any:
    """What rounding does to the product's outputs, squared, a row: e H e^T."""
    error = found.unfolded().astype(np.float64) - weight
    return np.einsum("rc,cd,rd->r", error, moments, error)


def textbook(weight: Any, moments: Any, scales: Any, width: int, top: int) -> Any:
    """Codes [rows, columns]: optimal brain compression's update, w_F += -(w_q - quant(w_q)) / [H_F^-1]_qq (H_F^-1)_:,q."""
    moments = moments + DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    left = list(np.argsort(-np.diag(moments), kind="stable"))
    rest, codes = weight.astype(np.float64), np.zeros(weight.shape, int)
    while left:
        inverse, column = np.linalg.inv(moments[np.ix_(left, left)]), left[0]
        scale = scales[:, column // width].astype(np.float64)
        codes[:, column] = np.clip(np.rint(rest[:, column] / scale), -top, top)
        error = (rest[:, column] - codes[:, column] * scale) / inverse[0, 0]
        rest[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("precision", [INT4, Precision(4, 64), Precision(8, 0)], ids=str)
def test_it_is_the_textbooks(precision: Precision) -> None:
    """Over more columns than a lazy block, so that both ways of correction take part. float32 may decide a tie the other way."""
    weight, moments = problem(8, 2 * LAZY, 0)
    found = solve_rows(weight, precision, invert(torch.from_numpy(moments), "x"), "w")
    truth = textbook(weight, moments, found.scales, precision.columns_per_scale(2 * LAZY), precision.top)
    same = (found.codes == truth).all(axis=1)
    assert same.mean() >= 0.75
    other = QuantizedTensor(truth.astype(np.int8), found.scales, found.multiplier)
    ratio = damage(found, weight, moments) / damage(other, weight, moments)
    assert ratio[same] == pytest.approx(1)
    assert ratio == pytest.approx(1, abs=0.15)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=st.integers(1, 8), groups=st.integers(1, 6), seed=st.integers(0, 1 << 30))
def test_it_beats_rounding_where_inputs_are_mixed(rows: int, groups: int, seed: int) -> None:
    weight, moments = problem(8 + rows, 32 * groups, seed)
    found = solve_rows(weight, INT4, invert(torch.from_numpy(moments), "x"), "w")
    plain = quantize_rows(weight, INT4, np.ones(8 + rows, np.float32))
    assert damage(found, weight, moments).sum() < 0.8 * damage(plain, weight, moments).sum()
    assert np.abs(found.codes.astype(int)).max() <= INT4.top


def test_unmixed_inputs_leave_nothing_to_make_up_for() -> None:
    """Moments that are the identity: every column is rounded as the search does it."""
    weight = np.random.default_rng(3).normal(size=(6, 192)).astype(np.float32)
    found = solve_rows(weight, INT4, invert(torch.eye(192, dtype=torch.float64), "x"), "w")
    searched = search_rows(weight, INT4, np.ones(6, np.float32))
    np.testing.assert_array_equal(found.codes, searched.codes)
    np.testing.assert_array_equal(found.scales, searched.scales)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e8])
def test_the_size_of_the_moments_does_not_matter(factor: float) -> None:
    """So one set of moments serves products whose inputs differ by a multiplier."""
    weight, moments = problem(4, 96, 5)
    one, other = (solve_rows(weight, INT4, invert(torch.from_numpy(moments * size), "x"), "w") for size in (1.0, factor))
    assert (one.codes == other.codes).mean() > 0.99  # another power of two would change no bit


def test_rows_do_not_influence_each_other() -> None:
    weight, moments = problem(7, 160, 1)
    inverse = invert(torch.from_numpy(moments), "x")
    whole = solve_rows(weight, INT4, inverse, "w")
    parts = [solve_rows(weight[rows], INT4, inverse, "w") for rows in (slice(0, 3), slice(3, 7))]
    assert (np.concatenate([part.codes for part in parts]) == whole.codes).mean() > 0.99  # products of other shapes sum in another order
    np.testing.assert_array_equal(np.concatenate([part.scales for part in parts]), whole.scales)


def test_inputs_that_are_always_zero() -> None:
    """One such column costs the others nothing; where all are so, nothing is known, and the search's integers are left."""
    weight, moments = problem(4, 64, 2)
    moments[3], moments[:, 3] = 0, 0
    found, plain = solve_rows(weight, INT4, invert(torch.from_numpy(moments), "x"), "w"), search_rows(weight, INT4, np.ones(4, np.float32))
    assert damage(found, weight, moments).sum() < 0.8 * damage(plain, weight, moments).sum()
    blind = solve_rows(weight, INT4, invert(torch.zeros(64, 64, dtype=torch.float64), "x"), "w")
    np.testing.assert_array_equal(blind.codes, plain.codes)


def test_neither_argument_is_written_to() -> None:
    weight, moments = problem(4, 160, 4)
    before = weight.copy(), moments.copy()
    solve_rows(weight, INT4, invert(torch.from_numpy(moments), "x"), "w")
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(moments, before[1])


def test_inputs_that_are_not_finite() -> None:
    moments = torch.eye(32, dtype=torch.float64)
    moments[3, 4] = float("nan")
    with pytest.raises(H1ExportError, match=r'inputs of "model\.x": are not finite on the calibration text; use --method rtn'):
        invert(moments, "model.x")
