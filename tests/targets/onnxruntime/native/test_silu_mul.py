"""SiluMul against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RunOp = Callable[..., list[Any]]


def silu(x: Any) -> Any:
    """In float64, without overflow."""
    x = np.asarray(x, np.float64)
    return x * np.exp(-np.logaddexp(0, -x))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 300),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(0, 2**32 - 1),
)
def test_any_shape_and_offset(
    run_op: RunOp, lead: list[int], width: int, a_offset: int, gate_offset: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*lead, width + a_offset + seed % 3)).astype(np.float32)
    gate = (4 * rng.standard_normal((*lead, width + gate_offset))).astype(np.float32)
    (y,) = run_op("SiluMul", {"a": a, "gate": gate}, a_offset=a_offset, gate_offset=gate_offset, width=width)
    expected = a[..., a_offset : a_offset + width] * silu(gate[..., gate_offset : gate_offset + width])
    np.testing.assert_allclose(y, expected, rtol=4e-7, atol=1e-30)


def test_every_float_that_matters(run_op: RunOp) -> None:
    """exp, division and product round once each, to 2^-24 = 6e-8; exp adds its own 1e-7."""
    gate = np.concatenate(
        [np.linspace(-87, 87, 200_001), np.linspace(-1, 1, 100_003), [0.0, -0.0, 1e-30, 90, 1e30]]
    ).astype(np.float32)
    (y,) = run_op("SiluMul", {"a": np.ones_like(gate), "gate": gate}, a_offset=0, gate_offset=0, width=len(gate))
    np.testing.assert_allclose(y, silu(gate), rtol=3e-7)


def test_outside_the_range_of_exp(run_op: RunOp) -> None:
    gate = np.array([-1e4, -np.inf, np.inf, np.nan, -100], np.float32)
    (y,) = run_op("SiluMul", {"a": np.ones_like(gate), "gate": gate}, a_offset=0, gate_offset=0, width=len(gate))
    np.testing.assert_allclose(y[[0, 4]], 0, atol=1e-33)
    assert y[2] == np.inf
    assert np.isnan(y[3])


def test_one_tensor_as_both_inputs(run_op: RunOp) -> None:
    both = np.random.default_rng(0).standard_normal((3, 5, 48)).astype(np.float32)
    (y,) = run_op("SiluMul", {"a": both, "gate": both}, a_offset=24, gate_offset=0, width=24)
    np.testing.assert_allclose(y, both[..., 24:] * silu(both[..., :24]), rtol=4e-7, atol=1e-30)


def test_columns_outside_the_tensor_are_an_error(run_op: RunOp) -> None:
    a = np.ones((2, 8), np.float32)
    with pytest.raises(Exception, match="SiluMul: columns lie outside the tensor"):
        run_op("SiluMul", {"a": a, "gate": a}, a_offset=4, gate_offset=0, width=5)
