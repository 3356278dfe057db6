"""QMatMul against float64 on the same integers, and against MatMulNBits, whose codes it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from h1export.targets.onnxruntime.emit.packing import NBitsLayout

RunOp = Callable[..., list[Any]]
FORMATS = [(bits, block) for bits in (4, 8) for block in (16, 32, 64, 128)]


class Case:
    """Random weights as an artifact stores them, random activations; ``bias``: with factors and biases for the rows."""

    def __init__(
        self,
        bits: int,
        block: int,
        rows: int,
        columns: int,
        lead: tuple[int, ...] = (1,),
        bias: bool = False,
        seed: int = 0,
    ):
        rng = np.random.default_rng(seed)
        self.layout = NBitsLayout(bits, block, columns)
        low = self.layout.zero_point
        self.integers = rng.integers(-low, low, (rows, columns)).astype(
            np.int8
        )  # every code, those that our own scheme avoids too
        self.codes = self.layout.pack(self.integers)
        self.scales = (rng.uniform(0.01, 0.1, (rows, self.layout.blocks)) / low).astype(np.float16)
        self.x = rng.standard_normal((*lead, columns)).astype(np.float32)
        self.bias = rng.standard_normal(rows).astype(np.float32) if bias else None
        self.factors = rng.uniform(-2, 2, rows).astype(np.float32) if bias else None

    @property
    def weight(self) -> dict[str, Any]:
        return {"codes": self.codes, "scales": self.scales, "factors": self.factors, "bias": self.bias}

    @property
    def weight_scales(self) -> Any:
        """float64 [rows, blocks], factors included."""
        return (
            self.scales
            * (np.ones(len(self.scales)) if self.factors is None else self.factors.astype(np.float64))[:, None]
        )

    @property
    def attributes(self) -> dict[str, int]:
        return {
            "K": self.layout.columns,
            "N": len(self.codes),
            "bits": self.layout.bits,
            "block_size": self.layout.block_size,
        }

    def run(self, run_op: RunOp, level: int, threads: int = 2) -> Any:
        constants = {name: self.weight[name] for name in ("codes", "scales")}
        (y,) = run_op(
            "QMatMul",
            {"x": self.x, **self.weight},
            threads=threads,
            constants=constants,
            accuracy_level=level,
            **self.attributes,
        )
        return y

    def reference(self, rounded: bool) -> Any:
        """float64; ``rounded``: with x rounded as accuracy level 4 does it."""
        layout = self.layout
        x = self.x.astype(np.float64)
        weights = self.integers * np.repeat(self.weight_scales, layout.block_size, axis=1)[:, : layout.columns]
        if rounded:
            padded = np.zeros((*x.shape[:-1], layout.blocks * layout.block_size))
            padded[..., : layout.columns] = x
            blocks = padded.reshape(*x.shape[:-1], layout.blocks, layout.block_size)
            scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
            x = (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(padded.shape)[..., : layout.columns]
        return x @ weights.T + (0 if self.bias is None else self.bias)

    def summed(self, expected: Any) -> float:
        """The size of what is summed, codes as they are stored: it does not vanish where few random terms cancel."""
        terms = (
            np.abs(self.x).max() * self.layout.zero_point * np.abs(self.weight_scales).max() * np.sqrt(self.x.shape[-1])
        )
        return float(terms + np.abs(expected).max())

    def error(self, y: Any, expected: Any) -> float:
        """Largest difference relative to the largest value."""
        assert y.shape == expected.shape
        return float(np.abs(y - expected).max() / np.abs(expected).max())


# Few tokens and many take different kernels (the limit is 8). Their steps are 2 or 4 rows and 4 tokens, or 16 rows and
# 4, 12 or 16 tokens; an item for a thread has up to 64 rows.
SHAPES = (
    st.sampled_from(FORMATS),
    st.integers(1, 70),
    st.integers(1, 400),
    st.integers(1, 33),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(*SHAPES)
@example((4, 32), 37, 96, 1, True, 0)  # a last chunk with one block of two
@example((4, 16), 5, 16 * 7, 9, False, 1)
def test_rounded(
    run_op: RunOp, form: tuple[int, int], rows: int, columns: int, tokens: int, bias: bool, seed: int
) -> None:
    """Integers are exact, so only the sum over blocks rounds: some half units in the last place of float32, 6e-8.

    Where a quotient lies half-way between two integers float32 may round to the other: half a step of one activation.
    """
    case = Case(*form, rows, columns, (tokens,), bias, seed)
    expected = case.reference(rounded=True)
    y = case.run(run_op, 4)
    step = np.abs(case.x).max() / 127 * np.abs(case.weight_scales).max() * case.layout.zero_point
    differences = np.abs(y - expected)
    assert differences.max() < step + 1e-6 * case.summed(expected)
    assert np.median(differences) < 1e-6 * case.summed(expected)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(*SHAPES, st.sampled_from([0, 4]))
def test_tokens_of_different_sequences_do_not_depend_on_each_other(
    run_op: RunOp, form: tuple[int, int], rows: int, columns: int, tokens: int, bias: bool, seed: int, level: int
) -> None:
    """Bit for bit, however many there are."""
    case = Case(*form, rows, columns, (tokens, 1), bias, seed)
    together, every = case.run(run_op, level), case.x
    for token in {0, tokens // 2, tokens - 1}:
        case.x = every[token : token + 1]
        np.testing.assert_array_equal(together[token : token + 1], case.run(run_op, level))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(*SHAPES)
def test_float32(
    run_op: RunOp, form: tuple[int, int], rows: int, columns: int, tokens: int, bias: bool, seed: int
) -> None:
    case = Case(*form, rows, columns, (tokens,), bias, seed)
    expected = case.reference(rounded=False)
    # each of the products and sums rounds to 6e-8
    assert np.abs(case.run(run_op, 0) - expected).max() < 1e-6 * case.summed(expected)


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32)])
@pytest.mark.parametrize(("columns", "slab"), [(64, 1024), (4096, 256)])
def test_few_tokens_behind_a_slab(run_op: RunOp, bits: int, block: int, *, columns: int, slab: int) -> None:
    """Tokens are rounded by slabs of as many as fit a cache, and multiplied four at a time and more."""
    for tokens in (slab, slab + 1, slab + 2, slab + 3, slab + 4, 2 * slab + 1):
        case = Case(bits, block, 20, columns, (tokens,))
        case.x = np.rint(20 * case.x)  # integers, and a block's largest is 127: none lies between two codes
        case.x[:, ::block] = 127
        assert case.error(case.run(run_op, 4), case.reference(rounded=True)) < 1e-6, tokens


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 32)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_agrees_with_matmul_nbits(run_op: RunOp, bits: int, block: int, tokens: int, level: int) -> None:
    case = Case(bits, block, 130, 1024, (2, tokens))
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", accuracy_level=level, **case.attributes
    )
    fed = {"x": case.x, "codes": case.codes, "scales": case.scales.astype(np.float32)}
    types = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in fed.items()
    ]
    graph = helper.make_graph([node], "stock", types, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    (stock,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, fed)
    # level 4 rounds activations to 0.5 / 127 of their block's largest; MatMulNBits' int8 kernel rounds them otherwise
    assert case.error(case.run(run_op, level), stock) < (1e-2 if level else 1e-6)


def test_extreme_codes_and_activations_do_not_overflow(run_op: RunOp) -> None:
    """Every product at its largest, of either sign: what int16 sums inside the kernels must hold."""
    for bits, block in FORMATS:
        for tokens in (1, 9):
            for sign in (-1, 1):
                case = Case(bits, block, 16, 256, (tokens,))
                top = case.layout.zero_point
                case.integers[:8] = -top
                case.integers[8:] = top - 1
                case.codes = case.layout.pack(case.integers)
                case.x = np.full((tokens, 256), sign, np.float32)
                assert case.error(case.run(run_op, 4), case.reference(rounded=True)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 4, 9, 13])
@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_integers_are_exact(run_op: RunOp, bits: int, block: int, *, tokens: int) -> None:
    """Scales of one, and codes and activations up to the largest: no instruction saturates or drops a bit."""
    rng = np.random.default_rng(tokens)
    layout = NBitsLayout(bits, block, 3 * block)
    zero = layout.zero_point
    integers = rng.choice([-zero, -zero + 1, 0, zero - 1], (21, layout.columns))
    x = rng.choice([-127, -126, 0, 1, 127], (tokens, layout.columns))
    x[:, ::block] = 127  # the scale of every block is 1
    feeds = {
        "x": x.astype(np.float32),
        "codes": layout.pack(integers.astype(np.int8)),
        "scales": np.ones((21, 3), np.float16),
    }
    attributes = {"K": layout.columns, "N": 21, "bits": bits, "block_size": block, "accuracy_level": 4}
    (y,) = run_op("QMatMul", feeds | {"factors": None, "bias": None}, **attributes)
    assert np.array_equal(y, x @ integers.T)


def test_magnitudes_from_block_to_block(run_op: RunOp) -> None:
    """Zeros, tiny and huge blocks in one row: each block has its own scale."""
    for tokens in (1, 9):
        case = Case(4, 32, 40, 256, (tokens,))
        case.x *= np.repeat([0, 1e-38, 1e-10, 1, 1e10, 1e3, 0, 1], 32).astype(np.float32)
        assert case.error(case.run(run_op, 4), case.reference(rounded=True)) < 1e-6


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("tokens", [2, 12])
def test_nan_stays_in_its_token(run_op: RunOp, level: int, tokens: int) -> None:
    case = Case(4, 32, 40, 96, (tokens,))
    case.x[1, 50] = np.nan
    y = case.run(run_op, level)
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_more_tokens_than_are_rounded_at_a_time(run_op: RunOp) -> None:
    case = Case(4, 32, 33, 64, (3, 700))
    for level in (0, 4):
        assert (
            case.error(case.run(run_op, level), case.reference(rounded=level == 4)) < 1e-4
        )  # a quotient half-way: see test_rounded


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_threads_do_not_change_a_bit(run_op: RunOp, tokens: int) -> None:
    case = Case(4, 32, 300, 352, (tokens,))
    assert np.array_equal(case.run(run_op, 4, threads=1), case.run(run_op, 4, threads=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 48}, "block_size must be"),
        ({"bits": 2}, "bits must be"),
        ({"N": 7}, "codes and scales"),
        ({"K": 65}, "K columns"),
    ],
)
def test_what_does_not_fit_is_an_error(run_op: RunOp, change: dict[str, int], message: str) -> None:
    case = Case(4, 32, 8, 64)
    with pytest.raises(Exception, match=f"QMatMul: .*{message}"):
        run_op("QMatMul", {"x": case.x, **case.weight}, accuracy_level=4, **{**case.attributes, **change})


@pytest.mark.parametrize("name", ["factors", "bias"])
def test_factors_and_biases_are_one_a_row(run_op: RunOp, name: str) -> None:
    case = Case(4, 32, 8, 64)
    weight = case.weight | {name: np.ones(7, np.float32)}
    with pytest.raises(Exception, match="QMatMul: factors and bias must be"):
        run_op("QMatMul", {"x": case.x, **weight}, accuracy_level=4, **case.attributes)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_smallest_and_the_largest_scales(run_op: RunOp, block: int, tokens: int) -> None:
    """Every exponent that a positive normal float16 may have, in each place of a chunk."""
    case = Case(4, block, 60, 1024, (tokens,))
    exponents = np.arange(case.scales.size).reshape(case.scales.shape) % 30 - 14
    case.scales = np.ldexp(np.random.default_rng(2).uniform(1, 2 - 2**-10, case.scales.shape), exponents).astype(
        np.float16
    )
    assert case.error(case.run(run_op, 4), case.reference(rounded=True)) < 1e-6


# What comes before a product: the same product on x as numpy makes it, in float64.


def product(run_op: RunOp, op: str, case: Case, inputs: dict[str, Any], outputs: int = 1, **attributes: Any) -> Any:
    """The op in float32 arithmetic on ``inputs`` and the case's weights."""
    return run_op(op, {**inputs, **case.weight}, outputs=outputs, accuracy_level=0, **case.attributes, **attributes)


def close(case: Case, y: Any, x: Any) -> None:
    """Check that ``y`` is the case's product with ``x``: twice test_float32's tolerance, once for x in float32."""
    case.x = x
    expected = case.reference(rounded=False)
    summed = (
        np.abs(x).max() * np.abs(case.integers).max() * np.abs(case.weight_scales).max() * np.sqrt(x.shape[-1])
        + np.abs(expected).max()
    )
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() < 2e-6 * summed


BEFORE = (st.integers(1, 150), st.integers(1, 20), st.booleans(), st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(*BEFORE)
def test_a_sum_and_its_norm_before_a_product(run_op: RunOp, columns: int, tokens: int, bias: bool, seed: int) -> None:
    case = Case(4, 32, 9, columns, (2, tokens), bias, seed)
    rng = np.random.default_rng(seed)
    a = case.x
    b = rng.standard_normal(case.x.shape).astype(np.float32)
    norm = rng.uniform(0.5, 2, columns).astype(np.float32)
    y, total = product(run_op, "NormQMatMul", case, {"a": a, "b": b, "norm": norm}, 2, epsilon=1e-5)
    np.testing.assert_array_equal(total, a + b)
    exact = a.astype(np.float64) + b
    close(case, y, exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * norm)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(*BEFORE, st.integers(1, 150))
def test_two_values_side_by_side_before_a_product(
    run_op: RunOp, columns: int, tokens: int, bias: bool, seed: int, more: int
) -> None:
    case = Case(4, 32, 9, columns + more, (2, tokens), bias, seed)
    a = case.x[..., :columns]
    b = case.x[..., columns:]
    sides = {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}
    (y,) = product(run_op, "PairQMatMul", case, sides, a_factor=0.5, b_factor=-3.0)
    close(case, y, np.concatenate([0.5 * a.astype(np.float64), -3.0 * b], axis=-1))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(*BEFORE)
def test_a_gate_before_a_product(run_op: RunOp, columns: int, tokens: int, bias: bool, seed: int) -> None:
    case = Case(8, 16, 9, columns, (2, tokens), bias, seed)
    rng = np.random.default_rng(seed)
    wide = 3 * rng.standard_normal((2, tokens, 2 * columns + 5)).astype(np.float32)  # one projection: [up | gate | ...]
    (y,) = product(run_op, "SiluQMatMul", case, {"a": wide, "gate": wide}, a_offset=3, gate_offset=columns + 4)
    a, gate = (wide[..., start : start + columns].astype(np.float64) for start in (3, columns + 4))
    close(case, y, a * gate / (1 + np.exp(-gate)))


@pytest.mark.parametrize(
    ("op", "widths", "attributes", "message"),
    [
        ("NormQMatMul", {"a": 64, "b": 32, "norm": 64}, {"epsilon": 1e-5}, "the same rows"),
        ("NormQMatMul", {"a": 64, "b": 64, "norm": 32}, {"epsilon": 1e-5}, "norm must be"),
        ("PairQMatMul", {"a": 32, "b": 31}, {"a_factor": 1.0, "b_factor": 1.0}, "K columns together"),
        ("SiluQMatMul", {"a": 64, "gate": 64}, {"a_offset": 0, "gate_offset": 1}, "outside the tensor"),
    ],
)
def test_what_does_not_fit_before_a_product(
    run_op: RunOp, op: str, widths: dict[str, int], attributes: Any, message: str
) -> None:
    case = Case(4, 32, 8, 64)
    inputs = {name: np.zeros(width if name == "norm" else (1, width), np.float32) for name, width in widths.items()}
    with pytest.raises(Exception, match=f"{op}: .*{message}"):
        product(run_op, op, case, inputs, 1 + (op == "NormQMatMul"), **attributes)
