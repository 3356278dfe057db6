"""SSMScan against its recurrence in float64, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RunOp = Callable[..., list[Any]]
Case = dict[str, Any]

# of the range: some dozens of roundings at 6e-8; an output sums d_state products, a state does not
OUTPUT = 2e-6
STATE = 1e-6

CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.one_of(st.just(1), st.integers(1, 200)),
        "groups": st.sampled_from([1, 2, 4]),
        "heads_per_group": st.integers(1, 3),
        "d_head": st.sampled_from([32, 64, 128, 1, 13, 72]),
        "d_state": st.sampled_from([16, 64, 128, 256, 5]),
        "limits": st.sampled_from([(0.0, math.inf), (0.05, math.inf), (0.0, 0.2), (0.02, 0.3)]),
        "gated": st.booleans(),
        "seed": st.integers(0, 999),
    }
)


def scan_inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs and attributes: time steps from 1e-4 (slow heads) to 1, some pads at the start, offsets above 0."""
    rng = np.random.default_rng(case["seed"])
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    batch, tokens, groups, d_head, d_state = (case[name] for name in ("batch", "tokens", "groups", "d_head", "d_state"))
    heads = groups * case["heads_per_group"]
    pads = rng.integers(0, max(1, tokens // 2), batch) * (case["seed"] % 2)
    inputs = {
        "xbc": normal(batch, tokens, heads * d_head + 2 * groups * d_state),
        "dt": 0.5 * normal(batch, tokens, heads + 3),
        "A": -rng.uniform(0.5, 16, heads).astype(np.float32),
        "D": normal(heads),
        "dt_bias": np.linspace(-9, 0.5, heads).astype(np.float32),
        "state": normal(batch, heads, d_state, d_head),
        "mask": (np.arange(tokens) >= pads[:, None]).astype(np.float32),
        "gate": 2 * normal(batch, tokens, heads * d_head + 5) if case["gated"] else None,
    }
    attributes = {
        "heads": heads,
        "groups": groups,
        "d_head": d_head,
        "d_state": d_state,
        "dt_offset": 2,
        "gate_offset": 4,
    }
    return inputs, attributes | dict(zip(("dt_min", "dt_max"), case["limits"], strict=True))


def recurrence(inputs: dict[str, Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """y and the last state by definition."""
    tensors = {name: None if value is None else value.astype(np.float64) for name, value in inputs.items()}
    heads, groups, P, N = (attributes[name] for name in ("heads", "groups", "d_head", "d_state"))
    lead = tensors["xbc"].shape[:2]
    x, B, C = np.split(tensors["xbc"], np.cumsum([heads * P, groups * N]), axis=2)
    B, C = (np.repeat(part.reshape(*lead, groups, N), heads // groups, axis=2) for part in (B, C))
    x = x.reshape(*lead, heads, P)
    S = tensors["state"]
    dt = np.logaddexp(0, tensors["dt"][..., 2 : 2 + heads] + tensors["dt_bias"])
    dt = np.clip(dt, attributes["dt_min"], attributes["dt_max"]) * tensors["mask"][..., None]
    y = np.empty_like(x)
    for t in range(lead[1]):
        decay = np.exp(dt[:, t] * tensors["A"])[..., None, None]
        step = dt[:, t, :, None, None]
        S = decay * S + step * B[:, t, :, :, None] * x[:, t, :, None]
        y[:, t] = np.einsum("bhnp,bhn->bhp", S, C[:, t]) + tensors["D"][:, None] * x[:, t]
    y = y.reshape(*lead, heads * P)
    if tensors["gate"] is not None:
        gate = tensors["gate"][..., 4 : 4 + heads * P]
        y = y * gate / (1 + np.exp(-gate))
    return y, S


def error(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def part(inputs: dict[str, Any], tokens: slice, state: Any) -> dict[str, Any]:
    """The inputs of some tokens."""
    cut = {name: inputs[name][:, tokens] for name in ("xbc", "dt", "mask", "gate") if inputs[name] is not None}
    return inputs | {name: np.ascontiguousarray(value) for name, value in cut.items()} | {"state": state}


@settings(deadline=None, max_examples=40, derandomize=True)
@given(CASES)
def test_is_the_recurrence(run_op: RunOp, case: Case) -> None:
    inputs, attributes = scan_inputs(case)
    (y, state) = run_op("SSMScan", inputs, outputs=2, **attributes)
    (y64, state64) = recurrence(inputs, attributes)
    assert error(y, y64) < OUTPUT
    assert error(state, state64) < STATE


@settings(deadline=None, max_examples=10, derandomize=True)
@given(CASES, st.sets(st.integers(1, 199), max_size=4))
def test_pieces_chained_by_their_states_are_the_whole(run_op: RunOp, case: Case, cuts: set[int]) -> None:
    inputs, attributes = scan_inputs(case)
    state = inputs["state"]
    outputs = []
    for start, stop in pairwise(sorted({0, case["tokens"], *(cut for cut in cuts if cut < case["tokens"])})):
        y, state = run_op("SSMScan", part(inputs, slice(start, stop), state), outputs=2, **attributes)
        outputs.append(y)
    y64, state64 = recurrence(inputs, attributes)
    assert error(np.concatenate(outputs, axis=1), y64) < OUTPUT
    assert error(state, state64) < STATE


@pytest.mark.parametrize("tokens", [1, 70])
def test_pads_leave_the_state_bit_for_bit(run_op: RunOp, tokens: int) -> None:
    """Even where the lower limit would give every token a step, and whatever stands behind the mask."""
    case = {
        "batch": 2,
        "tokens": tokens,
        "groups": 1,
        "heads_per_group": 2,
        "d_head": 64,
        "d_state": 128,
        "gated": False,
        "seed": 1,
    }
    inputs, attributes = scan_inputs(case | {"limits": (0.05, math.inf)})
    inputs["mask"] = np.zeros_like(inputs["mask"])
    _, state = run_op("SSMScan", inputs, outputs=2, **attributes)
    np.testing.assert_array_equal(state, inputs["state"])


@pytest.mark.parametrize("tokens", [1, 130])
def test_the_state_in_place(run_op: RunOp, run_in_place: RunOp, tokens: int) -> None:
    case = {
        "batch": 2,
        "tokens": tokens,
        "groups": 1,
        "heads_per_group": 3,
        "d_head": 72,
        "d_state": 16,
        "gated": True,
        "seed": 3,
    }
    inputs, attributes = scan_inputs(case | {"limits": (0.0, math.inf)})
    expected = run_op("SSMScan", inputs, 2, **attributes)
    for got, separate in zip(run_in_place("SSMScan", inputs, 2, **attributes), expected, strict=True):
        np.testing.assert_array_equal(got, separate)


def test_slow_heads_keep_small_updates(run_op: RunOp) -> None:
    """Steps from 1e-4 on, over 2000 tokens, each head against its own range."""
    case = {
        "batch": 1,
        "tokens": 2000,
        "groups": 1,
        "heads_per_group": 4,
        "d_head": 32,
        "d_state": 16,
        "gated": False,
        "seed": 0,
    }
    inputs, attributes = scan_inputs(case | {"limits": (0.0, math.inf)})
    (y, state) = run_op("SSMScan", inputs, outputs=2, **attributes)
    (y64, state64) = recurrence(inputs, attributes)
    for head in range(4):
        columns = slice(head * 32, head * 32 + 32)
        assert error(y[..., columns], y64[..., columns]) < OUTPUT
        assert error(state[:, head], state64[:, head]) < STATE


def test_short_steps_after_long_ones(run_op: RunOp) -> None:
    """Differences of sums near -10000 decide: float32 sums, and so outputs after token 16, would be 5e-4 off there."""
    case = {
        "batch": 1,
        "tokens": 48,
        "groups": 1,
        "heads_per_group": 1,
        "d_head": 32,
        "d_state": 16,
        "gated": False,
        "seed": 0,
    }
    inputs, attributes = scan_inputs(case | {"limits": (0.0, math.inf)})
    inputs["dt"][:, :16] = 60
    inputs["dt"][:, 16:] = 2
    (y, state) = run_op("SSMScan", inputs, outputs=2, **attributes)
    (y64, state64) = recurrence(inputs, attributes)
    assert error(y[:, 20:], y64[:, 20:]) < OUTPUT
    assert error(state, state64) < STATE


def test_another_width_is_an_error(run_op: RunOp) -> None:
    case = {
        "batch": 1,
        "tokens": 2,
        "groups": 1,
        "heads_per_group": 2,
        "d_head": 8,
        "d_state": 8,
        "gated": True,
        "seed": 0,
    }
    inputs, attributes = scan_inputs(case | {"limits": (0.0, math.inf)})
    with pytest.raises(Exception, match="SSMScan: xbc must hold"):
        run_op("SSMScan", inputs, outputs=2, **attributes | {"d_state": 9})
