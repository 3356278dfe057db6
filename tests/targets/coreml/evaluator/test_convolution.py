"""Convolution and pooling against PyTorch in float64, in fp16 and fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from h1export.errors import H1ExportError

Run = Callable[..., Any]
Shape = tuple[int, ...]
FLOATS = st.sampled_from(["fp16", "fp32"])
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = {"fp16": np.float16, "fp32": np.float32}
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
CONVS = (F.conv1d, F.conv2d, F.conv3d)
MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVG_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def random(rng: np.random.Generator, shape: Shape, dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


def exact(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def close(found: np.ndarray, expected: torch.Tensor, magnitude: torch.Tensor, *, terms: int, dtype: str) -> None:
    """Check a float32 sum of ``terms`` terms with magnitudes up to ``magnitude`` in total, rounded once."""
    assert found.shape == tuple(expected.shape)
    summed = terms * 2.0**-24 * magnitude.numpy()
    rounded = (2.0**-11 * (expected.abs().numpy() + summed) + 2.0**-25) if dtype == "fp16" else 0.0
    assert (np.abs(found.astype(np.float64) - expected.numpy()) <= summed + rounded).all()


def padded(x: torch.Tensor, pad: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """Convert padding to torch's order, which starts at the last axis."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


@dataclass(frozen=True)
class Layer:
    """A convolution with one to three spatial axes, and its parameters for each axis."""

    x: Shape
    weight: Shape
    strides: list[int]
    dilations: list[int]
    pad: list[int]
    groups: int


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Draw a convolution with an output of at least one element."""
    spatial = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_axis = st.lists(st.integers(1, 3), min_size=spatial, max_size=spatial)
    kernel = draw(per_axis)
    strides = draw(per_axis)
    dilations = draw(per_axis)
    pad = draw(st.lists(st.integers(0, 2), min_size=2 * spatial, max_size=2 * spatial))
    ranges = [
        max(1, (k - 1) * d + 1 - sum(pad[2 * i : 2 * i + 2]))
        for i, (k, d) in enumerate(zip(kernel, dilations, strict=True))
    ]
    sizes = [least + draw(st.integers(0, 3)) for least in ranges]
    inner = draw(st.integers(1, 3))
    outer = draw(st.integers(1, 2))
    return Layer(
        (draw(st.integers(1, 2)), groups * inner, *sizes),
        (groups * outer, inner, *kernel),
        strides,
        dilations,
        pad,
        groups,
    )


@PROPERTY
@given(FLOATS, layers(), st.booleans(), SEEDS)
def test_conv(run_op: Run, dtype: str, layer: Layer, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = random(rng, layer.x, dtype)
    weight = random(rng, layer.weight, dtype)
    bias = random(rng, layer.weight[:1], dtype)
    convolve = CONVS[len(layer.pad) // 2 - 1]
    rest = (layer.strides, 0, layer.dilations, layer.groups)
    t = padded(exact(x), layer.pad)
    w = exact(weight)
    b = exact(bias if biased else np.zeros_like(bias))
    expected = convolve(t, w, b, *rest)
    constants: dict[str, object] = {"strides": layer.strides, "dilations": layer.dilations, "groups": layer.groups}
    constants |= {"pad_type": "custom", "pad": layer.pad} if any(layer.pad) else {"pad_type": "valid"}
    constants |= {"weight": weight} | ({"bias": bias} if biased else {})
    found = run_op("conv", {"x": x}, constants, (dtype, tuple(expected.shape)))
    close(
        found,
        expected,
        convolve(t.abs(), w.abs(), b.abs(), *rest),
        terms=int(np.prod(layer.weight[1:])) + 1,
        dtype=dtype,
    )


def test_conv_by_its_definition(run_op: Run) -> None:
    """The kernel is not flipped, and the weight of a group is applied to the channels of that group alone."""
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((1, 4, 7), (6, 2, 3)))
    expected = np.zeros((1, 6, 3), np.float32)
    for channel, step, inner, tap in np.ndindex(6, 3, 2, 3):
        expected[0, channel, step] += weight[channel, inner, tap] * x[0, channel // 3 * 2 + inner, 2 * step + tap]
    constants = {"weight": weight, "strides": [2], "groups": 2, "pad_type": "valid"}
    assert np.array_equal(run_op("conv", {"x": x}, constants, ("fp32", (1, 6, 3))), expected)


@pytest.mark.parametrize("pad_type", ["same", "same_lower"])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_same_padding_keeps_the_size(run_op: Run, pad_type: str, kernel: int, dilation: int) -> None:
    rng = np.random.default_rng(0)
    x = random(rng, (1, 2, 9), "fp32")
    weight = random(rng, (3, 2, kernel), "fp32")
    t = exact(x)
    w = exact(weight)
    expected = F.conv1d(t, w, padding="same", dilation=dilation)
    found = run_op(
        "conv", {"x": x}, {"weight": weight, "pad_type": pad_type, "dilations": [dilation]}, ("fp32", (1, 3, 9))
    )
    close(
        found, expected, F.conv1d(t.abs(), w.abs(), padding="same", dilation=dilation), terms=2 * kernel, dtype="fp32"
    )


@st.composite
def pools(draw: st.DrawFn) -> tuple[Shape, list[int], list[int], list[int]]:
    """Draw shape, kernel, strides and symmetric padding of at most half the kernel, which PyTorch requires."""
    spatial = draw(st.integers(1, 3))
    kernel, strides = (draw(st.lists(st.integers(1, 3), min_size=spatial, max_size=spatial)) for _ in range(2))
    pad = [draw(st.integers(0, size // 2)) for size in kernel]
    return (
        (*draw(st.tuples(st.integers(1, 2), st.integers(1, 3))), *(size + draw(st.integers(0, 3)) for size in kernel)),
        kernel,
        strides,
        pad,
    )


@PROPERTY
@given(FLOATS, pools(), st.booleans(), SEEDS)
def test_pools(
    run_op: Run, dtype: str, pool: tuple[Shape, list[int], list[int], list[int]], excluded: bool, seed: int
) -> None:
    shape, kernel, strides, pad = pool
    x = random(np.random.default_rng(seed), shape, dtype)
    spatial = len(kernel)
    t = exact(x)
    both = [size for size in pad for _ in range(2)]
    constants: dict[str, object] = {"kernel_sizes": kernel, "strides": strides, "pad_type": "custom", "pad": both}
    expected = MAX_POOLS[spatial - 1](t, kernel, strides, pad)
    assert np.array_equal(run_op("max_pool", {"x": x}, constants, (dtype, tuple(expected.shape))), expected.numpy())
    average = AVG_POOLS[spatial - 1]
    counted = not excluded
    expected = average(t, kernel, strides, pad, count_include_pad=counted)
    found = run_op(
        "avg_pool", {"x": x}, constants | {"exclude_padding_from_average": excluded}, (dtype, tuple(expected.shape))
    )
    close(
        found,
        expected,
        average(t.abs(), kernel, strides, pad, count_include_pad=counted),
        terms=int(np.prod(kernel)) + 1,
        dtype=dtype,
    )


def test_pools_without_strides_move_by_one(run_op: Run) -> None:
    x = np.array([[[-3, -1, -4, -2]]], np.float32)
    constants = {"kernel_sizes": [2], "pad_type": "custom", "pad": [1, 0]}
    assert run_op("max_pool", {"x": x}, constants, ("fp32", (1, 1, 4))).tolist() == [[[-3, -1, -1, -2]]]
    assert run_op("avg_pool", {"x": x}, constants, ("fp32", (1, 1, 4))).tolist() == [[[-1.5, -2, -2.5, -3]]]


X = np.ones((1, 2, 5), np.float32)
W = np.ones((4, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("op", "x", "constants"),
    [
        ("conv", X[0], {"weight": W, "pad_type": "valid"}),
        ("conv", X[None, None, None], {"weight": W[None, None, None], "pad_type": "valid"}),
        ("conv", X, {"weight": W[..., None], "pad_type": "valid"}),
        ("conv", X, {"weight": W, "pad_type": "valid", "groups": 2}),
        ("conv", X, {"weight": W, "pad_type": "valid", "strides": [1, 1]}),
        ("conv", X, {"weight": W, "pad_type": "valid", "dilations": [3]}),
        ("conv", X, {"weight": W, "pad_type": "custom"}),
        ("conv", X, {"weight": W, "pad_type": "custom", "pad": [1]}),
        ("conv", X, {"weight": W, "pad_type": "custom", "pad": [-1, 2]}),
        ("conv", X, {"weight": W, "pad_type": "full"}),
        ("conv", X, {"weight": W, "pad_type": "same", "strides": [2]}),
        ("conv", X, {"weight": W[..., :2], "pad_type": "same_lower"}),
        ("conv", X.astype(np.int32), {"weight": W, "pad_type": "valid"}),
        ("max_pool", X, {"kernel_sizes": [2, 2], "pad_type": "valid"}),
        ("max_pool", X, {"kernel_sizes": [2], "pad_type": "valid", "ceil_mode": True}),
        ("max_pool", X, {"kernel_sizes": [6], "pad_type": "valid"}),
        ("avg_pool", X * np.nan, {"kernel_sizes": [2], "pad_type": "valid", "exclude_padding_from_average": True}),
    ],
)
def test_what_is_not_specified_is_refused(run_op: Run, op: str, x: np.ndarray, constants: dict[str, object]) -> None:
    with pytest.raises(H1ExportError, match=f"function 'main', op {op} 'out0'"):
        run_op(op, {"x": x}, constants, ("fp32", (1, 4, 3)))
