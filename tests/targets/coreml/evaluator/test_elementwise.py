"""Elementwise ops and activations against PyTorch, in fp16 and fp32."""

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
FLOATS = st.sampled_from(["fp16", "fp32"])
SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = {"fp16": np.float16, "fp32": np.float32}
PROPERTY = settings(deadline=None, max_examples=12, derandomize=True)


def close(found: np.ndarray, expected: torch.Tensor, dtype: str) -> None:
    """Check up to two units in the last place of fp16, or the difference of two libraries in float32."""
    reference = expected.float().numpy() if expected.is_floating_point() else expected.numpy()
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            reference = reference.astype(np.float16)
    rtol = 2e-3 if dtype == "fp16" else 3e-5
    atol = 1e-6
    np.testing.assert_allclose(
        found.astype(np.float32), reference.astype(np.float32), rtol=rtol, atol=atol, equal_nan=True
    )


UNARY: dict[
    str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, float], float]
] = {  # op -> (torch, constants, scale of inputs)
    "abs": (torch.abs, {}, 10),
    "acos": (torch.acos, {}, 0.4),
    "asin": (torch.asin, {}, 0.4),
    "atan": (torch.atan, {}, 3),
    "atanh": (torch.atanh, {}, 0.4),
    "ceil": (torch.ceil, {}, 10),
    "clamped_relu": (lambda x: torch.where(x >= 0, x, 0.25 * x).clamp(max=2), {"alpha": 0.25, "beta": 2.0}, 3),
    "clip": (lambda x: x.clamp(-0.5, 1.5), {"alpha": -0.5, "beta": 1.5}, 2),
    "cos": (torch.cos, {}, 5),
    "cosh": (torch.cosh, {}, 2),
    "elu": (lambda x: F.elu(x, 0.5), {"alpha": 0.5}, 3),
    "erf": (torch.erf, {}, 2),
    "exp": (torch.exp, {}, 4),
    "exp2": (torch.exp2, {}, 4),
    "floor": (torch.floor, {}, 10),
    "gelu": (F.gelu, {}, 3),
    "identity": (lambda x: x, {}, 100),
    "inverse": (lambda x: 1 / (x + 0.0625), {"epsilon": 0.0625}, 3),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.125), {"alpha": 0.125}, 3),
    "linear_activation": (lambda x: 0.5 * x + 3, {"alpha": 0.5, "beta": 3.0}, 3),
    "log": (lambda x: torch.log(x + 0.5), {"epsilon": 0.5}, 3),
    "relu": (F.relu, {}, 3),
    "relu6": (F.relu6, {}, 6),
    "round": (torch.round, {}, 10),
    "rsqrt": (lambda x: torch.rsqrt(x + 0.5), {"epsilon": 0.5}, 3),
    "scaled_tanh": (lambda x: 1.5 * torch.tanh(0.5 * x), {"alpha": 1.5, "beta": 0.5}, 3),
    "sigmoid": (torch.sigmoid, {}, 8),
    "sigmoid_hard": (lambda x: (0.25 * x + 0.5).clamp(0, 1), {"alpha": 0.25, "beta": 0.5}, 3),
    "sign": (torch.sign, {}, 3),
    "silu": (F.silu, {}, 8),
    "sin": (torch.sin, {}, 5),
    "sinh": (torch.sinh, {}, 2),
    "softplus": (F.softplus, {}, 8),
    "softsign": (F.softsign, {}, 3),
    "sqrt": (torch.sqrt, {}, 3),
    "square": (torch.square, {}, 3),
    "tan": (torch.tan, {}, 0.4),
    "tanh": (torch.tanh, {}, 2),
    "threshold": (lambda x: x.clamp(min=0.5), {"alpha": 0.5}, 3),
    "thresholded_relu": (lambda x: F.threshold(x, 0.5, 0), {"alpha": 0.5}, 3),
}


@pytest.mark.parametrize("op", sorted(UNARY))
@PROPERTY
@given(FLOATS, SHAPES, SEEDS)
def test_unary(run_op: Run, op: str, dtype: str, shape: tuple[int, ...], seed: int) -> None:
    reference, constants, scale = UNARY[op]
    x = np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale).astype(DTYPES[dtype])
    found = run_op(op, {"x": x}, {name: DTYPES[dtype](value) for name, value in constants.items()}, (dtype, shape))
    close(found, reference(torch.from_numpy(x).float()), dtype)


@pytest.mark.parametrize(("mode", "approximate"), [("EXACT", "none"), ("TANH_APPROXIMATION", "tanh")])
@PROPERTY
@given(FLOATS, SEEDS)
def test_gelu(run_op: Run, mode: str, approximate: str, dtype: str, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, 7)) * 3).astype(DTYPES[dtype])
    close(
        run_op("gelu", {"x": x}, {"mode": mode}, (dtype, (3, 7))),
        F.gelu(torch.from_numpy(x).float(), approximate=approximate),
        dtype,
    )


def test_gelu_by_sigmoid(run_op: Run) -> None:
    x = np.linspace(-8, 8, 33, dtype=np.float32)
    t = torch.from_numpy(x)
    close(
        run_op("gelu", {"x": x}, {"mode": "SIGMOID_APPROXIMATION"}, ("fp32", (33,))),
        t * torch.sigmoid(1.702 * t),
        "fp32",
    )


@pytest.mark.parametrize("op", ["silu", "sigmoid", "softplus", "tanh", "erf", "gelu", "elu"])
def test_extremes_do_not_overflow(run_op: Run, op: str) -> None:
    x = np.array([-60000, -1000, -30, 0, 30, 1000, 60000], np.float16)
    reference, constants, _ = UNARY[op]
    found = run_op(op, {"x": x}, {name: np.float16(value) for name, value in constants.items()}, ("fp16", (7,)))
    close(found, reference(torch.from_numpy(x).float()), "fp16")


BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": torch.div,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": torch.remainder,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
COMPARISONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
}


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw two shapes that broadcast."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    first, second = ([size if draw(st.booleans()) else 1 for size in shape] for _ in range(2))
    return tuple(first), tuple(second[draw(st.integers(0, len(shape))) :])


@pytest.mark.parametrize("op", sorted(BINARY))
@PROPERTY
@given(st.sampled_from(["fp16", "fp32", "int32"]), broadcasts(), SEEDS)
def test_binary(run_op: Run, op: str, dtype: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    if dtype == "int32" and op == "real_div":
        dtype = "fp32"
    rng = np.random.default_rng(seed)
    kind = {**DTYPES, "int32": np.int32}[dtype]
    x, y = (np.asarray(rng.standard_normal(shape) * 10).astype(kind) for shape in shapes)
    y = np.where(y == 0, kind(3), y)
    tx, ty = (torch.from_numpy(array) for array in (x, y))
    expected = BINARY[op](*(tx, ty) if dtype == "int32" else (tx.float(), ty.float()))
    close(run_op(op, {"x": x, "y": y}, {}, (dtype, tuple(expected.shape))), expected, dtype)


@pytest.mark.parametrize("op", sorted(COMPARISONS))
@PROPERTY
@given(st.sampled_from([np.float16, np.float32, np.int32]), SEEDS)
def test_comparison(run_op: Run, op: str, kind: type, seed: int) -> None:
    x, y = (np.random.default_rng(seed + i).integers(-2, 3, (3, 5)).astype(kind) for i in range(2))
    expected = COMPARISONS[op](torch.from_numpy(x), torch.from_numpy(y))
    assert np.array_equal(run_op(op, {"x": x, "y": y}, {}, ("bool", (3, 5))), expected.numpy())


@pytest.mark.parametrize("op", ["logical_and", "logical_or", "logical_xor"])
def test_logic(run_op: Run, op: str) -> None:
    x = np.array([[False, True]])
    y = np.array([[False], [True]])
    expected = getattr(torch, op)(torch.from_numpy(x), torch.from_numpy(y))
    assert np.array_equal(run_op(op, {"x": x, "y": y}, {}, ("bool", (2, 2))), expected.numpy())


def test_logical_not(run_op: Run) -> None:
    assert run_op("logical_not", {"x": np.array([True, False])}, {}, ("bool", (2,))).tolist() == [False, True]


@PROPERTY
@given(FLOATS, SEEDS)
def test_pow(run_op: Run, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.1, 3, (4, 3)).astype(DTYPES[dtype])
    y = rng.uniform(-2, 3, 3).astype(DTYPES[dtype])
    close(
        run_op("pow", {"x": x, "y": y}, {}, (dtype, (4, 3))),
        torch.from_numpy(x).float() ** torch.from_numpy(y).float(),
        dtype,
    )


@PROPERTY
@given(st.sampled_from(["bool", "fp16", "fp32", "int8", "int16", "int32", "uint8", "uint16"]), st.booleans(), SEEDS)
def test_cast(run_op: Run, dtype: str, signed: bool, seed: int) -> None:
    x = (
        np.random.default_rng(seed)
        .uniform(-100 if signed and not dtype.startswith("u") else 0, 100, 9)
        .astype(np.float32)
    )
    kind = {"bool": torch.bool, "fp16": torch.float16, "fp32": torch.float32}.get(dtype) or getattr(torch, dtype)
    assert np.array_equal(
        run_op("cast", {"x": x}, {"dtype": dtype}, (dtype, (9,))), torch.from_numpy(x).to(kind).numpy()
    )


@pytest.mark.parametrize(
    ("value", "dtype"), [(3e9, "int32"), (-1.0, "uint8"), (np.nan, "int32"), (np.inf, "int16"), (70000.0, "uint16")]
)
def test_cast_outside_the_type_is_refused(run_op: Run, value: float, dtype: str) -> None:
    with pytest.raises(H1ExportError, match="outside"):
        run_op("cast", {"x": np.array([0, value], np.float32)}, {"dtype": dtype}, (dtype, (2,)))


def test_prelu_and_parametric_softplus_have_one_value_a_channel(run_op: Run) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    alpha = np.array([0.1, 0.2, 0.3], np.float32)
    beta = np.array([1, 2, 3], np.float32)
    t = torch.from_numpy(x)
    a = torch.from_numpy(alpha)
    b = torch.from_numpy(beta)
    close(run_op("prelu", {"x": x}, {"alpha": alpha}, ("fp32", x.shape)), F.prelu(t, a), "fp32")
    expected = a[:, None] * F.softplus(b[:, None] * t)
    close(run_op("softplus_parametric", {"x": x}, {"alpha": alpha, "beta": beta}, ("fp32", x.shape)), expected, "fp32")


@PROPERTY
@given(FLOATS, st.integers(-3, 2), SEEDS)
def test_softmax(run_op: Run, dtype: str, axis: int, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((2, 3, 4)) * 20).astype(DTYPES[dtype])
    close(
        run_op("softmax", {"x": x}, {"axis": axis}, (dtype, x.shape)),
        torch.softmax(torch.from_numpy(x).float(), axis),
        dtype,
    )


@pytest.mark.parametrize(
    ("op", "tensors", "constants"),
    [
        ("gelu", {"x": np.ones(2, np.float32)}, {"mode": "FAST"}),
        ("clip", {"x": np.ones(2, np.float32)}, {"alpha": 2.0, "beta": 1.0}),
        ("cast", {"x": np.ones(2, np.float32)}, {"dtype": "fp64"}),
        ("floor_div", {"x": np.ones(2, np.int32), "y": np.zeros(2, np.int32)}, {}),
        ("mod", {"x": np.ones(2, np.int32), "y": np.zeros(2, np.int32)}, {}),
        ("real_div", {"x": np.ones(2, np.int32), "y": np.ones(2, np.int32)}, {}),
        ("softmax", {"x": np.ones(2, np.float32)}, {"axis": 1}),
        ("sqrt", {"x": np.ones(2, np.int32)}, {}),
        ("softmax", {"x": np.ones(2, np.float32)}, {"axis": 0.5}),
        ("softmax", {"x": np.ones(2, np.float32)}, {"axis": [0, 1]}),
        ("add", {"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)}, {}),
    ],
)
def test_what_is_not_specified_is_refused(
    run_op: Run, op: str, tensors: dict[str, np.ndarray], constants: dict[str, object]
) -> None:
    with pytest.raises(H1ExportError, match=f"function 'main', op {op} 'out0'"):
        run_op(op, tensors, constants, ("fp32", (2,)))
