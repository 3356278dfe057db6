"""Attention against its definition in float64, with its cache as grown copies and as one buffer extended in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.targets.onnxruntime import int8_rows

RunOp = Callable[..., list[Any]]
Case = dict[str, Any]

OUTPUT = 2e-6  # of the range: dozens of roundings at 6e-8
OFFSETS = {"q_offset": 3, "k_offset": 1, "v_offset": 2}  # added to where q, k and v start


def stored(numbers: Any, cache: Any) -> Any:
    """Keys or values as a cache of this dtype has them."""
    return int8_rows.encode(np.float32(numbers)) if cache == np.int8 else numbers.astype(cache)


def read(cache: Any) -> Any:
    """The numbers of a cache, float64."""
    return (int8_rows.decode(cache) if cache.dtype == np.int8 else cache).astype(np.float64)


def fitting(case: Case) -> Case:
    """The case with heads that the dtype of the cache allows."""
    return case | {"dim": 96} if case["cache"] == np.int8 and case["dim"] % int8_rows.BLOCK else case


CASES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.one_of(st.just(1), st.integers(1, 200)),
        "past": st.one_of(st.just(0), st.integers(0, 1200)),
        "room": st.one_of(st.none(), st.integers(0, 50)),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3, 4, 7, 8]),
        "dim": st.sampled_from([32, 64, 128, 8, 40]),
        "cache": st.sampled_from([np.float32, np.float16, np.int8]),
        "seed": st.integers(0, 999),
    }
).map(fitting)


def attention_inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs and attributes; every second seed has pads, up to a whole row.

    ``room``: rows of the cache behind the new tokens. ``cache``: the dtype of keys and values.
    """
    rng = np.random.default_rng(case["seed"])
    batch, tokens, past, kv_heads, dim = (case[name] for name in ("batch", "tokens", "past", "kv_heads", "dim"))
    heads = kv_heads * case["group"]
    cache = case.get("cache", np.float32)
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
        "past_k": stored(rng.standard_normal((batch, kv_heads, rows, dim), np.float32), cache),
        "past_v": stored(rng.standard_normal((batch, kv_heads, rows, dim), np.float32), cache),
    }
    attributes: dict[str, Any] = {"num_heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5}
    return inputs, attributes | {name: int(start) + OFFSETS[name] for name, start in zip(OFFSETS, starts, strict=True)}


def rotate(x: Any, inputs: dict[str, Any]) -> Any:
    """Rotate [batch, tokens, heads, dim]: pairs are (i, i + dim / 2)."""
    cos, sin = (inputs[name].astype(np.float64)[:, :, None] for name in ("cos", "sin"))
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def new_tokens(inputs: dict[str, Any], attributes: dict[str, Any], name: str) -> Any:
    """The columns of q, k or v as [batch, tokens, heads, dim], queries and keys rotated."""
    count = attributes["num_heads" if name == "q" else "kv_heads"]
    dim = attributes["head_dim"]
    start = attributes[f"{name}_offset"]
    qkv = inputs["qkv"].astype(np.float64)
    columns = qkv[..., start : start + count * dim].reshape(*qkv.shape[:2], count, dim)
    return columns if name == "v" else rotate(columns, inputs)


def expected_cache(inputs: dict[str, Any], attributes: dict[str, Any], name: str) -> Any:
    """The keys or values of all tokens, [batch, kv_heads, total, dim], the new ones not rounded."""
    new = new_tokens(inputs, attributes, name).transpose(0, 2, 1, 3)
    past = inputs["mask"].shape[1] - new.shape[2]
    return np.concatenate([read(inputs[f"past_{name}"][:, :, :past]), new], axis=2)


def scores_of(inputs: dict[str, Any], attributes: dict[str, Any], keys: Any) -> Any:
    """The scores of these keys of all tokens, [batch, kv_heads, group, tokens, total]; -inf where they do not count."""
    mask = inputs["mask"] != 0
    (batch, tokens) = inputs["qkv"].shape[:2]
    total = mask.shape[1]
    past = total - tokens
    kv_heads = attributes["kv_heads"]
    query = new_tokens(inputs, attributes, "q").reshape(batch, tokens, kv_heads, -1, attributes["head_dim"])
    column = np.arange(total)
    own = np.arange(past, total)[:, None]
    visible = ((column <= own) & mask[:, None]) | (column == own)
    scores = np.einsum("btkgd,bkcd->bkgtc", query, keys) * attributes["scale"]
    return np.where(visible[:, None, None], scores, -np.inf)


def average(scores: Any, values: Any) -> Any:
    """The output for these scores of these values of all tokens."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bkgtc,bkcd->btkgd", weights / weights.sum(-1, keepdims=True), values)
    return out.reshape(*out.shape[:2], -1)


def definition(inputs: dict[str, Any], attributes: dict[str, Any], keys: Any, values: Any) -> Any:
    """The output over these keys and values of all tokens."""
    return average(scores_of(inputs, attributes, keys), values)


def compare(got: list[Any], inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    """The past and new values bit for bit; new keys, and what is computed of the cache as it is, within tolerance."""
    total = inputs["mask"].shape[1]
    dtype = inputs["past_k"].dtype
    assert got[1].dtype == got[2].dtype == dtype
    found_keys, found_values = (array[:, :, :total] for array in got[1:])
    keys, values = (expected_cache(inputs, attributes, name) for name in ("k", "v"))
    np.testing.assert_array_equal(found_values, stored(values.astype(np.float32), dtype))
    past = total - inputs["qkv"].shape[1]
    np.testing.assert_array_equal(found_keys[:, :, :past], inputs["past_k"][:, :, :past])
    rounding = roundings(found_keys[:, :, past:])
    allowed = OUTPUT * np.abs(keys).max(initial=0) + rounding
    assert (np.abs(read(found_keys) - keys)[:, :, past:] <= allowed).all()
    scores = scores_of(inputs, attributes, read(found_keys))
    # a score is a sum of float32 and is rounded too, and its error is a weight's relative one
    of_scores = np.finfo(np.float32).eps * np.abs(scores, where=np.isfinite(scores), out=np.zeros_like(scores)).max()
    allowed = OUTPUT * np.abs(inputs["qkv"]).max() + of_scores * np.abs(read(found_values)).max()
    np.testing.assert_allclose(got[0], average(scores, read(found_values)), rtol=0, atol=allowed)


def roundings(keys: Any) -> Any:
    """How far each number of new keys may be from what was rounded; in int8 the largest code of a block is checked."""
    if keys.dtype == np.float16:
        return np.spacing(np.abs(keys)).astype(np.float64) / 2
    if keys.dtype != np.int8:
        return 0
    dim = int8_rows.columns_of(keys.shape[-1])
    blocks = np.abs(keys[..., :dim].astype(int)).reshape(*keys.shape[:-1], dim // int8_rows.BLOCK, int8_rows.BLOCK)
    assert (blocks.max(-1) == int8_rows.TOP).all()
    ones = keys.copy()
    ones[..., :dim] = 1
    return read(ones) * 0.501  # a division in float32 may end on the other side of a middle


@settings(deadline=None, max_examples=45, derandomize=True)
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
        others = stored(7 * read(inputs[name][:, :, :pads]), case["cache"])
        wide[name] = np.concatenate([others, inputs[name]], axis=2)
    hidden = wide["past_k"].shape[2] - inputs["past_k"].shape[2]
    wide["mask"] = np.concatenate([np.zeros((case["batch"], hidden), np.int64), inputs["mask"]], axis=1)
    together = run_op("Attention", wide, outputs=3, **attributes)[0]
    for row in range(case["batch"]):
        alone = {name: array[row : row + 1] for name, array in inputs.items()}
        np.testing.assert_array_equal(together[row : row + 1], run_op("Attention", alone, outputs=3, **attributes)[0])


@pytest.mark.parametrize("cache", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("tokens", [1, 150])
def test_large_scores_do_not_overflow(run_op: RunOp, tokens: int, cache: Any) -> None:
    """Scores of some thousands: a softmax that is one-hot, where exp of a score itself would be infinite."""
    case = {"batch": 1, "tokens": tokens, "past": 700, "room": None, "kv_heads": 1, "group": 4, "dim": 64, "seed": 2}
    inputs, attributes = attention_inputs(case | {"cache": cache})
    inputs["past_k"] = stored(300 * read(inputs["past_k"]), cache)
    out, keys, values = run_op("Attention", inputs, outputs=3, **attributes)
    expected = definition(inputs, attributes, read(keys), read(values))
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-3)  # a score of 5000 is 3e-4 off in float32


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_what_an_earlier_call_has_left_is_not_read(run_op: RunOp, group: int) -> None:
    """NaN in all of the memory that a thread keeps, and then a context of fewer keys than a vector has."""
    case = {"batch": 1, "tokens": 1, "past": 70, "room": None, "kv_heads": 1, "group": group, "dim": 32, "seed": 0}
    inputs, attributes = attention_inputs(case)
    inputs["qkv"][:] = np.nan
    assert np.isnan(run_op("Attention", inputs, outputs=3, threads=1, **attributes)[0]).all()
    inputs, attributes = attention_inputs(case | {"past": 0})
    compare(run_op("Attention", inputs, outputs=3, threads=1, **attributes), inputs, attributes)


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


def test_every_half_is_read_and_every_float_rounded_as_numpy_does(run_op: RunOp) -> None:
    """Values pass through one token's attention to itself alone: numbers of every size, halfway cases, infinities."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)].astype(np.float32)
    middles = (finite[:-1] + finite[1:]) / 2
    numbers = np.concatenate([finite, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf), [1e6, -1e6]])
    numbers = np.resize(numbers.astype(np.float32), (1, numbers.size // 128 + 1, 128))
    tokens = numbers.shape[1]
    case = {"batch": 1, "tokens": tokens, "past": 0, "room": None, "kv_heads": 1, "group": 1, "dim": 128, "seed": 0}
    inputs, attributes = attention_inputs(case | {"cache": np.float16})
    start = attributes["v_offset"]
    inputs["qkv"][..., start : start + 128] = numbers
    *_, values = run_op("Attention", inputs, outputs=3, **attributes)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(values[:, 0], numbers.astype(np.float16))
    # two tokens with one value and equal scores: their mean is the value
    values = values[0, 0, np.isfinite(values[0, 0]).all(-1)]
    alone = {"qkv": np.zeros((len(values), 1, inputs["qkv"].shape[2]), np.float32)}
    alone |= {name: np.zeros((len(values), 1, 64), np.float32) for name in ("cos", "sin")}
    alone |= {"mask": np.array([[1, 0]] * len(values)), "past_k": np.zeros((len(values), 1, 2, 128), np.float16)}
    alone["qkv"][:, 0, attributes["k_offset"] : attributes["k_offset"] + 128] = 1
    alone["past_v"] = np.stack([values, values], axis=1)[:, None]
    alone["qkv"][:, 0, start : start + 128] = values
    out, *_ = run_op("Attention", alone, outputs=3, **attributes)
    np.testing.assert_array_equal(out[:, 0], values.astype(np.float32))


@pytest.mark.parametrize("fault", ["towards zero", "to a neighbour", "read before it is rounded", "past rounded again"])
def test_a_fault_of_rounding_is_found(run_op: RunOp, fault: str) -> None:
    case = {"batch": 1, "tokens": 3, "past": 5, "room": None, "kv_heads": 1, "group": 2, "dim": 32, "seed": 0}
    inputs, attributes = attention_inputs(case | {"cache": np.float16})
    out, keys, values = (array.copy() for array in run_op("Attention", inputs, outputs=3, **attributes))
    compare([out, keys, values], inputs, attributes)
    exact_keys, exact_values = (expected_cache(inputs, attributes, name) for name in ("k", "v"))
    if fault == "towards zero":
        beyond = np.abs(values) > np.abs(exact_values)
        values[beyond] = np.nextafter(values, np.float16(0))[beyond]
    elif fault == "to a neighbour":
        keys[0, 0, -1, 7] = np.nextafter(keys[0, 0, -1, 7], np.float16(np.inf))
    elif fault == "read before it is rounded":
        out = definition(inputs, attributes, exact_keys, exact_values)
    else:
        keys[:, :, 0] = np.nextafter(keys[:, :, 0], np.float16(0))
    with pytest.raises(AssertionError):
        compare([out, keys, values], inputs, attributes)


def test_every_number_is_stored_in_int8_as_the_definition_says(run_op: RunOp) -> None:
    """Blocks of every magnitude, halfway cases, zeros, subnormals, infinities and NaN; past rows stay as they are."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((1, 600, 4, 32)) * 2.0 ** rng.integers(-149, 127, (1, 600, 4, 1))
    numbers[:, :150] = rng.integers(-254, 255, (1, 150, 4, 32)) / 2
    numbers[:, :150, :, 3] = 127
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    odd = rng.random(numbers.shape) < 0.003
    numbers[odd] = rng.choice(np.float32([0, -0.0, 1e-45, 2.0**-126, 3.4e38, np.inf, -np.inf, np.nan]), odd.sum())
    numbers = numbers.reshape(1, 600, 128)
    case = {"batch": 1, "tokens": 600, "past": 3, "room": None, "kv_heads": 1, "group": 1, "dim": 128, "seed": 0}
    inputs, attributes = attention_inputs(case | {"cache": np.int8})
    start = attributes["v_offset"]
    inputs["qkv"][..., start : start + 128] = numbers
    out, _, values = run_op("Attention", inputs, outputs=3, **attributes)
    np.testing.assert_array_equal(values[:, :, 3:], int8_rows.encode(numbers[:, None]))
    np.testing.assert_array_equal(values[:, :, :3], inputs["past_v"])
    assert np.isnan(out[0, -1]).any()  # nothing that is not a number becomes one


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("fault", ["exponent", "code", "scales change places", "read before it is rounded", "past"])
def test_a_fault_of_codes_is_found(run_op: RunOp, fault: str, tokens: int) -> None:
    case = {"batch": 1, "tokens": tokens, "past": 5, "room": None, "kv_heads": 1, "group": 2, "dim": 64, "seed": 0}
    inputs, attributes = attention_inputs(case | {"cache": np.int8})
    out, keys, values = (array.copy() for array in run_op("Attention", inputs, outputs=3, **attributes))
    compare([out, keys, values], inputs, attributes)
    if fault == "exponent":
        keys[0, 0, -1, 65] += 1
    elif fault == "code":
        values[0, 0, -1, 7] += 1
    elif fault == "scales change places":
        keys[0, 0, -1, 64:] = keys[0, 0, -1, [66, 67, 64, 65]]
    elif fault == "read before it is rounded":
        out = definition(inputs, attributes, *(expected_cache(inputs, attributes, name) for name in ("k", "v")))
    else:
        keys[:, :, 0, 3] += 1
    with pytest.raises(AssertionError):
        compare([out, keys, values], inputs, attributes)


@pytest.mark.parametrize(
    ("dim", "width", "message"), [(40, 42, "multiple of 32"), (64, 64, "head_dim / 16"), (32, 36, "")]
)
def test_rows_of_another_width_are_an_error(run_op: RunOp, dim: int, width: int, message: str) -> None:
    case = {"batch": 1, "tokens": 2, "past": 3, "room": None, "kv_heads": 1, "group": 1, "dim": dim, "seed": 0}
    inputs, attributes = attention_inputs(case)
    inputs["past_k"] = inputs["past_v"] = np.zeros((1, 1, 3, width), np.int8)
    with pytest.raises(Exception, match=f"Attention.*{message}"):
        run_op("Attention", inputs, outputs=3, **attributes)


def test_caches_of_two_dtypes_are_an_error(run_op: RunOp) -> None:
    case = {"batch": 1, "tokens": 4, "past": 6, "room": None, "kv_heads": 1, "group": 1, "dim": 8, "seed": 0}
    inputs, attributes = attention_inputs(case)
    inputs["past_v"] = inputs["past_v"].astype(np.float16)
    with pytest.raises(Exception, match="Attention"):
        run_op("Attention", inputs, outputs=3, **attributes)
