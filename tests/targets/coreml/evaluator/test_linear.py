"""Linear algebra, attention and normalisation against PyTorch in float64, in fp16 and fp32."""

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
Shape = tuple[int, ...]
FLOATS = st.sampled_from(["fp16", "fp32"])
LEADING = st.lists(st.integers(1, 3), max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = {"fp16": np.float16, "fp32": np.float32}
ROUNDING = {"fp16": 2.0**-11, "fp32": 2.0**-24}  # half a unit in the last place
PROPERTY = settings(deadline=None, max_examples=25, derandomize=True)


def random(rng: np.random.Generator, shape: Shape, dtype: str) -> np.ndarray:
    return np.asarray(rng.standard_normal(shape)).astype(DTYPES[dtype])


def exact(*arrays: np.ndarray) -> list[torch.Tensor]:
    """Return the array as a float64 tensor."""
    return [torch.from_numpy(array.astype(np.float64)) for array in arrays]


def close(
    found: np.ndarray, expected: torch.Tensor, magnitude: torch.Tensor | float, *, terms: int, dtype: str
) -> None:
    """Check the result of ``terms`` float32 operations in a row on numbers up to ``magnitude``.

    The result may have been rounded to the declared type once.
    """
    reference = expected.numpy()
    computed = terms * 2.0**-24 * np.asarray(magnitude)
    rounded = ROUNDING[dtype] * (np.abs(reference) + computed) + (
        2.0**-25 if dtype == "fp16" else 0.0
    )  # 2^-25 is the error of a subnormal
    excess = np.abs(found.astype(np.float64) - reference) - computed - rounded
    assert found.shape == reference.shape
    assert not excess.size or excess.max() <= 0


@PROPERTY
@given(FLOATS, LEADING, st.integers(1, 40), st.integers(1, 9), st.booleans(), SEEDS)
def test_linear(run_op: Run, dtype: str, leading: Shape, d_in: int, d_out: int, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, bias = (random(rng, shape, dtype) for shape in ((*leading, d_in), (d_out, d_in), (d_out,)))
    constants = {"weight": weight, "bias": bias} if biased else {"weight": weight}
    found = run_op("linear", {"x": x}, constants, (dtype, (*leading, d_out)))
    tensors = exact(x, weight, bias if biased else np.zeros(d_out))
    close(found, F.linear(*tensors), F.linear(*(t.abs() for t in tensors)), terms=d_in + 1, dtype=dtype)


def test_sums_are_kept_in_float32(run_op: Run) -> None:
    """The sum of 4096 ones is 4096; with fp16 sums it would be 2048."""
    ones = np.ones((1, 4096), np.float16)
    assert run_op("linear", {"x": ones}, {"weight": ones}, ("fp16", (1, 1))) == 4096
    assert run_op("matmul", {"x": ones, "y": ones}, {"transpose_y": True}, ("fp16", (1, 1))) == 4096


@st.composite
def products(draw: st.DrawFn) -> tuple[Shape, Shape, bool, bool]:
    """Draw the shapes of batches of matrices that broadcast, and which of them are transposed."""
    m, k, n = (draw(st.integers(1, 6)) for _ in range(3))
    batch = draw(LEADING)
    first, second = (tuple(size if draw(st.booleans()) else 1 for size in batch) for _ in range(2))
    second = second[draw(st.integers(0, len(batch))) :]
    transpose_x = draw(st.booleans())
    transpose_y = draw(st.booleans())
    return (
        (*first, *((k, m) if transpose_x else (m, k))),
        (*second, *((n, k) if transpose_y else (k, n))),
        transpose_x,
        transpose_y,
    )


@PROPERTY
@given(FLOATS, products(), SEEDS)
def test_matmul(run_op: Run, dtype: str, product: tuple[Shape, Shape, bool, bool], seed: int) -> None:
    first, second, transpose_x, transpose_y = product
    rng = np.random.default_rng(seed)
    x = random(rng, first, dtype)
    y = random(rng, second, dtype)
    a, b = exact(x, y)
    a = a.mT if transpose_x else a
    b = b.mT if transpose_y else b
    flags = {"transpose_x": transpose_x, "transpose_y": transpose_y}
    expected = a @ b
    found = run_op("matmul", {"x": x, "y": y}, flags, (dtype, tuple(expected.shape)))
    close(found, expected, a.abs() @ b.abs(), terms=a.shape[-1], dtype=dtype)


@PROPERTY
@given(products(), SEEDS)
def test_matmul_of_integers_is_exact(run_op: Run, product: tuple[Shape, Shape, bool, bool], seed: int) -> None:
    first, second, transpose_x, transpose_y = product
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-9999, 9999, shape).astype(np.int32) for shape in (first, second))
    expected = (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)
    flags = {"transpose_x": transpose_x, "transpose_y": transpose_y}
    assert np.array_equal(run_op("matmul", {"x": x, "y": y}, flags, ("int32", expected.shape)), expected)


@pytest.mark.parametrize(
    ("first", "second"), [((4,), (4,)), ((4,), (4, 3)), ((2, 4), (4,)), ((4,), (5, 4, 3)), ((5, 2, 4), (4,))]
)
def test_matmul_with_a_vector_takes_no_transposition_of_it(run_op: Run, first: Shape, second: Shape) -> None:
    rng = np.random.default_rng(0)
    x = random(rng, first, "fp32")
    y = random(rng, second, "fp32")
    a, b = exact(x, y)
    flags = {"transpose_x": len(first) == 1, "transpose_y": len(second) == 1}
    found = run_op("matmul", {"x": x, "y": y}, flags, ("fp32", tuple((a @ b).shape)))
    close(found, a @ b, a.abs() @ b.abs(), terms=4, dtype="fp32")


@pytest.mark.parametrize(
    ("equation", "first", "second"),
    [
        ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)),
        ("bqhk, bkhd -> bqhd", (2, 3, 4, 5), (2, 5, 4, 6)),
        ("chw,whr->chr", (2, 3, 4), (4, 3, 5)),
    ],
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_einsum(run_op: Run, equation: str, first: Shape, second: Shape, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = random(rng, first, dtype)
    y = random(rng, second, dtype)
    a, b = exact(x, y)
    expected = torch.einsum(equation, a, b)
    found = run_op("einsum", {"values": [x, y]}, {"equation": equation}, (dtype, tuple(expected.shape)))
    close(found, expected, torch.einsum(equation, a.abs(), b.abs()), terms=first[-1], dtype=dtype)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Shape, Shape, Shape, Shape | None]:
    """Draw the shapes of query, key, value, and a mask that broadcasts to the scores; None stands for no mask."""
    leading = (draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 3), max_size=2)))
    length, source, depth, width = (draw(st.integers(1, 6)) for _ in range(4))
    mask = tuple(size if draw(st.booleans()) else 1 for size in leading) if draw(st.booleans()) else None
    if mask is not None:
        mask = (*mask, length, source)[draw(st.integers(0, len(leading))) :]
    return (*leading, length, depth), (*leading, source, depth), (*leading, source, width), mask


@PROPERTY
@given(FLOATS, attentions(), st.booleans(), SEEDS)
def test_attention(
    run_op: Run, dtype: str, shapes: tuple[Shape, Shape, Shape, Shape | None], boolean: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    query, key, value = (random(rng, shape, dtype) for shape in shapes[:3])
    tensors = {"query": query, "key": key, "value": value}
    mask = None
    q, k, v = exact(query, key, value)
    if shapes[3] is not None and boolean:
        tensors["attn_mask"] = rng.random(shapes[3]) < 0.5
        tensors["attn_mask"][..., :1] = True  # every row attends to something
        mask = torch.from_numpy(tensors["attn_mask"])
    elif shapes[3] is not None:
        tensors["attn_mask"] = random(rng, shapes[3], dtype)
        (mask,) = exact(tensors["attn_mask"])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = run_op("scaled_dot_product_attention", tensors, {}, (dtype, tuple(expected.shape)))
    scores = float((q.abs() @ k.abs().mT).max()) + 4  # a mask of normal numbers is smaller than 4 but for one in 16000
    close(found, expected, float(v.abs().max()) * (1 + scores), terms=q.shape[-1] + 2 * k.shape[-2], dtype=dtype)


def test_attention_to_what_minus_infinity_masks_is_nothing(run_op: Run) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: random(rng, (1, 3, 4), "fp16") for name in ("query", "key", "value")}
    causal = np.tril(np.ones((3, 3), np.bool_))
    added = np.where(causal, np.float16(0), np.float16(-np.inf))
    by_bool, by_sum = (
        run_op("scaled_dot_product_attention", tensors | {"attn_mask": mask}, {}, ("fp16", (1, 3, 4)))
        for mask in (causal, added)
    )
    assert np.array_equal(by_bool, by_sum)
    assert np.array_equal(by_bool[:, 0], tensors["value"][:, 0])


def test_a_row_that_attends_to_nothing_is_nan(run_op: Run) -> None:
    tensors = {name: np.ones((1, 2, 4), np.float32) for name in ("query", "key", "value")}
    found = run_op(
        "scaled_dot_product_attention",
        tensors | {"attn_mask": np.array([[True, False], [False, False]])},
        {},
        ("fp32", (1, 2, 4)),
    )
    assert np.array_equal(found[0, 0], np.ones(4))
    assert np.isnan(found[0, 1]).all()


def affine(rng: np.random.Generator, shape: Shape, dtype: str, *, present: bool) -> dict[str, np.ndarray]:
    """Return gamma and beta, or {} if they are not ``present``."""
    return {name: random(rng, shape, dtype) for name in ("gamma", "beta")} if present else {}


def magnitude(x: torch.Tensor, variance: torch.Tensor, epsilon: float, *, parts: dict[str, np.ndarray]) -> torch.Tensor:
    """Return the error in the result of one rounding of x or its mean, in units of 2^-24.

    It may be much larger than the rounding, because the spread may be much smaller than x.
    """
    gamma, beta = (
        float(np.abs(parts[name]).max()) if name in parts else other for name, other in (("gamma", 1.0), ("beta", 0.0))
    )
    return gamma * x.abs().max() / torch.sqrt(variance.min() + epsilon) + beta


@PROPERTY
@given(
    FLOATS,
    st.lists(st.integers(-4, 3), min_size=1, max_size=4, unique_by=lambda a: a % 4),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_layer_norm(run_op: Run, dtype: str, axes: list[int], scaled: bool, default: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = sorted(axes, key=lambda axis: axis % 4)
    x = random(rng, (2, 3, 4, 5), dtype)
    last = [axis % 4 for axis in axes]
    order = [axis for axis in range(4) if axis not in last] + last
    sizes = tuple(x.shape[axis] for axis in last)
    parts = affine(rng, sizes, dtype, present=scaled)
    epsilon = DTYPES[dtype](1e-5 if default else 0.125)
    (t,) = exact(x.transpose(order))
    expected = F.layer_norm(t, sizes, *exact(*parts.values()), eps=float(epsilon)).permute(*np.argsort(order).tolist())
    found = run_op(
        "layer_norm", {"x": x}, {"axes": axes, **parts} | ({} if default else {"epsilon": epsilon}), (dtype, x.shape)
    )
    variance = t.flatten(len(order) - len(last)).var(-1, correction=0)
    close(
        found, expected, magnitude(t, variance, float(epsilon), parts=parts), terms=8 + int(np.prod(sizes)), dtype=dtype
    )


def test_layer_norm_of_all_axes(run_op: Run) -> None:
    x = random(np.random.default_rng(0), (2, 3), "fp32")
    (t,) = exact(x)
    close(run_op("layer_norm", {"x": x}, {}, ("fp32", (2, 3))), F.layer_norm(t, (2, 3)), 4.0, terms=14, dtype="fp32")


@PROPERTY
@given(FLOATS, st.sampled_from([(2, 3, 5), (2, 3, 4, 2), (1, 1, 7)]), st.booleans(), SEEDS)
def test_instance_norm(run_op: Run, dtype: str, shape: Shape, scaled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = random(rng, shape, dtype)
    epsilon = DTYPES[dtype](1e-3)
    parts = affine(rng, shape[1:2], dtype, present=scaled)
    (t,) = exact(x)
    weights = dict(zip(("weight", "bias"), exact(*parts.values()), strict=False))
    expected = F.instance_norm(t, **weights, eps=float(epsilon))
    found = run_op("instance_norm", {"x": x}, {**parts, "epsilon": epsilon}, (dtype, shape))
    variance = t.flatten(2).var(-1, correction=0)
    close(
        found,
        expected,
        magnitude(t, variance, float(epsilon), parts=parts),
        terms=8 + int(np.prod(shape[2:])),
        dtype=dtype,
    )


@PROPERTY
@given(FLOATS, st.sampled_from([(2, 3, 5), (2, 3, 4, 2), (1, 3, 2, 2, 2)]), st.booleans(), SEEDS)
def test_batch_norm(run_op: Run, dtype: str, shape: Shape, scaled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = random(rng, shape, dtype)
    mean = random(rng, (3,), dtype)
    epsilon = DTYPES[dtype](1e-3)
    variance = np.abs(random(rng, (3,), dtype))
    parts = affine(rng, (3,), dtype, present=scaled)
    t, m, v, *weights = exact(x, mean, variance, *parts.values())
    expected = F.batch_norm(t, m, v, *weights, eps=float(epsilon))
    found = run_op(
        "batch_norm", {"x": x}, {"mean": mean, "variance": variance, **parts, "epsilon": epsilon}, (dtype, shape)
    )
    close(
        found,
        expected,
        2 * magnitude(torch.stack([t.abs().max(), m.abs().max()]), v, float(epsilon), parts=parts),
        terms=8,
        dtype=dtype,
    )


@PROPERTY
@given(FLOATS, st.sampled_from([(3, 4, 5), (2, 3, 1, 2), (2, 2, 2, 2, 2)]), SEEDS)
def test_l2_norm(run_op: Run, dtype: str, shape: Shape, seed: int) -> None:
    x = random(np.random.default_rng(seed), shape, dtype)
    epsilon = DTYPES[dtype](0.25)
    (t,) = exact(x)
    expected = t / torch.sqrt(torch.linalg.vector_norm(t, dim=(-3, -2, -1), keepdim=True) ** 2 + float(epsilon))
    close(
        run_op("l2_norm", {"x": x}, {"epsilon": epsilon}, (dtype, shape)),
        expected,
        expected.abs(),
        terms=4 + x[0].size,
        dtype=dtype,
    )


X = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("op", "tensors", "constants"),
    [
        ("linear", {"x": X}, {"weight": np.ones((5, 3), np.float32)}),
        ("linear", {"x": X}, {"weight": np.ones((5, 4), np.float32), "bias": np.ones(4, np.float32)}),
        ("matmul", {"x": X, "y": X}, {}),
        ("matmul", {"x": X, "y": np.ones((3, 4, 3), np.float32)}, {}),
        ("einsum", {"values": [X, X]}, {"equation": "abc,abc->abc"}),
        ("einsum", {"values": [X, X, X]}, {"equation": "chw,whr->chr"}),
        ("scaled_dot_product_attention", {"query": X, "key": X[:1], "value": X[:1]}, {}),
        ("scaled_dot_product_attention", {"query": X, "key": X, "value": X[:, :2]}, {}),
        ("scaled_dot_product_attention", {"query": X[0], "key": X[0], "value": X[0]}, {}),
        (
            "scaled_dot_product_attention",
            {"query": X, "key": X, "value": X, "attn_mask": np.ones((2, 3, 2), np.bool_)},
            {},
        ),
        ("layer_norm", {"x": X}, {"axes": [3]}),
        ("layer_norm", {"x": X}, {"axes": [2], "gamma": np.ones(3, np.float32)}),
        ("layer_norm", {"x": X.astype(np.int32)}, {"axes": [2]}),
        ("instance_norm", {"x": X[0]}, {}),
        ("batch_norm", {"x": X}, {"mean": np.ones(2, np.float32), "variance": np.ones(3, np.float32)}),
        ("l2_norm", {"x": X[0]}, {}),
    ],
)
def test_what_is_not_specified_is_refused(
    run_op: Run, op: str, tensors: dict[str, Any], constants: dict[str, object]
) -> None:
    with pytest.raises(H1ExportError, match=f"function 'main', op {op} 'out0'"):
        run_op(op, tensors, constants, ("fp32", (2, 3, 4)))
