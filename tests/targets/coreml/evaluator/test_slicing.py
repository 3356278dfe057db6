"""Slices and their updates, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError

Run = Callable[..., Any]

SEEDS = st.integers(0, 2**32 - 1)

PROPERTY = settings(deadline=None, max_examples=20, derandomize=True)

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

T = torch.from_numpy(X)


def random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def slices(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[bool], list[bool]]:
    """Draw begin, end, stride, begin_mask and end_mask for shape (5, 6), with strides of both signs."""
    parts: tuple[list[Any], ...] = ([], [], [], [], [])
    for size in (5, 6):
        low, high = sorted(draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))))
        stride = draw(st.sampled_from([1, 2, 3, -1, -2]))
        begin, end = (low, high) if stride > 0 else (high, low)
        values = (
            begin - draw(st.sampled_from([0, size])),
            end - draw(st.sampled_from([0, size])),
            stride,
            draw(st.booleans()),
            draw(st.booleans()),
        )
        for part, value in zip(parts, values, strict=True):
            part.append(value)
    return parts  # type: ignore[return-value]


@PROPERTY
@given(slices(), SEEDS)
def test_slices_are_numpys_within_bounds(run_op: Run, drawn: tuple[Any, ...], seed: int) -> None:
    x = random(seed, (5, 6))
    begin, end, stride, begin_mask, end_mask = drawn
    index = tuple(
        slice(None if first_mask else first, None if last_mask else last, step)
        for first, last, step, first_mask, last_mask in zip(begin, end, stride, begin_mask, end_mask, strict=True)
    )
    expected = x[index]
    constants = {"begin": begin, "end": end, "stride": stride, "begin_mask": begin_mask, "end_mask": end_mask}
    assert np.array_equal(run_op("slice_by_index", {"x": x}, constants, ("fp32", expected.shape)), expected)
    if expected.size:
        update = random(seed + 1, expected.shape)
        written = x.copy()
        written[index] = update
        assert np.array_equal(run_op("slice_update", {"x": x, "update": update}, constants, ("fp32", x.shape)), written)


def test_squeezed_slices_take_one_element(run_op: Run) -> None:
    constants = {"begin": [-1, 0, 1], "end": [0, 3, 0], "squeeze_mask": [True, False, True]}
    assert np.array_equal(run_op("slice_by_index", {"x": X}, constants, ("fp32", (3,))), X[-1, :, 1])


def test_a_slice_beyond_the_end_is_clamped_but_an_update_is_not(run_op: Run) -> None:
    constants = {"begin": [0, 1, 0], "end": [2, 2**31 - 1, 4]}
    assert np.array_equal(run_op("slice_by_index", {"x": X}, constants, ("fp32", (2, 2, 4))), X[:, 1:])
    with pytest.raises(H1ExportError, match="has bound 2147483647 of axis 1, which has 3 elements"):
        run_op("slice_update", {"x": X, "update": X[:, 1:]}, constants, ("fp32", X.shape))


def test_a_position_past_the_cache_is_refused(run_op: Run) -> None:
    tensors = {"x": np.zeros((1, 8), np.float16), "update": np.ones((1, 1), np.float16)}

    def write_at(position: int) -> Any:
        corners = {"begin": np.array([0, position], np.int32), "end": np.array([1, position + 1], np.int32)}
        return run_op("slice_update", tensors | corners, {}, ("fp16", (1, 8)))

    assert write_at(7)[0, 7] == 1
    with pytest.raises(H1ExportError, match=r"function 'main', op slice_update 'out0': has bound 9 of axis 1"):
        write_at(8)


def test_slice_by_size(run_op: Run) -> None:
    tensors = {"x": X, "begin": np.array([0, 1, 2], np.int32)}
    assert np.array_equal(run_op("slice_by_size", tensors, {"size": [2, -1, 1]}, ("fp32", (2, 2, 1))), X[:, 1:, 2:3])
    with pytest.raises(H1ExportError, match="outside shape"):
        run_op("slice_by_size", tensors, {"size": [2, -1, 3]}, ("fp32", (2, 2, 2)))


@pytest.mark.parametrize(
    ("op", "constants", "shape"),
    [
        ("slice_by_index", {"begin": [0, 2, 0], "end": [2, 1, 4]}, (2, 0, 4)),
        ("slice_by_index", {"begin": [0, 0], "end": [2, 1]}, (2, 1)),
        ("slice_by_index", {"begin": [2, 0, 0], "end": [0, 0, 0], "squeeze_mask": [True, True, True]}, ()),
    ],
)
def test_what_is_not_specified_is_refused(
    run_op: Run, op: str, constants: dict[str, object], shape: tuple[int, ...]
) -> None:
    with pytest.raises(H1ExportError, match=f"op {op} 'out0'"):
        run_op(op, {"x": X}, constants, ("fp32", shape))
