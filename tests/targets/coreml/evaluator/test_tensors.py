"""Ops that move, reduce, gather and scatter, against PyTorch."""

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


@st.composite
def slices(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[bool], list[bool]]:
    """begin, end, stride, begin_mask, end_mask for shape (5, 6), with strides of both signs."""
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


def test_select_and_windows(run_op: Run) -> None:
    cond = X > 7
    tensors = {"cond": cond, "a": X, "b": np.asarray(-1, np.float32)}
    assert np.array_equal(run_op("select", tensors, {}, ("fp32", X.shape)), torch.where(T > 7, T, -1).numpy())
    expected = T.unfold(1, 2, 1).movedim(-1, 2).numpy()
    assert np.array_equal(
        run_op("sliding_windows", {"x": X}, {"axis": 1, "size": 2, "stride": 1}, ("fp32", (2, 2, 2, 4))), expected
    )


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
        ("slice_by_index", {"begin": [0, 2, 0], "end": [2, 1, 4]}, (2, 0, 4)),
        ("slice_by_index", {"begin": [0, 0], "end": [2, 1]}, (2, 1)),
        ("slice_by_index", {"begin": [2, 0, 0], "end": [0, 0, 0], "squeeze_mask": [True, True, True]}, ()),
        ("reduce_sum", {"axes": [3]}, (2, 3, 4)),
        ("topk", {"k": 5}, (2, 3, 5)),
    ],
)
def test_what_is_not_specified_is_refused(
    run_op: Run, op: str, constants: dict[str, object], shape: tuple[int, ...]
) -> None:
    with pytest.raises(H1ExportError, match=f"op {op} 'out0'"):
        run_op(op, {"x": X}, constants, ("fp32", shape))
