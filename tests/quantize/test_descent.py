"""Coordinate descent of codes, against its definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.quantize.methods import descent
from h1export.quantize.methods.descent import LAZY_COLUMNS, descended

WIDTH = 16


def problem(rows: int, groups: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Returns a weight, codes at random, scales of which some are negative or 0, and moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    columns = groups * WIDTH
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    codes = rng.integers(-7, 8, (rows, columns)).astype(np.int8)
    scales = rng.uniform(0.1, 0.4, (rows, groups)).astype(np.float32) * rng.choice([1, 1, 1, -1, 0], (rows, groups))
    inputs = rng.normal(size=(2 * columns, columns)) @ rng.normal(size=(columns, columns)) + rng.normal(size=columns)
    moments = inputs.T @ inputs / len(inputs)
    return weight, codes, scales.astype(np.float32), moments.astype(np.float32)


def damage(codes: Any, weight: Any, scales: Any, moments: Any) -> Any:
    """The squared error of the outputs, a row."""
    error = codes * scales.astype(np.float64).repeat(WIDTH, 1) - weight
    return np.einsum("rc,cd,rd->r", error, moments.astype(np.float64), error)


def moved(codes: Any, weight: Any, scales: Any, *, moments: Any, limits: tuple[int, int]) -> Any:
    """What ``descended`` does, for NumPy's arrays."""
    arrays = map(torch.from_numpy, (weight, codes, scales))
    found = descended(*arrays, moments=torch.from_numpy(moments), lowest=limits[0], highest=limits[1])
    return found.numpy()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 2 * LAZY_COLUMNS // WIDTH + 1), st.integers(0, 2**32 - 1), st.booleans())
def test_no_row_gets_worse_and_codes_stay_inside(rows: int, groups: int, seed: int, signed: bool) -> None:
    weight, codes, scales, moments = problem(rows, groups, seed)
    limits = (-7, 7) if signed else (-8, 7)
    found = moved(codes, weight, scales, moments=moments, limits=limits)
    before, after = (damage(one, weight, scales, moments) for one in (codes, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.5 * before.sum() or not scales.any()  # random codes are far from the best
    assert found.min() >= limits[0]
    assert found.max() <= limits[1]


def test_in_the_end_no_code_alone_can_be_better(monkeypatch: Any) -> None:
    """There are more columns than a block has, so that moves of one block reach the others."""
    monkeypatch.setattr(descent, "SWEEPS", 60)
    weight, codes, scales, moments = problem(3, LAZY_COLUMNS // WIDTH + 3, 0)
    found = moved(codes, weight, scales, moments=moments, limits=(-7, 7))
    least = damage(found, weight, scales, moments)
    for column in range(found.shape[1]):
        for step in (-1, 1):
            other = found.astype(int)
            other[:, column] = np.clip(other[:, column] + step, -7, 7)
            assert (damage(other, weight, scales, moments) >= least * (1 - 1e-5)).all()


def test_rows_do_not_influence_each_other() -> None:
    weight, codes, scales, moments = problem(6, 5, 1)
    whole = moved(codes, weight, scales, moments=moments, limits=(-7, 7))
    for row in range(6):
        one = np.s_[row : row + 1]
        np.testing.assert_array_equal(
            moved(codes[one], weight[one], scales[one], moments=moments, limits=(-7, 7)), whole[one]
        )
