"""Ops that reduce, and ops that sort, against PyTorch."""

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


REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "reduce_sum": torch.sum,
    "reduce_mean": torch.mean,
    "reduce_max": torch.amax,
    "reduce_min": torch.amin,
    "reduce_sum_square": lambda x, **to: torch.sum(x * x, **to),
    "reduce_l1_norm": lambda x, **to: torch.sum(x.abs(), **to),
    "reduce_l2_norm": lambda x, **to: torch.sum(x * x, **to).sqrt(),
    "reduce_log_sum": lambda x, **to: torch.sum(x, **to).log(),
    "reduce_log_sum_exp": torch.logsumexp,
}


@pytest.mark.parametrize("op", sorted(REDUCTIONS))
@PROPERTY
@given(st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda axis: axis % 3), st.booleans(), SEEDS)
def test_reduction(run_op: Run, op: str, axes: list[int], keep: bool, seed: int) -> None:
    x = np.abs(random(seed, (2, 3, 4))) if op == "reduce_log_sum" else random(seed, (2, 3, 4))
    expected = REDUCTIONS[op](torch.from_numpy(x), dim=tuple(axes), keepdim=keep).numpy()
    found = run_op(op, {"x": x}, {"axes": axes, "keep_dims": keep}, ("fp32", expected.shape))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_reduction_of_everything(run_op: Run) -> None:
    assert run_op("reduce_sum", {"x": X}, {}, ("fp32", ())) == X.sum()
    assert run_op("reduce_prod", {"x": X[:, 1:]}, {"axes": [0, 1, 2]}, ("fp32", ())) == pytest.approx(X[:, 1:].prod())


@pytest.mark.parametrize("op", ["argmax", "argmin"])
@PROPERTY
@given(st.integers(-3, 2), st.booleans(), SEEDS)
def test_index_of_extreme(run_op: Run, op: str, axis: int, keep: bool, seed: int) -> None:
    x = random(seed, (2, 3, 4))
    expected = getattr(torch, op)(torch.from_numpy(x), axis, keepdim=keep).numpy()
    found = run_op(f"reduce_{op}", {"x": x}, {"axis": axis, "keep_dims": keep}, ("int32", expected.shape))
    assert np.array_equal(found, expected)


@PROPERTY
@given(st.integers(-1, 2), st.booleans(), st.booleans(), SEEDS)
def test_cumsum(run_op: Run, axis: int, exclusive: bool, reverse: bool, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-9, 9, (2, 3, 4)).astype(np.float32)
    t = torch.from_numpy(x)
    expected = torch.cumsum(t.flip(axis) if reverse else t, axis)
    expected = expected.flip(axis) if reverse else expected
    expected = expected - t if exclusive else expected
    found = run_op("cumsum", {"x": x}, {"axis": axis, "exclusive": exclusive, "reverse": reverse}, ("fp32", x.shape))
    assert np.array_equal(found, expected.numpy())


@PROPERTY
@given(st.integers(-3, 2), st.booleans(), SEEDS)
def test_order(run_op: Run, axis: int, ascending: bool, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 4, (3, 4, 5)).astype(np.float32)
    t = torch.from_numpy(x)
    order = torch.argsort(t, dim=axis, descending=not ascending, stable=True).numpy()
    assert np.array_equal(
        run_op("argsort", {"x": x}, {"axis": axis, "ascending": ascending}, ("int32", x.shape)), order
    )
    shape = tuple(2 if i == axis % 3 else size for i, size in enumerate(x.shape))
    values, indices = run_op(
        "topk", {"x": x}, {"k": 2, "axis": axis, "ascending": ascending}, ("fp32", shape), ("int32", shape)
    )
    assert np.array_equal(values, torch.topk(t, 2, axis, largest=not ascending).values.numpy())
    assert np.array_equal(np.take_along_axis(x, indices, axis), values)


@pytest.mark.parametrize(
    ("op", "constants", "shape"),
    [
        ("reduce_sum", {"axes": [3]}, (2, 3, 4)),
        ("topk", {"k": 5}, (2, 3, 5)),
    ],
)
def test_what_is_not_specified_is_refused(
    run_op: Run, op: str, constants: dict[str, object], shape: tuple[int, ...]
) -> None:
    with pytest.raises(H1ExportError, match=f"op {op} 'out0'"):
        run_op(op, {"x": X}, constants, ("fp32", shape))
