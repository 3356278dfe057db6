"""Round to nearest: the integer rule, over shapes, blocks and magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.weight_expr import Multiplier, WeightExpr, WeightPart
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.quantized_tensor import MAX_SCALE, MIN_SCALE, QuantizedTensor
from h1export.quantize.source import Rounded, quantized_blocks

PRECISIONS = (Precision(4, 32), Precision(4, 64), Precision(4, 128), Precision(8, 0), Precision(8, 32))
TOP = {4: 7, 8: 127}
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def weights(draw: st.DrawFn, precision: Precision) -> Any:
    """float32 [rows, columns].

    Every block has a magnitude of its own, from subnormal to the largest that has an fp16 scale.
    """
    rows = draw(st.integers(1, 5))
    groups = draw(st.integers(1, 3))
    width = precision.group_size or draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    kinds = st.sampled_from(
        [0.0, 1e-44, 1e-38, 1e-10, MIN_SCALE, 1e-3, 0.02, 1.0, 300.0, TOP[precision.bits] * MAX_SCALE]
    )
    magnitudes = np.array(draw(st.lists(kinds, min_size=rows * groups, max_size=rows * groups)), np.float32)
    spread = rng.uniform(-1, 1, (rows * groups, width)).astype(np.float32)
    spread[:, rng.integers(width)] = draw(st.sampled_from([1.0, -1.0]))  # the block reaches its magnitude
    return (spread * magnitudes[:, None]).reshape(rows, -1)


def ones(rows: int) -> Any:
    return np.ones(rows, np.float32)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@PROPERTY
@given(data=st.data())
def test_the_integer_rule(precision: Precision, data: st.DataObject) -> None:
    """Codes in range, scales positive normal fp16, and an error of at most half a scale.

    The scale s is absmax / top rounded to fp16, so |w| / s <= top * (1 + 2^-11) < top + 1/2: no code is ever clipped by
    more than rounding would have moved it. What remains is the rounding of w / s to float32, at most top * 2^-23 of a
    scale.
    """
    weight = data.draw(weights(precision))
    top = TOP[precision.bits]
    found = quantize_rows(weight, precision, ones(len(weight)))
    assert found.codes.dtype == np.int8
    assert np.abs(found.codes.astype(int)).max() <= top
    assert found.scales.dtype == np.float16
    assert (found.scales >= MIN_SCALE).all()
    assert np.isfinite(found.scales).all()
    assert found.scales.shape == (len(weight), weight.shape[1] // (precision.group_size or weight.shape[1]))
    width = weight.shape[1] // found.scales.shape[1]
    steps = np.repeat(found.scales.astype(np.float64), width, axis=1)
    error = np.abs(weight.astype(np.float64) - found.codes * steps)
    assert (error <= steps * (0.5 + top * 2.0**-23)).all()
    assert np.array_equal(found.unfolded(), (found.codes * steps).astype(np.float32))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@PROPERTY
@given(data=st.data())
def test_scales_are_absmax_over_top(precision: Precision, data: st.DataObject) -> None:
    """To half a unit of fp16 (2^-11), and never below the smallest normal."""
    weight = data.draw(weights(precision))
    scales = quantize_rows(weight, precision, ones(len(weight))).scales.astype(np.float64)
    absmax = np.abs(weight.astype(np.float64)).reshape(len(weight), scales.shape[1], -1).max(axis=2)
    wanted = np.maximum(absmax / TOP[precision.bits], MIN_SCALE)
    assert (np.abs(scales - wanted) <= wanted * (2.0**-11 + 2.0**-23)).all()


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@PROPERTY
@given(data=st.data())
def test_rows_do_not_influence_each_other(precision: Precision, data: st.DataObject) -> None:
    weight = data.draw(weights(precision))
    multiplier = np.linspace(0.5, 2.0, len(weight), dtype=np.float32)
    cut = data.draw(st.integers(0, len(weight)))
    whole = quantize_rows(weight, precision, multiplier)
    parts = [
        quantize_rows(weight[s], precision, multiplier[s]) for s in (slice(0, cut), slice(cut, None)) if len(weight[s])
    ]
    for field in ("codes", "scales", "row_scale"):
        assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))


def test_the_weight_is_not_written_to() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    before = weight.copy()
    quantize_rows(weight, Precision(4, 32), ones(4))
    assert np.array_equal(weight, before)


def test_the_multiplier_stays_beside_the_integers() -> None:
    """Codes and scales are those of the unfolded tensor, whatever the multiplier."""
    weight = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    multiplier = np.array([1e-30, -2.0, 1e30], np.float32)
    plain = quantize_rows(weight, Precision(4, 32), ones(3))
    scaled = quantize_rows(weight, Precision(4, 32), multiplier)
    assert np.array_equal(plain.codes, scaled.codes)
    assert np.array_equal(plain.scales, scaled.scales)
    assert np.array_equal(scaled.row_scale, multiplier)
    assert np.array_equal(scaled.unfolded(), plain.unfolded())


def test_zeros_become_zeros() -> None:
    found = quantize_rows(np.zeros((2, 64), np.float32), Precision(4, 32), ones(2))
    assert not found.codes.any()
    assert (found.scales == MIN_SCALE).all()


def test_a_grid_of_integers_survives() -> None:
    """Weights that are code x power of two come back bit by bit."""
    codes = np.random.default_rng(2).integers(-7, 8, (6, 64))
    codes[:, ::32] = 7
    steps = np.array([2.0**-14, 2.0**-8, 1.0, 4.0, 2.0**15, 0.125])[:, None]
    weight = (codes * steps).astype(np.float32)
    found = quantize_rows(weight, Precision(4, 32), ones(6))
    assert np.array_equal(found.codes, codes)
    assert np.array_equal(found.unfolded(), weight)


def test_codes_are_symmetric() -> None:
    weight = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    for precision in (Precision(4, 32), Precision(8, 0)):
        one = quantize_rows(weight, precision, ones(4))
        other = quantize_rows(-weight, precision, ones(4))
        assert np.array_equal(one.codes, -other.codes)
        assert np.array_equal(one.scales, other.scales)


@pytest.mark.parametrize("precision", [Precision(4, 32), Precision(8, 0)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(precision: Precision, value: float) -> None:
    weight = np.ones((3, 64), np.float32)
    weight[2, 63] = value
    with pytest.raises(
        H1ExportError, match=r'tensor "model\.x": holds values that are not finite; .*download it again'
    ):
        quantize_rows(weight, precision, ones(3), name="model.x")


@pytest.mark.parametrize("precision", [Precision(4, 32), Precision(8, 0)], ids=str)
def test_values_too_large_for_a_scale(precision: Precision) -> None:
    """The largest that fits has the largest scale and the top code; the next float32 is refused with its figure."""
    largest = np.float32(TOP[precision.bits] * MAX_SCALE)
    weight = np.zeros((2, 64), np.float32)
    weight[1, 5] = -largest
    found = quantize_rows(weight, precision, ones(2))
    assert found.scales.max() == MAX_SCALE
    assert found.codes[1, 5] == -TOP[precision.bits]
    weight[1, 5] = np.nextafter(largest, np.float32(np.inf))
    with pytest.raises(
        H1ExportError,
        match=r'tensor "model\.x": holds (458528|8\.31901e\+06), too large for fp16 scales; use --quant none',
    ):
        quantize_rows(weight, precision, ones(2), name="model.x")


@pytest.mark.parametrize(
    ("codes", "scales", "row_scale"),
    [((2, 8), (3, 1), (2,)), ((2, 8), (2, 3), (2,)), ((2, 8), (2, 2), (3,)), ((2, 8), (2, 2), (2, 1))],
)
def test_parts_that_do_not_fit_are_misuse(
    codes: tuple[int, ...], scales: tuple[int, ...], row_scale: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        QuantizedTensor(np.zeros(codes, np.int8), np.ones(scales, np.float16), np.ones(row_scale, np.float32))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_break_the_rule_are_misuse(scale: float) -> None:
    scales = np.ones((2, 2), np.float16)
    scales[1, 1] = scale
    with pytest.raises(ValueError, match="positive and finite"):
        QuantizedTensor(np.zeros((2, 8), np.int8), scales, ones(2))


def test_unfolded_spreads_scales_over_their_columns() -> None:
    codes = np.array([[1, 2, 3, 4], [-1, -2, -3, -4]], np.int8)
    scales = np.array([[0.5, 2.0], [1.0, 4.0]], np.float16)
    found = QuantizedTensor(codes, scales, np.array([7.0, 9.0], np.float32)).unfolded()
    assert found.dtype == np.float32
    assert np.array_equal(found, [[0.5, 1.0, 6.0, 8.0], [-1.0, -2.0, -12.0, -16.0]])


@pytest.fixture(scope="module")
def store(make_checkpoint: Callable[..., Path]) -> WeightStore:
    folder = make_checkpoint("plain", num_hidden_layers=1)
    return WeightStore.open(folder, FalconH1Config.load(folder))


def rounded(store: WeightStore, precision: Precision) -> Rounded:
    """Every tensor of the store rounded to ``precision``."""
    return Rounded(store, {entry.name: precision for entry in store.entries}, quantize_rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    budget=st.integers(4000, 1 << 18), precision=st.sampled_from([Precision(4, 32), Precision(4, 64), Precision(8, 0)])
)
def test_blocks_of_any_size_make_the_same_integers(store: WeightStore, budget: int, precision: Precision) -> None:
    name = "model.layers.0.mamba.in_proj.weight"
    part = WeightPart(name, multiplier=Multiplier(((192, 0.5), (192, 0.25), (16, 3.0), (16, 4.0), (6, 5.0))))
    whole = quantize_rows(store.rows(name, 0, 422), precision, part.multiplier.rows(422))
    blocks = [
        block() for block in quantized_blocks(WeightExpr((part,)), store, rounded(store, precision), max_bytes=budget)
    ]
    for field in ("codes", "scales", "row_scale"):
        assert np.array_equal(np.concatenate([getattr(block, field) for (block,) in blocks]), getattr(whole, field))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(budget=st.integers(4000, 1 << 18))
def test_parts_side_by_side_keep_their_own_integers(store: WeightStore, budget: int) -> None:
    mixers = [f"model.layers.0.{name}.weight" for name in ("mamba.out_proj", "self_attn.o_proj")]
    both = WeightExpr(tuple(map(WeightPart, mixers)), axis=1)
    blocks = [block() for block in quantized_blocks(both, store, rounded(store, Precision(4, 32)), max_bytes=budget)]
    for place, name in enumerate(mixers):
        alone = quantize_rows(store.rows(name, 0, 1 << 20), Precision(4, 32), np.ones(store.shape(name)[0], np.float32))
        assert np.array_equal(np.concatenate([strip[place].codes for strip in blocks]), alone.codes)
        assert np.array_equal(np.concatenate([strip[place].scales for strip in blocks]), alone.scales)


def test_a_transformed_tensor_is_not_quantised(store: WeightStore) -> None:
    part = WeightPart("model.layers.0.mamba.in_proj.weight", ("neg",))
    with pytest.raises(ValueError, match=r"in_proj\.weight: only plain tensors"):
        next(quantized_blocks(WeightExpr((part,)), store, rounded(store, Precision(4, 32)), max_bytes=1 << 20))


def test_a_damaged_tensor_is_named(copy_checkpoint: Callable[..., Path]) -> None:
    """A planted NaN: the last bf16 value of a projection."""
    folder = copy_checkpoint("plain", num_hidden_layers=1)
    name = "model.layers.0.feed_forward.up_proj.weight"
    entry = WeightStore.open(folder, FalconH1Config.load(folder)).entry(name)
    with entry.file.open("r+b") as stream:
        stream.seek(entry.start + entry.nbytes - 2)
        stream.write(b"\xff\x7f")
    store = WeightStore.open(folder, FalconH1Config.load(folder))
    with pytest.raises(H1ExportError, match=rf'tensor "{name}": holds values that are not finite'):
        [
            block()
            for block in quantized_blocks(
                WeightExpr.of(name), store, rounded(store, Precision(8, 0)), max_bytes=1 << 12
            )
        ]
