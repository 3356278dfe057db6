"""Attention against its definition in float64, with its cache as grown copies and as one buffer extended in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

RunOp = Callable[..., list[Any]]
Case = dict[str, Any]

OUTPUT = 2e-6  # of the range: dozens of roundings at 6e-8
OFFSETS = {"q_offset": 3, "k_offset": 1, "v_offset": 2}  # added to where q, k and v start

CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.one_of(st.just(1), st.integers(1, 200)),
        "past": st.one_of(st.just(0), st.integers(0, 1200)),
        "room": st.one_of(st.none(), st.integers(0, 50)),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3, 4, 7, 8]),
        "dim": st.sampled_from([32, 64, 128, 8, 40]),
        "seed": st.integers(0, 999),
    }
)


def attention_inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs and attributes; every second seed has pads, up to a whole row.

    ``room``: rows of the cache behind the new tokens.
    """
    rng = np.random.default_rng(case["seed"])
    batch, tokens, past, kv_heads, dim = (case[name] for name in ("batch", "tokens", "past", "kv_heads", "dim"))
    heads = kv_heads * case["group"]
    total = past + tokens
    rows = past if case["room"] is None else total + case["room"]
    pads = rng.integers(0, total + 1, batch) * (case["seed"] % 2)
    pads[0] = total if case["seed"] % 4 == 1 else pads[0]
    angles = rng.uniform(0, 6, (batch, tokens, dim // 2))
    starts = np.cumsum([0, heads * dim + 3, kv_heads * dim])  # of q, k and v
    inputs = {
        "qkv": 2 * rng.standard_normal((batch, tokens, (heads + 2 * kv_heads) * dim + 7), np.float32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "mask": (np.arange(total) >= pads[:, None]).astype(np.int64),
        "past_k": rng.standard_normal((batch, kv_heads, rows, dim), np.float32),
        "past_v": rng.standard_normal((batch, kv_heads, rows, dim), np.float32),
    }
    attributes: dict[str, Any] = {"num_heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5}
    return inputs, attributes | {name: int(start) + OFFSETS[name] for name, start in zip(OFFSETS, starts, strict=True)}


def rotate(x: Any, inputs: dict[str, Any]) -> Any:
    """Rotate [batch, tokens, heads, dim]: pairs are (i, i + dim / 2)."""
    cos, sin = (inputs[name].astype(np.float64)[:, :, None] for name in ("cos", "sin"))
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def definition(inputs: dict[str, Any], attributes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """out, and the keys and values of all tokens, [batch, kv_heads, total, dim]."""
    qkv = inputs["qkv"].astype(np.float64)
    mask = inputs["mask"] != 0
    (batch, tokens) = qkv.shape[:2]
    total = mask.shape[1]
    past = total - tokens
    dim = attributes["head_dim"]
    heads = attributes["num_heads"]
    kv_heads = attributes["kv_heads"]

    def columns(name: str, count: int) -> Any:
        return qkv[..., attributes[name] : attributes[name] + count * dim].reshape(batch, tokens, count, dim)

    new_k = rotate(columns("k_offset", kv_heads), inputs)
    new_v = columns("v_offset", kv_heads)
    keys, values = (
        np.concatenate([inputs[name][:, :, :past].astype(np.float64), new.transpose(0, 2, 1, 3)], axis=2)
        for name, new in (("past_k", new_k), ("past_v", new_v))
    )
    query = rotate(columns("q_offset", heads), inputs).reshape(batch, tokens, kv_heads, heads // kv_heads, dim)
    column = np.arange(total)
    own = np.arange(past, total)[:, None]
    visible = ((column <= own) & mask[:, None]) | (column == own)
    scores = np.einsum("btkgd,bkcd->bkgtc", query, keys) * attributes["scale"]
    scores = np.where(visible[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bkgtc,bkcd->btkgd", weights / weights.sum(-1, keepdims=True), values)
    return out.reshape(batch, tokens, heads * dim), keys, values


def compare(got: list[Any], inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Outputs within tolerance, values bit for bit."""
    out, keys, values = definition(inputs, attributes)
    total = keys.shape[2]
    np.testing.assert_allclose(got[0], out, rtol=0, atol=OUTPUT * np.abs(inputs["qkv"]).max())
    np.testing.assert_allclose(got[1][:, :, :total], keys, rtol=0, atol=OUTPUT * np.abs(keys).max())
    np.testing.assert_array_equal(got[2][:, :, :total], values.astype(np.float32))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(CASES)
def test_is_the_definition(run_op: RunOp, case: Case) -> None:
    inputs, attributes = attention_inputs(case)
    got = run_op("Attention", inputs, outputs=3, **attributes)
    assert got[1].shape[2] == max(inputs["past_k"].shape[2], inputs["mask"].shape[1])
    compare(got, inputs, attributes)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(CASES)
def test_a_buffer_bound_to_past_and_present_is_extended_in_place(run_in_place: RunOp, case: Case) -> None:
    inputs, attributes = attention_inputs(case | {"room": case["room"] or 0})
    buffers = {name: inputs[name].copy() for name in ("past_k", "past_v")}
    got = run_in_place("Attention", inputs | buffers, outputs=3, **attributes)
    compare(got, inputs, attributes)
    past = case["past"]
    total = case["past"] + case["tokens"]
    for name, present in zip(buffers, got[1:], strict=True):
        np.testing.assert_array_equal(present[:, :, :past], inputs[name][:, :, :past])
        np.testing.assert_array_equal(present[:, :, total:], inputs[name][:, :, total:])


@settings(deadline=None, max_examples=15, derandomize=True)
@given(CASES, st.integers(0, 700))
def test_one_token_does_not_depend_on_pads_or_other_rows(run_op: RunOp, case: Case, pads: int) -> None:
    """Bit for bit: a row of a padded batch is the row alone, at whatever column it begins."""
    inputs, attributes = attention_inputs(case | {"tokens": 1, "room": None, "seed": case["seed"] * 2})
    wide = dict(inputs)
    for name in ("past_k", "past_v"):
        wide[name] = np.concatenate([inputs[name][:, :, :pads] * 7, inputs[name]], axis=2)
    hidden = wide["past_k"].shape[2] - inputs["past_k"].shape[2]
    wide["mask"] = np.concatenate([np.zeros((case["batch"], hidden), np.int64), inputs["mask"]], axis=1)
    together = run_op("Attention", wide, outputs=3, **attributes)[0]
    for row in range(case["batch"]):
        alone = {name: array[row : row + 1] for name, array in inputs.items()}
        np.testing.assert_array_equal(together[row : row + 1], run_op("Attention", alone, outputs=3, **attributes)[0])


@pytest.mark.parametrize("tokens", [1, 150])
def test_large_scores_do_not_overflow(run_op: RunOp, tokens: int) -> None:
    """Scores of some thousands: a softmax that is one-hot, where exp of a score itself would be infinite."""
    case = {"batch": 1, "tokens": tokens, "past": 700, "room": None, "kv_heads": 1, "group": 4, "dim": 64, "seed": 2}
    inputs, attributes = attention_inputs(case)
    inputs["past_k"] *= 300
    out, *_ = run_op("Attention", inputs, outputs=3, **attributes)
    expected, *_ = definition(inputs, attributes)
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-3)  # a score of 5000 is 3e-4 off in float32


def test_a_width_that_vectors_do_not_divide_is_an_error(run_op: RunOp) -> None:
    case = {"batch": 1, "tokens": 2, "past": 0, "room": None, "kv_heads": 1, "group": 1, "dim": 12, "seed": 0}
    inputs, attributes = attention_inputs(case)
    with pytest.raises(Exception, match="Attention: head_dim must be a multiple of 8"):
        run_op("Attention", inputs, outputs=3, **attributes)


def test_a_cache_of_another_size_is_an_error(run_op: RunOp) -> None:
    case = {"batch": 1, "tokens": 4, "past": 6, "room": None, "kv_heads": 1, "group": 1, "dim": 8, "seed": 0}
    inputs, attributes = attention_inputs(case)
    inputs["past_k"] = inputs["past_v"] = np.zeros((1, 1, 7, 8), np.float32)
    with pytest.raises(Exception, match="Attention: past must hold the past exactly"):
        run_op("Attention", inputs, outputs=3, **attributes)
