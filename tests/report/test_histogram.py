"""Histograms of magnitudes, against counting by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from h1export.report.histogram import LEAST, PER_DECADE, Histogram


def test_bins_are_quarters_of_a_decade() -> None:
    assert Histogram.of(np.array([1.0, 1.7, 1.8, 10.0])) == Histogram(0, (2, 1, 0, 0, 1))
    assert Histogram.of(np.array([1e-3])) == Histogram(-12, (1,))
    assert Histogram.of(np.array([0.0, 1e-30, np.nan, np.inf])) == Histogram(LEAST, (2,))
    assert Histogram.of(np.zeros(0)) == Histogram(LEAST, ())


@given(st.lists(st.floats(1e-11, 1e3), min_size=1, max_size=50))
def test_every_value_is_in_its_bin(values: list[float]) -> None:
    found = Histogram.of(np.array(values))
    assert sum(found.counts) == len(values)
    edges = 10 ** ((found.first + np.arange(len(found.counts) + 1)) / PER_DECADE)
    for low, high, count in zip(edges[:-1], edges[1:], found.counts, strict=True):
        assert sum(low * (1 + 1e-6) <= value < high * (1 - 1e-6) for value in values) <= count
        assert sum(low * (1 - 1e-6) <= value < high * (1 + 1e-6) for value in values) >= count
    assert found.counts[0]
    assert found.counts[-1]
