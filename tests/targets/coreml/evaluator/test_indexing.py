"""Ops that gather, scatter and select, against PyTorch and numpy."""

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


@PROPERTY
@given(st.integers(-3, 2), st.lists(st.integers(1, 3), max_size=3), SEEDS)
def test_gather(run_op: Run, axis: int, shape: list[int], seed: int) -> None:
    x = random(seed, (3, 4, 5))
    indices = np.random.default_rng(seed).integers(0, x.shape[axis], shape).astype(np.int32)
    flat = torch.index_select(torch.from_numpy(x), axis, torch.from_numpy(indices.ravel()))
    expected = flat.unflatten(axis, shape).numpy() if shape else flat.squeeze(axis).numpy()
    assert np.array_equal(
        run_op("gather", {"x": x, "indices": indices}, {"axis": axis}, ("fp32", expected.shape)), expected
    )


def test_gather_in_batches(run_op: Run) -> None:
    x = random(0, (2, 3, 4))
    indices = np.array([[2, 0], [1, 1]], np.int32)
    expected = np.stack([x[i][indices[i]] for i in range(2)])
    assert np.array_equal(
        run_op("gather", {"x": x, "indices": indices}, {"axis": 1, "batch_dims": 1}, ("fp32", (2, 2, 4))), expected
    )


@PROPERTY
@given(st.integers(-3, 2), st.integers(1, 4), SEEDS)
def test_gather_and_scatter_along_an_axis(run_op: Run, axis: int, count: int, seed: int) -> None:
    x = random(seed, (3, 4, 5))
    rng = np.random.default_rng(seed)
    shape = tuple(count if i == axis % 3 else size for i, size in enumerate(x.shape))
    indices = rng.integers(0, x.shape[axis], shape).astype(np.int32)
    wide = torch.from_numpy(indices).long()
    expected = torch.gather(torch.from_numpy(x), axis, wide).numpy()
    assert np.array_equal(
        run_op("gather_along_axis", {"x": x, "indices": indices}, {"axis": axis}, ("fp32", shape)), expected
    )
    updates = random(seed + 1, shape)
    for mode, reduce in {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.items():
        expected = torch.from_numpy(x.copy()).scatter_reduce(axis, wide, torch.from_numpy(updates), reduce).numpy()
        tensors = {"data": x, "indices": indices, "updates": updates}
        found = run_op("scatter_along_axis", tensors, {"axis": axis, "mode": mode}, ("fp32", x.shape))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "div", "max", "min"])
def test_scatter_modes(run_op: Run, mode: str) -> None:
    data = random(0, (2, 5, 3))
    updates = random(1, (2, 2, 3)) + 3
    indices = np.array([4, 1], np.int32)
    expected = data.copy()
    at = (slice(None), indices)
    function = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "max": np.maximum,
        "min": np.minimum,
    }.get(mode)
    expected[at] = updates if function is None else function(expected[at], updates)
    tensors = {"data": data, "indices": indices, "updates": updates}
    np.testing.assert_allclose(
        run_op("scatter", tensors, {"axis": 1, "mode": mode}, ("fp32", data.shape)), expected, rtol=1e-6
    )


def test_scatter_adds_every_duplicate(run_op: Run) -> None:
    tensors = {
        "data": np.zeros(3, np.int32),
        "indices": np.array([1, 1, 2], np.int32),
        "updates": np.array([5, 6, 7], np.int32),
    }
    assert run_op("scatter", tensors, {"mode": "add"}, ("int32", (3,))).tolist() == [0, 11, 7]


def test_nd(run_op: Run) -> None:
    indices = np.array([[0, 2], [1, 0]], np.int32)
    assert np.array_equal(run_op("gather_nd", {"x": X, "indices": indices}, {}, ("fp32", (2, 4))), X[[0, 1], [2, 0]])
    found = run_op(
        "gather_nd",
        {"x": X, "indices": np.array([[[2], [0]], [[1], [1]]], np.int32)},
        {"batch_dims": 1},
        ("fp32", (2, 2, 4)),
    )
    assert np.array_equal(found, np.stack([X[0][[2, 0]], X[1][[1, 1]]]))
    tensors = {"data": X, "indices": indices, "updates": np.ones((2, 4), np.float32)}
    expected = X.copy()
    expected[[0, 1], [2, 0]] += 1
    assert np.array_equal(run_op("scatter_nd", tensors, {"mode": "add"}, ("fp32", X.shape)), expected)


def test_select(run_op: Run) -> None:
    cond = X > 7
    tensors = {"cond": cond, "a": X, "b": np.asarray(-1, np.float32)}
    assert np.array_equal(run_op("select", tensors, {}, ("fp32", X.shape)), torch.where(T > 7, T, -1).numpy())


@pytest.mark.parametrize("index", [-1, 4])
@pytest.mark.parametrize("validate", [True, False])
def test_an_index_out_of_bounds_is_refused(run_op: Run, index: int, validate: bool) -> None:
    indices = np.array([0, index], np.int32)
    data = np.zeros(4, np.float32)
    constants = {"axis": 0, "validate_indices": validate}
    with pytest.raises(H1ExportError, match=f"op gather 'out0': has index {index} of axis 0, which has 4 elements"):
        run_op("gather", {"x": data, "indices": indices}, constants, ("fp32", (2,)))
    for op in ("scatter", "scatter_along_axis"):
        tensors = {"data": data, "indices": indices, "updates": np.ones(2, np.float32)}
        with pytest.raises(H1ExportError, match=f"op {op} 'out0': has index {index}"):
            run_op(op, tensors, constants | {"mode": "update"}, ("fp32", (4,)))
