"""Formats of llama.cpp's own types: ggml reads what they pack, rounding is as good as ggml's, and GPTQ is better."""

from __future__ import annotations

import ctypes as c
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.quantize.grid import BlockScales, GridFormat, OwnTensor
from h1export.quantize.methods.gptq import invert
from h1export.quantize.methods.gptq_grid import fitted, round_on_grid, solve_own_rows
from h1export.quantize.methods.grid_search import round_own_rows, searched
from h1export.targets.gguf.grids import FORMATS, parts_of
from h1export.targets.gguf.llama import api
from h1export.targets.gguf.types import TensorType

FIXED = settings(derandomize=True, deadline=None, max_examples=25)
KINDS = sorted(FORMATS)
IN_C = {"q4_k": "q4_K", "q5_0": "q5_0", "q5_k": "q5_K", "q6_k": "q6_K"}  # as ggml's functions are called


def of_ggml(packed: Any, kind: TensorType, columns: int) -> Any:
    """Rows [rows, columns] as llama.cpp's own C function dequantises them."""
    function = getattr(api(), f"dequantize_row_{IN_C[kind]}")
    function.argtypes = (c.c_void_p, c.c_void_p, c.c_int64)
    found = np.empty((len(packed), columns), np.float32)
    function(np.ascontiguousarray(packed).ctypes.data, found.ctypes.data, found.size)
    return found


def ggml_rounds(weight: Any, kind: TensorType) -> Any:
    """The values of ``weight`` after ggml's own rounding."""
    function = api().ggml_quantize_chunk
    function.restype = c.c_size_t
    function.argtypes = (c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p)
    packed = np.empty((len(weight), kind.row_bytes(weight.shape[1])), np.uint8)
    raw = int(gguf.GGMLQuantizationType[kind.upper()])
    assert function(raw, weight.ctypes.data, packed.ctypes.data, 0, *weight.shape, None) == packed.nbytes
    return of_ggml(packed, kind, weight.shape[1])


def drawn(form: GridFormat, rows: int, blocks: int, seed: int) -> tuple[BlockScales, Any]:
    """Any scales and codes of a format."""
    rng = np.random.default_rng(seed)
    halves = [
        torch.from_numpy(rng.uniform(1e-6, 2, (rows, blocks)).astype(np.float16).astype(np.float32)) for _ in "dm"
    ]
    least = 0 if form.offsets else -form.most
    units = [torch.from_numpy(rng.integers(least, form.most + 1, (rows, blocks * form.groups))).float() for _ in "dm"]
    if form.most == 1:
        units[0] = torch.ones_like(units[0])
        halves[0] *= torch.from_numpy(rng.choice([-1.0, 1.0], halves[0].shape)).float()
    if not form.offsets:
        halves[1], units[1] = torch.zeros_like(halves[1]), torch.zeros_like(units[1])
    codes = rng.integers(form.lowest, form.highest + 1, (rows, blocks * form.columns)).astype(np.int8)
    return BlockScales(halves[0], units[0], halves[1], units[1]), codes


@pytest.mark.parametrize("kind", KINDS)
@FIXED
@given(rows=st.integers(1, 4), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_packed_rows_come_back_and_mean_what_ggml_says(kind: TensorType, rows: int, blocks: int, seed: int) -> None:
    form = FORMATS[kind]
    scales, codes = drawn(form, rows, blocks, seed)
    packed = form.pack(scales, codes)
    assert packed.shape == (rows, form.row_bytes(codes.shape[1]))
    found, found_codes = form.unpack(packed)
    np.testing.assert_array_equal(found_codes, codes)
    for field in ("scale", "units", "minimum", "minimum_units"):
        assert torch.equal(getattr(found, field), getattr(scales, field)), field
    values = form.values(packed)
    np.testing.assert_array_equal(values, scales.values(torch.from_numpy(codes)).numpy())
    np.testing.assert_array_equal(values, of_ggml(packed, kind, codes.shape[1]))
    np.testing.assert_array_equal(values, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()]))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_steps_that_a_comparison_shows(kind: TensorType) -> None:
    scales, codes = drawn(FORMATS[kind], 3, 2, 0)
    signed, steps = parts_of(kind, FORMATS[kind].pack(scales, codes))
    found = signed.reshape(*steps.shape, -1) * steps[..., None].astype(np.float32)
    expected = scales.values(torch.from_numpy(codes)) + scales.offsets.repeat_interleave(FORMATS[kind].width, 1)
    np.testing.assert_allclose(found.reshape(codes.shape), expected.numpy(), rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 0.02, 40.0])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_as_good_as_ggmls(kind: TensorType, size: float) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((24, 512)) * np.exp(0.4 * rng.standard_normal((24, 512))) * size).astype(np.float32)
    weight[3] = 0
    weight[5] = np.abs(weight[5])
    found = FORMATS[kind].values(round_own_rows(weight, FORMATS[kind], name="x"))
    assert (found[3] == 0).all()
    assert np.square(found - weight).mean() <= 1.06 * np.square(ggml_rounds(weight, kind) - weight).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e12, np.inf, np.nan])
def test_weights_that_no_scale_can_hold_are_refused(kind: TensorType, value: float) -> None:
    with pytest.raises(H1ExportError, match="do not fit fp16" if value == 1e12 else "not finite"):
        round_own_rows(np.full((1, 256), value, np.float32), FORMATS[kind], name="x")


def problem(seed: int, columns: int = 512) -> tuple[Any, torch.Tensor]:
    """A weight, and moments of inputs that are correlated and of unequal size."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2 * columns, columns // 2)) @ rng.normal(size=(columns // 2, columns))
    inputs = (inputs + rng.normal(size=inputs.shape)) * np.exp(0.5 * rng.normal(size=columns))
    return rng.normal(size=(16, columns)).astype(np.float32) * 0.02, torch.from_numpy(inputs.T @ inputs)


def damage(found: Any, weight: Any, moments: torch.Tensor) -> float:
    """What rounding does to the outputs, squared."""
    error = torch.from_numpy(found.astype(np.float64) - weight)
    return float(((error @ moments) * error).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_damages_outputs_less_than_rounding(kind: TensorType) -> None:
    form = FORMATS[kind]
    weight, moments = problem(0)
    inverse = invert(moments, "x")
    solved = damage(form.values(solve_own_rows(weight, form, inverse, name="x")), weight, moments)
    rounded = damage(form.values(round_own_rows(weight, form, name="x")), weight, moments)
    weighted = searched(torch.from_numpy(weight), inverse.importance, form, name="x")
    codes = form.nearest(torch.from_numpy(weight), weighted)
    assert solved < 0.6 * damage(weighted.values(codes).numpy(), weight, moments)
    assert solved < 0.6 * rounded
    before = round_on_grid(torch.from_numpy(weight), weighted, form, inverse=inverse)
    weighted = replace(weighted, scale=(weighted.scale * 1.05).half().float())
    after = fitted(torch.from_numpy(weight), before, weighted, inverse=inverse)
    unfitted = damage(weighted.values(before).numpy(), weight, moments)
    assert damage(after.values(before).numpy(), weight, moments) < unfitted


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_without_correlations_is_rounding(kind: TensorType) -> None:
    weight = torch.from_numpy(problem(1)[0])
    inverse = invert(torch.eye(weight.shape[1], dtype=torch.float64), "x")
    scales = searched(weight, inverse.importance, FORMATS[kind], name="x")
    codes = round_on_grid(weight, scales, FORMATS[kind], inverse=inverse)
    assert torch.equal(codes, FORMATS[kind].nearest(weight, scales))


def test_factors_are_taken_out_again_and_a_factor_of_zero_gives_zeros() -> None:
    weight = problem(2)[0][:3]
    own = OwnTensor(FORMATS[TensorType.Q6_K], np.array([0.011, 0.0, 5.66], np.float32))
    packed = round_own_rows(weight * own.factors[:, None], own.format, name="x")
    found = own.unfolded(packed)
    assert (found[1] == 0).all()
    np.testing.assert_allclose(found[[0, 2]], weight[[0, 2]], atol=0.03 * np.abs(weight).max())
