"""Ops that reshape, join, pad and create tensors, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from h1export.errors import H1ExportError

Run = Callable[..., Any]

SEEDS = st.integers(0, 2**32 - 1)

PROPERTY = settings(deadline=None, max_examples=20, derandomize=True)

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

T = torch.from_numpy(X)


def random(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@PROPERTY
@given(st.permutations(range(3)), SEEDS)
def test_transpose_and_reverse(run_op: Run, perm: list[int], seed: int) -> None:
    x = random(seed, (2, 3, 4))
    expected = torch.from_numpy(x).permute(*perm).numpy()
    assert np.array_equal(run_op("transpose", {"x": x}, {"perm": list(perm)}, ("fp32", expected.shape)), expected)
    assert np.array_equal(
        run_op("reverse", {"x": x}, {"axes": perm[:2]}, ("fp32", x.shape)), torch.from_numpy(x).flip(perm[:2]).numpy()
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([6, 4], (6, 4)),
        ([2, -1], (2, 12)),
        ([0, -1], (3, 8)),
        ([1, 0, -1, 0], (1, 2, 3, 4)),
        ([0, 0, 0, 0], (1, 2, 3, 4)),
        ([-1], (24,)),
    ],
)
def test_reshape_counts_zeros_from_the_right(run_op: Run, shape: list[int], expected: tuple[int, ...]) -> None:
    assert np.array_equal(run_op("reshape", {"x": X}, {"shape": shape}, ("fp32", expected)), X.reshape(expected))


def test_shapes(run_op: Run, mil: Any) -> None:
    assert run_op("shape", {"x": X}, {}, ("int32", (3,))).tolist() == [2, 3, 4]
    assert run_op("expand_dims", {"x": X}, {"axes": [0, -1]}, ("fp32", (1, 2, 3, 4, 1))).shape == (1, 2, 3, 4, 1)
    assert np.array_equal(run_op("squeeze", {"x": X[:, None, :, :1]}, {"axes": [1, -1]}, ("fp32", (2, 3))), X[:, :, 0])
    assert np.array_equal(run_op("squeeze", {"x": X[:1, :1]}, {}, ("fp32", (4,))), X[0, 0])
    assert np.array_equal(run_op("flatten2d", {"x": X}, {"axis": 2}, ("fp32", (6, 4))), X.reshape(6, 4))
    tensors = {"x": X, "ref_tensors": [np.zeros((6, 9), np.float32), np.zeros((7, 4), np.float32)]}
    constants = {"begins": [0, 1], "ends": [1, 0], "end_masks": [False, True]}
    parts = {
        name: [np.asarray(value, np.bool_ if name == "end_masks" else np.int32) for value in item]
        for name, item in constants.items()
    }
    assert run_op("reshape_like", tensors | parts, {}, ("fp32", (6, 4))).shape == (6, 4)


@PROPERTY
@given(st.integers(-3, 2), st.integers(1, 4), SEEDS)
def test_joins(run_op: Run, axis: int, count: int, seed: int) -> None:
    parts = [random(seed + i, (2, 3, 4)) for i in range(count)]
    joined = torch.cat([torch.from_numpy(part) for part in parts], axis).numpy()
    assert np.array_equal(run_op("concat", {"values": parts}, {"axis": axis}, ("fp32", joined.shape)), joined)
    found = run_op("split", {"x": joined}, {"axis": axis, "num_splits": count}, *[("fp32", (2, 3, 4))] * count)
    assert np.array_equal(np.stack(found if count > 1 else [found]), np.stack(parts))
    stacked = torch.stack([torch.from_numpy(part) for part in parts], axis).numpy()
    assert np.array_equal(run_op("stack", {"values": parts}, {"axis": axis}, ("fp32", stacked.shape)), stacked)
    interleaved = np.moveaxis(np.stack(parts, 0), 0, axis % 3 + 1).reshape(joined.shape)
    assert np.array_equal(
        run_op("concat", {"values": parts}, {"axis": axis, "interleave": True}, ("fp32", joined.shape)), interleaved
    )


def test_uneven_split(run_op: Run) -> None:
    first, second = run_op(
        "split", {"x": X}, {"axis": 2, "split_sizes": [1, 3]}, ("fp32", (2, 3, 1)), ("fp32", (2, 3, 3))
    )
    assert np.array_equal(first, X[..., :1])
    assert np.array_equal(second, X[..., 1:])


def test_scalars_join_to_a_vector(run_op: Run) -> None:
    found = run_op(
        "concat", {"values": [np.asarray(value, np.int32) for value in (3, 1, 2)]}, {"axis": 0}, ("int32", (3,))
    )
    assert found.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("mode", "torchs"), [("constant", "constant"), ("reflect", "reflect"), ("replicate", "replicate")]
)
def test_pad(run_op: Run, mode: str, torchs: str) -> None:
    expected = F.pad(T, (2, 1), mode=torchs).numpy()
    assert np.array_equal(run_op("pad", {"x": X}, {"pad": [2, 1], "mode": mode}, ("fp32", expected.shape)), expected)


def test_pad_of_several_axes(run_op: Run) -> None:
    expected = F.pad(T, (3, 0, 1, 2), value=5).numpy()
    found = run_op(
        "pad", {"x": X}, {"pad": [1, 2, 3, 0], "mode": "constant", "constant_val": 5.0}, ("fp32", expected.shape)
    )
    assert np.array_equal(found, expected)


def test_creation(run_op: Run) -> None:
    like = {"ref_tensor": X}
    assert np.array_equal(
        run_op("fill_like", like, {"value": np.float16(2)}, ("fp16", X.shape)), np.full(X.shape, 2, np.float16)
    )
    assert np.array_equal(
        run_op("fill", {"shape": np.array([2, 2], np.int32)}, {"value": 3}, ("int32", (2, 2))), np.full((2, 2), 3)
    )
    bounds = {"start": np.asarray(2, np.int32), "end": np.asarray(9, np.int32)}
    assert run_op("range_1d", bounds, {"step": 3}, ("int32", (None,))).tolist() == [2, 5, 8]
    assert np.array_equal(run_op("tile", {"x": X}, {"reps": [1, 2, 1]}, ("fp32", (2, 6, 4))), T.tile(1, 2, 1).numpy())
    hot = {"one_hot_vector_size": 4, "axis": -1, "on_value": 1.0, "off_value": 0.0}
    indices = np.array([[0, 3], [2, 1]], np.int32)
    expected = F.one_hot(torch.from_numpy(indices).long(), 4).float()
    assert np.array_equal(run_op("one_hot", {"indices": indices}, hot, ("fp32", (2, 2, 4))), expected.numpy())
    found = run_op("one_hot", {"indices": indices}, hot | {"axis": 1}, ("fp32", (2, 4, 2)))
    assert np.array_equal(found, expected.transpose(1, 2).numpy())
    assert run_op("non_zero", {"x": np.array([[0, 2], [3, 0]], np.float32)}, {}, ("int32", (None, 2))).tolist() == [
        [0, 1],
        [1, 0],
    ]


@PROPERTY
@given(st.integers(-1, 3), st.integers(-1, 3))
def test_band_part(run_op: Run, lower: int, upper: int) -> None:
    expected = T + 1 if lower < 0 else torch.triu(T + 1, -lower)
    expected = expected if upper < 0 else torch.tril(expected, upper)
    assert np.array_equal(
        run_op("band_part", {"x": X + 1}, {"lower": lower, "upper": upper}, ("fp32", X.shape)), expected.numpy()
    )


def test_windows(run_op: Run) -> None:
    expected = T.unfold(1, 2, 1).movedim(-1, 2).numpy()
    assert np.array_equal(
        run_op("sliding_windows", {"x": X}, {"axis": 1, "size": 2, "stride": 1}, ("fp32", (2, 2, 2, 4))), expected
    )


@pytest.mark.parametrize(
    ("op", "constants", "shape"),
    [
        ("split", {"axis": 2, "num_splits": 3}, (2, 3, 4)),
        ("split", {"axis": 2, "split_sizes": [1, 2]}, (2, 3, 1)),
        ("reshape", {"shape": [5, 5]}, (5, 5)),
        ("squeeze", {"axes": [1]}, (2, 4)),
        ("pad", {"pad": [0, 4], "mode": "reflect"}, (2, 3, 8)),
        ("pad", {"pad": [0, 4], "mode": "circular"}, (2, 3, 8)),
        ("tile", {"reps": [2]}, (2, 3, 8)),
    ],
)
def test_what_is_not_specified_is_refused(
    run_op: Run, op: str, constants: dict[str, object], shape: tuple[int, ...]
) -> None:
    with pytest.raises(H1ExportError, match=f"op {op} 'out0'"):
        run_op(op, {"x": X}, constants, ("fp32", shape))
