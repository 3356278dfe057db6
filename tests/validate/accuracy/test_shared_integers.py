"""Tensors with the same integers, whatever their zero points and scales are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from h1export.model.falcon_h1.states import Array
from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.report.report import TENSORS
from h1export.validate.accuracy.shared_integers import integer_rows

CODES = np.random.default_rng(0).integers(-7, 8, (4, 64)).astype(np.int8)
TENSOR = QuantizedTensor(CODES, np.ones((4, 2), np.float16), np.ones(4, np.float32))


class Stored(dict[str, Array]):
    """Stored weights of the integers given."""

    def __init__(self, tensors: Mapping[str, QuantizedTensor]) -> None:
        super().__init__({name: tensor.unfolded() for name, tensor in tensors.items()})
        self._tensors = tensors

    def quantized(self, name: str) -> QuantizedTensor:
        return self._tensors[name]


def changed_code() -> QuantizedTensor:
    codes = CODES.copy()
    codes[3, 63] += 1
    return replace(TENSOR, codes=codes)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (TENSOR, True),
        (replace(TENSOR, scales=2 * TENSOR.scales), True),
        (replace(TENSOR, codes=CODES + np.int8(8), zeros=np.full((4, 2), 8, np.int8)), True),
        (
            replace(TENSOR, codes=CODES + np.int8(8), zeros=np.full((4, 1), 8, np.int8), scales=TENSOR.scales[:, :1]),
            True,
        ),
        (replace(TENSOR, zeros=np.ones((4, 2), np.int8)), False),
        (changed_code(), False),
    ],
    ids=["equal", "scales", "zero points", "larger groups", "other zero points", "a code"],
)
def test_two_artifacts(other: QuantizedTensor, same: bool) -> None:
    rows = integer_rows([Stored({"a": TENSOR, "b": TENSOR}), Stored({"a": TENSOR, "b": other, "c": TENSOR})])
    assert [row.figures for row in rows] == [
        {TENSORS: 2.0, "as in 2": 1.0 + same},
        {TENSORS: 3.0, "as in 1": 1.0 + same},
    ]


def test_weights_without_integers_share_nothing() -> None:
    rows = integer_rows([{"a": TENSOR.unfolded()}, Stored({"a": TENSOR})])
    assert [row.figures for row in rows] == [{TENSORS: 0.0, "as in 2": 0.0}, {TENSORS: 1.0, "as in 1": 0.0}]
