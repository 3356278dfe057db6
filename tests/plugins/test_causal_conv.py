"""h1::causal_conv against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.plugins import h1

Inputs = dict[str, Any]
Array = npt.NDArray[np.float64]

TOLERANCE = 2e-6  # five products and a SiLU, each rounded to float32's 6e-8
FAULT = 1e-3  # what a wrong op must exceed

CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "seq": st.integers(1, 12),
        "channels": st.integers(1, 7),
        "taps": st.integers(2, 5),
        "bias": st.booleans(),
        "pads": st.lists(st.integers(0, 14), max_size=3),
        "seed": st.integers(0, 1 << 16),
    }
)
properties = settings(deadline=None, max_examples=50, derandomize=True)


def by_definition(inputs: Inputs) -> tuple[Array, Array, Array]:
    """Return y, the state after x, and the magnitude of y's terms before they cancel."""
    x, state, weight = (inputs[name].double().numpy() for name in ("x", "state", "weight"))
    bias = np.zeros(len(weight)) if inputs["bias"] is None else inputs["bias"].double().numpy()
    taps = weight.shape[2]
    y = np.empty_like(x)
    size = np.empty_like(x)
    for b, s, c in np.ndindex(x.shape):
        history = [*state[b, c], *x[b, : s + 1, c]][-taps:]
        total = bias[c] + np.dot(weight[c, 0], history)
        y[b, s, c] = total / (1 + np.exp(-total))
        size[b, s, c] = abs(bias[c]) + np.dot(np.abs(weight[c, 0]), np.abs(history))
    after = np.concatenate([state, x.swapaxes(1, 2)], axis=2)[:, :, x.shape[1] :]
    return y, after, size


@properties
@given(case=CASES)
def test_is_the_definition(
    case: dict[str, Any], conv_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = conv_inputs(**case)
    y, state = h1.causal_conv(**inputs)
    expected, after, size = by_definition(inputs)
    assert error(y, expected, np.maximum(size, 1e-3)) < TOLERANCE  # a row of pads without a bias is all zeros
    assert np.array_equal(state.double().numpy(), after)


@properties
@given(case=CASES, cuts=st.sets(st.integers(1, 11), max_size=4))
def test_pieces_chained_by_their_states_are_the_whole(
    case: dict[str, Any], cuts: set[int], conv_inputs: Callable[..., Inputs]
) -> None:
    inputs = conv_inputs(**case)
    state = inputs["state"]
    outputs = []
    bounds = sorted({0, case["seq"], *(cut for cut in cuts if cut < case["seq"])})
    for start, stop in pairwise(bounds):
        y, state = h1.causal_conv(**inputs | {"x": inputs["x"][:, start:stop], "state": state})
        outputs.append(y)
    whole, after = h1.causal_conv(**inputs)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(state, after)


@properties
@given(case=CASES)
def test_a_padded_row_is_the_row_run_alone(case: dict[str, Any], conv_inputs: Callable[..., Inputs]) -> None:
    inputs = conv_inputs(**case)
    y, state = h1.causal_conv(**inputs)
    for row, pads in enumerate(case["pads"][: case["batch"]]):
        if pads >= case["seq"]:
            assert torch.equal(state[row], torch.zeros_like(state[row]))
            continue
        rows = slice(row, row + 1)
        alone, state_alone = h1.causal_conv(**inputs | {"x": inputs["x"][rows, pads:], "state": inputs["state"][rows]})
        torch.testing.assert_close(y[rows, pads:], alone, rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.equal(state[rows], state_alone)


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5])
def test_sequences_shorter_than_the_taps_shift_the_state(seq: int, conv_inputs: Callable[..., Inputs]) -> None:
    inputs = conv_inputs(seq=seq, taps=5)
    _, state = h1.causal_conv(**inputs)
    kept = max(0, 4 - seq)
    assert torch.equal(state[:, :, :kept], inputs["state"][:, :, 4 - kept :])
    assert torch.equal(state[:, :, kept:], inputs["x"].transpose(1, 2)[:, :, max(0, seq - 4) :])


@pytest.mark.parametrize(("dtype", "half_step"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
def test_half_precision_stays_half_precision(
    dtype: torch.dtype, half_step: float, conv_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    """y is rounded after the sum and after SiLU; the state consists of inputs, so it is exact."""
    inputs = conv_inputs(dtype=dtype)
    y, state = h1.causal_conv(**inputs)
    expected, after, size = by_definition(inputs)
    assert (y.dtype, state.dtype) == (dtype, dtype)
    assert error(y, expected, size) < 3 * half_step
    assert np.array_equal(state.double().numpy(), after)


FAULTS: dict[str, Callable[[Inputs], Inputs]] = {
    "taps reversed": lambda i: {"weight": i["weight"].flip(2)},
    "another channel's taps": lambda i: {"weight": i["weight"].roll(1, 0)},
    "no bias": lambda i: {"bias": None},
    "incoming state lost": lambda i: {"state": torch.zeros_like(i["state"])},
    "state newest first": lambda i: {"state": i["state"].flip(2)},
    "one token late": lambda i: {"x": i["x"].roll(1, 1)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_op_would_be_seen(fault: str, conv_inputs: Callable[..., Inputs], error: Callable[..., float]) -> None:
    inputs = conv_inputs()
    wrong, _ = h1.causal_conv(**inputs | FAULTS[fault](inputs))
    expected, _, size = by_definition(inputs)
    assert error(wrong, expected, size) > FAULT
