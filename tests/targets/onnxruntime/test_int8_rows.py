"""Rows of keys and values in int8 against their definition, number by number, and the functions of the graph too."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.targets.onnx.builder import GraphBuilder
from h1export.targets.onnxruntime import int8_rows
from h1export.targets.onnxruntime.emit import int8_cache

BLOCK = 32
ODD = (0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**-119, 2.0**-118, 127.0 * 2.0**-125, 3.4e38, -3.4e38, 1e38)
NOT_NUMBERS = (np.inf, -np.inf, np.nan)


@st.composite
def numbers(draw: Any, blocks: int = 2, finite: bool = True) -> Any:
    """Rows float32 [2, 1, tokens, 32 * blocks]: blocks of any magnitude, with ties, zeros and odd numbers."""
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    shape = (2, 1, draw(st.integers(1, 4)), blocks, BLOCK)
    kind = draw(st.sampled_from(["normal", "halves", "one large"]))
    made = rng.standard_normal(shape)
    if kind == "halves":  # codes in the middle of two integers
        made = np.clip(rng.integers(-254, 255, shape), -254, 254) / 2
        made[..., 0] = 127
    elif kind == "one large":
        made[..., 5] *= 1e4
    made = (made * 2.0 ** rng.integers(-128, 104, shape[:-1])[..., None]).astype(np.float32)
    some = rng.random(shape) < draw(st.sampled_from([0.0, 0.02]))
    made[some] = rng.choice(np.float32(ODD if finite else ODD + NOT_NUMBERS), some.sum())
    return made.reshape(*shape[:3], -1)


def scale_of(row: Any, columns: int, block: int) -> Fraction:
    """The scale by its two bytes, exactly: (1 + M / 256) 2^(E - 127)."""
    mantissa, exponent = struct.unpack_from("<BB", row.tobytes(), columns + 2 * block)
    return (1 + Fraction(mantissa, 256)) * Fraction(2) ** (exponent - 127) if exponent else Fraction(0)


def nearest_scale(largest: np.float32) -> tuple[Fraction, ...]:
    """The scales nearest to largest / 127 in float32: one, or two where it is in their middle."""
    wanted = Fraction(float(largest / np.float32(127)))
    if not wanted:
        return (Fraction(0),)
    exponent = int(np.frexp(float(wanted))[1]) - 1
    unit = Fraction(2) ** (exponent - 8)
    below = wanted // unit * unit
    distances = {scale: abs(scale - wanted) for scale in (below, below + unit)}
    return tuple(scale for scale, distance in distances.items() if distance == min(distances.values()))


def judge(rows: Any, truth: Any) -> None:
    """Every scale is the nearest, and every code the nearest to the number beside it."""
    columns = truth.shape[-1]
    for row, part_of in zip(rows.reshape(-1, rows.shape[-1]), truth.reshape(-1, columns), strict=True):
        for block in range(columns // BLOCK):
            part = part_of[block * BLOCK : (block + 1) * BLOCK]
            scale = scale_of(row, columns, block)
            allowed = nearest_scale(np.abs(part).max())
            codes = row[block * BLOCK : (block + 1) * BLOCK]
            if scale == 0:
                assert min(allowed) < Fraction(2) ** -125
                assert not codes.any()
                continue
            assert scale in allowed
            assert np.abs(codes.astype(int)).max() == 127
            for code, number in zip(codes, part, strict=True):
                off = abs(Fraction(float(number)) / scale - int(code))
                assert off <= Fraction(1, 2) * (1 + Fraction(1, 2**15))  # the division is rounded to float32


@settings(deadline=None, max_examples=60, derandomize=True)
@given(numbers())
def test_codes_and_scales_are_the_nearest(given_: Any) -> None:
    rows = int8_rows.encode(given_)
    assert rows.dtype == np.int8
    assert rows.shape == (*given_.shape[:-1], int8_rows.width(given_.shape[-1]))
    assert int8_rows.columns_of(rows.shape[-1]) == given_.shape[-1]
    judge(rows, given_)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(numbers(finite=False))
def test_rows_that_pass_through_float32_are_the_same_bytes(given_: Any) -> None:
    rows = int8_rows.encode(given_)
    read = int8_rows.decode(rows)
    assert read.dtype == np.float32
    assert read.shape == given_.shape
    np.testing.assert_array_equal(int8_rows.encode(read), rows)
    blocks = read.reshape(-1, BLOCK)
    finite = np.isfinite(given_).reshape(-1, BLOCK).all(-1)
    assert np.isnan(blocks[~finite]).all()
    assert np.isfinite(blocks[finite]).all()
    used = blocks[finite & (blocks != 0).any(-1)]
    assert (np.abs(used[used != 0]) >= 2.0**-125).all()


def test_numbers_are_codes_times_scales() -> None:
    rng = np.random.default_rng(0)
    rows = int8_rows.encode(rng.standard_normal((3, 96)).astype(np.float32) * 7)
    read = int8_rows.decode(rows)
    for row, found in zip(rows, read, strict=True):
        for column, number in enumerate(found):
            assert Fraction(float(number)) == int(row[column]) * scale_of(row, 96, column // BLOCK)


def test_every_scale_is_reached_and_carries_into_the_exponent() -> None:
    """Largest numbers through every mantissa, those that are rounded up to the next power of two among them."""
    steps = np.concatenate([np.arange(1 << 12), [(1 << 23) - 1, (1 << 22) + 1]]) << 11
    largest = (np.uint32(0x3F800000) + steps.astype(np.uint32)).view(np.float32) * np.float32(127)
    numbers_ = np.repeat(largest[:, None], BLOCK, axis=1)
    rows = int8_rows.encode(numbers_)
    for row, number in zip(rows, largest, strict=True):
        assert scale_of(row, BLOCK, 0) in nearest_scale(number)
    assert len(np.unique(rows[:, BLOCK:], axis=0)) > 256


@pytest.fixture(scope="module")
def graph() -> Any:
    """A session of float32 rows -> rows in int8 and what is read of them, in the graph's functions."""
    builder = GraphBuilder({"": 23})
    dims = ["b", "h", "t"]
    given_ = ir.Value(name="numbers", shape=ir.Shape([*dims, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    rows = builder.call(int8_cache.encode_function(64), given_)
    read = builder.call(int8_cache.decode_function(64), rows)
    for value, name, width, dtype in (
        (rows, "rows", int8_rows.width(64), ir.DataType.INT8),
        (read, "read", 64, ir.DataType.FLOAT),
    ):
        value.name, value.shape, value.type = name, ir.Shape([*dims, width]), ir.TensorType(dtype)
    model = ir.to_proto(builder.model([given_], [rows, read], "rows"))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(numbers(finite=False))
def test_the_graph_computes_the_same_bytes(graph: Any, given_: Any) -> None:
    rows, read = graph.run(None, {"numbers": given_})
    np.testing.assert_array_equal(rows, int8_rows.encode(given_))
    np.testing.assert_array_equal(read, int8_rows.decode(rows))


def test_the_graph_s_exponents_are_exact_at_powers_of_two(graph: Any) -> None:
    """Where a logarithm may be off: numbers whose scale is a power of two, and their neighbours."""
    powers = np.ldexp(np.float32(127), np.arange(-124, 120)).astype(np.float32)
    largest = np.concatenate([powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))])
    given_ = np.repeat(largest.reshape(-1, 1, 1, 1), 64, axis=3)
    np.testing.assert_array_equal(graph.run(["rows"], {"numbers": given_})[0], int8_rows.encode(given_))


@pytest.mark.parametrize("fault", ["exponent", "mantissa", "byte order", "next block", "towards zero"])
def test_a_fault_of_rows_is_found(fault: str) -> None:
    truth = np.random.default_rng(1).standard_normal((1, 1, 1, 64)).astype(np.float32) * np.float32([1] * 32 + [3] * 32)
    rows = int8_rows.encode(truth)
    judge(rows, truth)
    if fault == "exponent":
        rows[..., 65] += 1
    elif fault == "mantissa":
        rows[..., 64] ^= 1
    elif fault == "byte order":
        rows[..., 64:] = rows[..., [65, 64, 67, 66]]
    elif fault == "next block":
        rows[..., 64:] = rows[..., [66, 67, 64, 65]]
    else:
        beyond = np.abs(int8_rows.decode(rows)) > np.abs(truth)
        rows[..., :64] -= np.sign(rows[..., :64]) * beyond
    with pytest.raises(AssertionError):
        judge(rows, truth)
