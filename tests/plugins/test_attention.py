"""h1::attention against softmax attention with explicit rotary embedding, in float64."""

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
from transformers import FalconH1Config
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RotaryEmbedding

from h1export.plugins import h1

Inputs = dict[str, Any]
Array = npt.NDArray[np.float64]

TOLERANCE = 2e-6  # some dozens of roundings at float32's 6e-8
PER_POSITION = (
    2.0**-21
)  # an angle is position x frequency in float32, as the model was trained: both factors and the product round
FAULT = 1e-3  # what a wrong op must exceed

CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "seq": st.integers(1, 10),
        "past": st.one_of(st.just(0), st.integers(1, 12)),
        "kv_heads": st.integers(1, 3),
        "heads_per_kv": st.integers(1, 4),
        "dim": st.sampled_from([2, 4, 6, 16]),
        "first_position": st.sampled_from([0, 0, 1000, 99_980]),
        "rope_theta": st.sampled_from([1e4, 1e11]),
        "pads": st.lists(st.integers(0, 24), max_size=3),
        "seed": st.integers(0, 1 << 16),
    }
)
properties = settings(deadline=None, max_examples=50, derandomize=True)


def exact_angles(positions: torch.Tensor, dim: int, theta: float) -> Array:
    return positions.numpy()[..., None] * theta ** (-np.arange(0, dim, 2) / dim)


def model_angles(positions: torch.Tensor, dim: int, theta: float) -> Array:
    """Return the angles as transformers' FalconH1 computes them, in float32."""
    rope = {"rope_type": "default", "rope_theta": theta}
    frequencies = FalconH1RotaryEmbedding(FalconH1Config(head_dim=dim, rope_parameters=rope)).inv_freq
    return (positions[..., None].float() * frequencies).double().numpy()


def rotated(x: Array, angles: Array) -> Array:
    """Rotate x [batch, seq, heads, dim]; components i and i + dim / 2 are one complex number."""
    half = x.shape[3] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=3)


def by_definition(inputs: Inputs, angles_of: Callable[..., Array] = exact_angles) -> tuple[Array, Array, Array]:
    """Return out, keys and values, computed one query head of one token at a time."""
    q, k, v, past_k, past_v = (inputs[name].double().numpy() for name in ("q", "k", "v", "past_k", "past_v"))
    angles = angles_of(inputs["positions"], q.shape[3], inputs["rope_theta"])
    mask = inputs["mask"].numpy()
    keys = np.concatenate([past_k, rotated(k, angles).swapaxes(1, 2)], axis=2)
    values = np.concatenate([past_v, v.swapaxes(1, 2)], axis=2)
    query = rotated(q, angles)
    out = np.empty_like(q)
    past = past_k.shape[2]
    for b, s, h in np.ndindex(q.shape[:3]):
        own = past + s
        kv = h // (q.shape[2] // k.shape[2])
        columns = [column for column in range(own + 1) if mask[b, column] or column == own]
        weights = np.exp(keys[b, kv, columns] @ query[b, s, h] / np.sqrt(q.shape[3]))
        out[b, s, h] = weights @ values[b, kv, columns] / weights.sum()
    return out, keys, values


@properties
@given(case=CASES)
def test_is_softmax_attention(
    case: dict[str, Any], attention_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = attention_inputs(**case)
    out, keys, values = h1.attention(**inputs)
    out64, keys64, values64 = by_definition(inputs)
    tolerance = TOLERANCE + PER_POSITION * int(inputs["positions"].max())
    magnitude = np.abs(values64).max(keepdims=True)  # a mean of values may cancel to nothing
    assert error(out, out64, magnitude) < tolerance
    assert error(keys, keys64) < tolerance
    assert np.array_equal(values.double().numpy(), values64)


@pytest.mark.parametrize("theta", [1e4, 1e11])
@pytest.mark.parametrize("position", [99_990, 262_130])
def test_angles_are_the_models_even_at_long_positions(
    position: int, theta: float, attention_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = attention_inputs(first_position=position, rope_theta=theta, dim=64)
    out, keys, _ = h1.attention(**inputs)
    out64, keys64, _ = by_definition(inputs, model_angles)
    assert error(keys, keys64) < TOLERANCE
    assert error(out, out64) < TOLERANCE


@properties
@given(case=CASES, cuts=st.sets(st.integers(1, 9), max_size=4))
def test_pieces_chained_by_their_cache_are_the_whole(
    case: dict[str, Any], cuts: set[int], attention_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = attention_inputs(**case)
    keys = inputs["past_k"]
    values = inputs["past_v"]
    outputs = []
    bounds = sorted({0, case["seq"], *(cut for cut in cuts if cut < case["seq"])})
    for start, stop in pairwise(bounds):
        part = {name: inputs[name][:, start:stop] for name in ("q", "k", "v", "positions")}
        mask = inputs["mask"][:, : case["past"] + stop]
        out, keys, values = h1.attention(**inputs | part | {"past_k": keys, "past_v": values, "mask": mask})
        outputs.append(out)
    whole, whole_keys, whole_values = h1.attention(**inputs)
    magnitude = whole_values.double().abs().numpy()
    assert error(torch.cat(outputs, dim=1), whole.double().numpy(), magnitude) < TOLERANCE
    assert error(keys, whole_keys.double().numpy()) < TOLERANCE
    assert torch.equal(values, whole_values)


@properties
@given(case=CASES)
def test_a_padded_row_is_the_row_run_alone(
    case: dict[str, Any], attention_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = attention_inputs(**case)
    out, _, values = h1.attention(**inputs)
    assert out.isfinite().all()
    for row, pads in enumerate(case["pads"][: case["batch"]]):
        kept = max(0, case["past"] - pads)
        dropped = max(0, pads - case["past"])
        if dropped >= case["seq"]:
            continue
        part = {name: inputs[name][row : row + 1, dropped:] for name in ("q", "k", "v", "positions")}
        part |= {name: inputs[name][row : row + 1, :, case["past"] - kept :] for name in ("past_k", "past_v")}
        alone, _, _ = h1.attention(**inputs | part | {"mask": inputs["mask"][row : row + 1, pads:]})
        assert error(out[row : row + 1, dropped:], alone.double().numpy(), values.double().abs().numpy()) < TOLERANCE


def test_a_token_without_any_real_column_sees_itself(attention_inputs: Callable[..., Inputs]) -> None:
    inputs = attention_inputs(batch=2, pads=(9, 0))
    out, _, _ = h1.attention(**inputs)
    torch.testing.assert_close(out[0], inputs["v"][0].repeat_interleave(2, dim=1), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("dtype", "half_step"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
def test_half_precision_stays_half_precision(
    dtype: torch.dtype, half_step: float, attention_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    """Values are rounded after rotation (twice), softmax and product.

    A score of a few units carries its rounding into the exponent.
    """
    inputs = attention_inputs(dtype=dtype, pads=(3,))
    out, keys, values = h1.attention(**inputs)
    out64, keys64, values64 = by_definition(inputs)
    assert (out.dtype, keys.dtype, values.dtype) == (dtype, dtype, dtype)
    assert error(keys, keys64) < 4 * half_step
    assert error(out, out64) < 16 * half_step
    assert np.array_equal(values.double().numpy(), values64)


def _interleaved_heads(inputs: Inputs) -> Inputs:
    """Let query head h read kv head h % kv_heads, by reordering the queries."""
    groups = inputs["k"].shape[2]
    return {"q": inputs["q"].unflatten(2, (-1, groups)).transpose(2, 3).flatten(2, 3)}


def _interleaved_pairs(inputs: Inputs) -> Inputs:
    """Use the rotary pairs (2i, 2i + 1) instead of (i, i + dim / 2)."""
    return {name: inputs[name].unflatten(3, (-1, 2)).transpose(3, 4).flatten(3, 4) for name in ("q", "k")}


FAULTS: dict[str, Callable[[Inputs], Inputs]] = {
    "wrong theta": lambda i: {"rope_theta": 1e11},
    "positions one too high": lambda i: {"positions": i["positions"] + 1},
    "positions count pads": lambda i: {"positions": torch.arange(4, 9).expand(2, 5)},
    "mask ignored": lambda i: {"mask": torch.ones_like(i["mask"])},
    "past keys lost": lambda i: {"past_k": torch.zeros_like(i["past_k"])},
    "past values lost": lambda i: {"past_v": torch.zeros_like(i["past_v"])},
    "kv heads interleaved": _interleaved_heads,
    "rotary pairs interleaved": _interleaved_pairs,
    "scale twice": lambda i: {"q": i["q"] * i["q"].shape[3] ** -0.5},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_op_would_be_seen(
    fault: str, attention_inputs: Callable[..., Inputs], error: Callable[..., float]
) -> None:
    inputs = attention_inputs(pads=(2, 0))
    wrong, _, _ = h1.attention(**inputs | FAULTS[fault](inputs))
    assert error(wrong, by_definition(inputs)[0]) > FAULT
