"""Scale search: never a larger squared error than plain rounding, within the integer rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.methods.scale_search import search_rows, searched_scales
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import QuantizedTensor

PRECISIONS = (Precision(4, 32), Precision(4, 128), Precision(8, 0))


def weights(rows: int, columns: int, seed: int) -> Any:
    """Heavy tails, so that clipping pays in some blocks."""
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def block_errors(found: QuantizedTensor, weight: Any) -> Any:
    """Sum of squares, float64 [rows, groups]."""
    error = found.unfolded().astype(np.float64) - weight
    return np.square(error).reshape(len(weight), found.scales.shape[1], -1).sum(axis=2)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 6), groups=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_no_block_is_worse_than_rounded(precision: Precision, rows: int, groups: int, seed: int) -> None:
    weight = weights(rows, 128 * groups, seed)
    ones = np.ones(rows, np.float32)
    plain = quantize_rows(weight, precision, ones)
    found = search_rows(weight, precision, ones)
    assert (
        block_errors(found, weight) <= block_errors(plain, weight) * (1 + 1e-5)
    ).all()  # float32 sums choose between them
    assert np.abs(found.codes.astype(int)).max() <= precision.top
    assert (found.scales <= plain.scales).all()


def test_it_gains_on_normal_weights() -> None:
    """A tenth of the squared error or more, at 4 bits and blocks of 128, where a few weights are far out."""
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    ones = np.ones(64, np.float32)
    precision = Precision(4, 128)
    plain = quantize_rows(weight, precision, ones)
    found = search_rows(weight, precision, ones)
    assert block_errors(found, weight).sum() < 0.9 * block_errors(plain, weight).sum()


def test_what_is_important_decides() -> None:
    """One weight far out: a scale that clips it is chosen where it does not count, and never where it alone does."""
    blocks = np.full((1, 1, 32), 0.1, np.float32)
    blocks[0, 0, 5] = 1.0
    alone = np.zeros((1, 32), np.float32)
    alone[0, 5] = 1.0
    plain = np.float16(1 / 7)
    assert searched_scales(blocks, Precision(4, 32), alone, name="w")[0, 0] == plain
    assert searched_scales(blocks, Precision(4, 32), 1 - alone, name="w")[0, 0] < plain


def test_rows_do_not_influence_each_other() -> None:
    weight = weights(5, 128, 1)
    ones = np.ones(5, np.float32)
    whole = search_rows(weight, Precision(4, 32), ones)
    for row in range(5):
        alone = search_rows(weight[row : row + 1], Precision(4, 32), ones[:1])
        np.testing.assert_array_equal(alone.codes[0], whole.codes[row])
        np.testing.assert_array_equal(alone.scales[0], whole.scales[row])


def test_zeros_and_damage() -> None:
    zeros = search_rows(np.zeros((2, 64), np.float32), Precision(4, 32), np.ones(2, np.float32))
    assert not zeros.codes.any()
    weight = np.ones((1, 32), np.float32)
    weight[0, 3] = np.nan
    with pytest.raises(H1ExportError, match=r'tensor "model\.x": holds values that are not finite'):
        search_rows(weight, Precision(4, 32), np.ones(1, np.float32), name="model.x")
