"""Blocks of GGUF: gguf's own reader gives the integers back, and Q6_K is the nearest code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.quantize.quantized_tensor import QuantizedTensor
from h1export.targets.gguf import blocks
from h1export.targets.gguf.types import BLOCKS

FIXED = settings(derandomize=True, deadline=None, max_examples=40)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))  # rows, and blocks of a row
seeds = st.integers(0, 2**32 - 1)


def test_block_sizes_are_those_of_gguf() -> None:
    for kind, block in BLOCKS.items():
        columns, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        assert (block.columns, block.nbytes) == (columns, nbytes)


@FIXED
@given(shape=shapes, seed=seeds, bits=st.sampled_from([4, 8]))
def test_codes_and_scales_come_back(shape: tuple[int, int], seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = shape[0], 32 * shape[1]
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, columns)).astype(np.int8)
    scales = rng.uniform(1e-7, 3, (rows, shape[1])).astype(np.float16)
    pack, parts, kind = {4: (blocks.q4_0, blocks.q4_0_parts, "Q4_0"), 8: (blocks.q8_0, blocks.q8_0_parts, "Q8_0")}[bits]
    packed = pack(codes, scales)
    found_codes, found_scales = parts(packed)
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scales, scales)
    expected = codes.reshape(rows, -1, 32) * scales.astype(np.float32)[..., None]
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(theirs, expected.reshape(rows, -1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scales_of_rows_and_longer_groups_are_repeated_with_the_multiplier(groups: int) -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.02, (3, groups)).astype(np.float16)
    factors = np.array([0.35, 1.0, 5.66], np.float32)
    tensor = QuantizedTensor(np.zeros((3, 128), np.int8), scales, factors)
    found = blocks.scales_with_multiplier(tensor)
    expected = (scales.astype(np.float64) * factors[:, None]).astype(np.float16)
    np.testing.assert_array_equal(found, np.repeat(expected, 4 // groups, axis=1))


@pytest.mark.parametrize("factor", [1e9, 1e-9])
def test_a_scale_beyond_fp16_is_refused(factor: float) -> None:
    tensor = QuantizedTensor(np.ones((1, 32), np.int8), np.ones((1, 1), np.float16), np.array([factor], np.float32))
    with pytest.raises(OverflowError, match="do not fit fp16"):
        blocks.scales_with_multiplier(tensor)


@FIXED
@given(shape=shapes, seed=seeds, spread=st.sampled_from([0.0, 0.3, 1.0]), size=st.sampled_from([1e-3, 0.02, 40.0]))
def test_q6_k_is_within_half_a_step_of_its_columns(
    shape: tuple[int, int], seed: int, spread: float, size: float
) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.standard_normal((shape[0], shape[1], 16, 16)) * size
    groups *= np.exp(spread * rng.standard_normal((shape[0], shape[1], 16, 1)))
    groups[rng.random(groups.shape[:3]) < 0.1] = 0
    weight = groups.reshape(shape[0], -1).astype(np.float32)
    found = gguf.quants.dequantize(blocks.q6_k(weight), gguf.GGMLQuantizationType.Q6_K)
    error = np.abs(found - weight).reshape(groups.shape).max(axis=3)
    largest = np.abs(weight).reshape(groups.shape).max(axis=3)
    step = largest / 31 + largest.max(axis=2, keepdims=True) / 31 / 127  # a scale is rounded up to a multiple
    assert (error <= 0.502 * step + 1e-7).all()
    assert (found.reshape(groups.shape)[largest == 0] == 0).all()


def test_q6_k_gives_the_largest_magnitude_the_longest_code() -> None:
    """The 32 negative codes and 31 positive ones are all in use: the sign of a scale is free."""
    weight = np.zeros((1, 256), np.float32)
    weight[0, 5] = 3.2
    weight[0, 6] = -3.0
    packed = blocks.q6_k(weight)
    assert packed[0, 192:208].view(np.int8)[0] == -127
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_allclose(found[0, 5:7], [3.2, -3.0], rtol=2e-3)


def test_q6_k_refuses_what_fp16_cannot_scale() -> None:
    with pytest.raises(OverflowError, match="do not fit"):
        blocks.q6_k(np.full((1, 256), 1e12, np.float32))
