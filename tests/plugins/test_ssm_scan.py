"""h1::ssm_scan against its recurrence: float64, one token, one row and one head at a time."""

from __future__ import annotations

import math
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

TOLERANCE = 2e-6  # some dozens of roundings at float32's 6e-8
DRIFT = 1e-5  # the same after 2000 steps, the state rounded in each
FAULT = 1e-3  # what a wrong op must exceed

LIMITS = st.sampled_from([(0.0, math.inf), (0.05, math.inf), (0.0, 0.2), (0.02, 0.3)])
CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "seq": st.integers(1, 40),
        "groups": st.integers(1, 3),
        "heads_per_group": st.integers(1, 3),
        "d_head": st.integers(1, 5),
        "d_state": st.integers(1, 6),
        "chunk_size": st.sampled_from([1, 2, 3, 7, 16, 40, 64]),
        "limits": LIMITS,
        "pads": st.lists(st.integers(0, 45), max_size=3),
        "seed": st.integers(0, 1 << 16),
    }
)
properties = settings(deadline=None, max_examples=50, derandomize=True)


def recurrence(inputs: Inputs, absolute: bool = False) -> tuple[Array, Array]:
    """Return y and the last state by definition.

    With ``absolute``, every term loses its sign, so that nothing cancels.
    """
    sign = np.abs if absolute else np.positive
    x, B, C, D, S = (sign(inputs[name].double().numpy()) for name in ("x", "B", "C", "D", "state"))
    A = inputs["A"].double().numpy()
    mask = inputs["mask"].double().numpy()
    dt = np.logaddexp(0, inputs["dt"].double().numpy() + inputs["dt_bias"].double().numpy())
    dt = np.clip(dt, inputs["dt_min"], inputs["dt_max"])
    y = np.empty_like(x)
    S = S.copy()
    batch, seq, heads, _ = x.shape
    for b in range(batch):
        for t in range(seq):
            for h in range(heads):
                g = h // (heads // B.shape[2])
                step = dt[b, t, h] * mask[b, t]
                S[b, h] = np.exp(step * A[h]) * S[b, h] + step * np.outer(x[b, t, h], B[b, t, g])
                y[b, t, h] = S[b, h] @ C[b, t, g] + D[h] * x[b, t, h]
    return y, S


def part(inputs: Inputs, tokens: slice, rows: slice = slice(None), **changed: Any) -> Inputs:
    """Return the inputs of some tokens of some rows."""
    cut = {name: inputs[name][rows, tokens] for name in ("x", "dt", "B", "C", "mask")}
    return inputs | cut | {"state": inputs["state"][rows]} | changed


@properties
@given(case=CASES)
def test_is_the_recurrence(
    case: dict[str, Any], scan_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = scan_inputs(**case)
    y, state = h1.ssm_scan(**inputs)
    (y64, state64) = recurrence(inputs)
    (y_size, state_size) = recurrence(inputs, absolute=True)
    assert error(y, y64, y_size) < TOLERANCE
    assert error(state, state64, state_size) < TOLERANCE
    assert state.dtype == torch.float32


@properties
@given(case=CASES, cuts=st.sets(st.integers(1, 39), max_size=6))
def test_pieces_chained_by_their_states_are_the_whole(
    case: dict[str, Any], cuts: set[int], scan_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = scan_inputs(**case)
    state = inputs["state"]
    outputs = []
    bounds = sorted({0, case["seq"], *(cut for cut in cuts if cut < case["seq"])})
    for start, stop in pairwise(bounds):
        y, state = h1.ssm_scan(**part(inputs, slice(start, stop), state=state))
        outputs.append(y)
    (y64, state64) = recurrence(inputs)
    (y_size, state_size) = recurrence(inputs, absolute=True)
    assert error(torch.cat(outputs, dim=1), y64, y_size) < TOLERANCE
    assert error(state, state64, state_size) < TOLERANCE


@properties
@given(case=CASES)
def test_a_padded_row_is_the_row_run_alone(
    case: dict[str, Any], scan_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = scan_inputs(**case)
    y, state = h1.ssm_scan(**inputs)
    size, state_size = recurrence(inputs, absolute=True)
    for row, pads in enumerate(case["seq"] - inputs["mask"].sum(1).long()):
        rows = slice(row, row + 1)
        if pads == case["seq"]:
            assert torch.equal(state[rows], inputs["state"][rows])
            continue
        alone, state_alone = h1.ssm_scan(**part(inputs, slice(int(pads), None), rows))
        assert error(y[rows, pads:], alone.double().numpy(), size) < TOLERANCE
        assert error(state[rows], state_alone.double().numpy(), state_size) < TOLERANCE


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.05, math.inf)])
def test_pads_leave_the_state_bit_for_bit(limits: tuple[float, float], scan_inputs: Callable[..., Inputs]) -> None:
    """Pads leave the state unchanged even if the lower limit would give every token a dt."""
    inputs = scan_inputs(pads=(13, 13), limits=limits)
    _, state = h1.ssm_scan(**inputs)
    assert torch.equal(state, inputs["state"])
    assert state.data_ptr() != inputs["state"].data_ptr()


# softplus(bias) is the head's time step: from 1e-4, where a narrow state loses every update, to 1
SLOW = {"batch": 1, "seq": 2000, "groups": 1, "heads_per_group": 4, "d_head": 2, "d_state": 4, "chunk_size": 128}


def slow_heads(scan_inputs: Callable[..., Inputs]) -> Inputs:
    inputs = scan_inputs(**SLOW)
    bias = torch.log(torch.expm1(torch.tensor([1e-4, 1e-3, 1e-2, 1.0])))
    return inputs | {"dt": inputs["dt"] * 0.1, "dt_bias": bias, "A": -torch.ones(4), "D": torch.zeros(4)}


def worst_head(actual: torch.Tensor, expected: Array) -> float:
    """Return the largest deviation of a head's state, divided by that head's own range."""
    difference = np.abs(actual.double().numpy() - expected).max(axis=(0, 2, 3))
    return float((difference / np.ptp(expected, axis=(0, 2, 3))).max())


def single_steps(inputs: Inputs, narrow: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the state after all tokens, one call per token, with ``narrow`` applied between calls."""
    state: torch.Tensor = inputs["state"]
    for token in range(inputs["x"].shape[1]):
        _, state = h1.ssm_scan(**part(inputs, slice(token, token + 1), state=narrow(state)))
    return state


def test_slow_heads_do_not_drift_in_2000_steps(scan_inputs: Callable[..., Inputs]) -> None:
    inputs = slow_heads(scan_inputs)
    _, expected = recurrence(inputs)
    _, state = h1.ssm_scan(**inputs)
    assert worst_head(state, expected) < DRIFT
    assert worst_head(single_steps(inputs, narrow=lambda state: state), expected) < DRIFT


def test_a_half_precision_state_would_drift(scan_inputs: Callable[..., Inputs]) -> None:
    inputs = slow_heads(scan_inputs)
    _, expected = recurrence(inputs)
    assert worst_head(single_steps(inputs, narrow=lambda state: state.half().float()), expected) > 100 * DRIFT


@pytest.mark.parametrize(("dtype", "half_step"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
def test_half_precision_inputs_are_computed_in_float32(
    dtype: torch.dtype, half_step: float, scan_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    """y only has the error of its own rounding; the state is float32 and as exact as with float32 inputs."""
    inputs = scan_inputs(dtype=dtype, pads=(3,))
    y, state = h1.ssm_scan(**inputs)
    (y64, state64) = recurrence(inputs)
    (_, state_size) = recurrence(inputs, absolute=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert error(y, y64) < 1.1 * half_step
    assert error(state, state64, state_size) < TOLERANCE


def _interleaved_groups(inputs: Inputs) -> Inputs:
    """Let every head read group head % groups instead of head // heads_per_group."""
    heads = torch.arange(inputs["x"].shape[2]) % inputs["B"].shape[2]
    return {"B": inputs["B"][:, :, heads], "C": inputs["C"][:, :, heads]}


FAULTS: dict[str, Callable[[Inputs], Inputs]] = {
    "B and C swapped": lambda i: {"B": i["C"], "C": i["B"]},
    "groups interleaved": _interleaved_groups,
    "another head's decay": lambda i: {"A": i["A"].roll(1)},
    "no skip": lambda i: {"D": torch.zeros_like(i["D"])},
    "no dt bias": lambda i: {"dt_bias": torch.zeros_like(i["dt_bias"])},
    "no lower limit": lambda i: {"dt_min": 0.0},
    "no upper limit": lambda i: {"dt_max": math.inf},
    "mask ignored": lambda i: {"mask": torch.ones_like(i["mask"])},
    "incoming state lost": lambda i: {"state": torch.zeros_like(i["state"])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_op_would_be_seen(fault: str, scan_inputs: Callable[..., Inputs], error: Callable[..., float]) -> None:
    inputs = scan_inputs(limits=(0.02, 0.3), pads=(4,))
    wrong, _ = h1.ssm_scan(**inputs | FAULTS[fault](inputs))
    expected, _ = recurrence(inputs)
    assert error(wrong, expected, recurrence(inputs, absolute=True)[0]) > FAULT
