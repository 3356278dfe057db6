"""CausalConv against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RunOp = Callable[..., list[Any]]

TOLERANCE = 1e-6  # of the range: a few roundings at 6e-8 each, and exp's 1e-7


def reference(inputs: dict[str, Any], offset: int) -> tuple[Any, Any]:
    """The definition in float64."""
    x, state, weight, bias, mask = (None if value is None else value.astype(np.float64) for value in inputs.values())
    taps, channels = weight.shape
    columns = x[..., offset : offset + channels] * (1 if mask is None else mask[..., None])
    all_inputs = np.concatenate([state, columns], axis=1)
    total = sum(weight[i] * all_inputs[:, i : i + x.shape[1]] for i in range(taps)) + (0 if bias is None else bias)
    return total / (1 + np.exp(-total)), all_inputs[:, x.shape[1] :]


def conv_inputs(batch: int, tokens: int, channels: int, taps: int, width: int, seed: int) -> dict[str, Any]:
    """Random inputs; rows start with 0, 1, ... pads; every third seed lacks the bias or the mask."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    pads = np.minimum(rng.integers(0, tokens + 1, batch), tokens)
    mask = (np.arange(tokens) >= pads[:, None]).astype(np.float32)
    return {
        "x": 2 * normal(batch, tokens, width),
        "state": normal(batch, taps - 1, channels),
        "weight": normal(taps, channels),
        "bias": None if seed % 3 == 0 else normal(channels),
        "mask": None if seed % 3 == 1 else mask,
    }


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 80),
    st.integers(1, 400),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(0, 999),
)
def test_any_shape(run_op: RunOp, batch: int, tokens: int, channels: int, taps: int, offset: int, seed: int) -> None:
    inputs = conv_inputs(batch, tokens, channels, taps, offset + channels + seed % 2, seed)
    for got, expected in zip(
        run_op("CausalConv", inputs, outputs=2, offset=offset), reference(inputs, offset), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * 10)


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_the_state_in_place(run_op: RunOp, run_in_place: RunOp, tokens: int) -> None:
    inputs = conv_inputs(2, tokens, 300, 4, 300, seed=2)
    expected = run_op("CausalConv", inputs, 2, offset=0)
    for got, separate in zip(run_in_place("CausalConv", inputs, 2, offset=0), expected, strict=True):
        np.testing.assert_array_equal(got, separate)


def test_values_behind_the_mask_are_never_read(run_op: RunOp) -> None:
    inputs = conv_inputs(2, 9, 40, 4, 40, seed=2)
    clean = run_op("CausalConv", inputs, outputs=2, offset=0)
    inputs["x"][inputs["mask"] == 0] = np.nan
    for got, expected in zip(run_op("CausalConv", inputs, outputs=2, offset=0), clean, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_columns_outside_the_tensor_are_an_error(run_op: RunOp) -> None:
    with pytest.raises(Exception, match="CausalConv: columns lie outside x"):
        run_op("CausalConv", conv_inputs(1, 3, 16, 4, 20, seed=0), outputs=2, offset=5)
