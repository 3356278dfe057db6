"""The bits that a matrix takes in integers."""

from __future__ import annotations

import pytest

from h1export.quantize.precision import INT8, Precision


@pytest.mark.parametrize(
    ("precision", "shape", "bits"),
    [
        (Precision(4, 32), (10, 64), 10 * (64 * 4 + 2 * 16)),
        (Precision(4, 128), (10, 128), 10 * (128 * 4 + 16)),
        (Precision(8, 32), (1, 96), 96 * 8 + 3 * 16),
        (INT8, (7, 96), 7 * (96 * 8 + 16)),
        (Precision(4, 64), (3, 96), 3 * (96 * 4 + 2 * 16)),  # the last group is not a whole one
    ],
)
def test_codes_and_scales_are_counted(precision: Precision, shape: tuple[int, int], bits: int) -> None:
    assert precision.stored_bits(shape) == bits
