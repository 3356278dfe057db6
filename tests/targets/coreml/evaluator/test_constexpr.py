"""Compressed constants against plain loops, and against the decompression of coremltools itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16.constexpr_ops import constexpr_affine_dequantize as their_affine
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale as their_blocks
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense as their_lut
from coremltools.converters.mil.mil.types.type_mapping import nptype_from_builtin
from coremltools.proto import MIL_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.errors import H1ExportError
from h1export.targets.coreml.evaluator import Evaluator, Package

Shape = tuple[int, ...]
Expand = Callable[..., np.ndarray]
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = {"fp16": np.float16, "fp32": np.float32, "int8": np.int8, "uint8": np.uint8}
RANGES = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}
PROPERTY = settings(deadline=None, max_examples=30, derandomize=True)


@pytest.fixture(scope="session")
def expand(mil: Any) -> Expand:
    """expand(op, inputs, dtype, shape, before) -> the result of a program of this op and the operations ``before`` it.

    A string in ``inputs`` is the name of an output of an operation before.
    """

    def run(
        op: str, inputs: Mapping[str, object], dtype: str, *, shape: Shape, before: tuple[Any, ...] = ()
    ) -> np.ndarray:
        given = {
            name: item if isinstance(item, (str, MIL_pb2.Value)) else mil.value(item) for name, item in inputs.items()
        }
        operations = [*before, mil.op(op, given, {"w": (dtype, shape)})]
        return Evaluator(Package.open(mil.save({"main": mil.function({}, operations, ["w"])}))).run({})["w"]

    return run


def codes(rng: np.random.Generator, dtype: str, shape: Shape) -> np.ndarray:
    low, high = RANGES[dtype]
    return rng.integers(low, high, shape).astype(np.int8 if low else np.uint8)


def scales(rng: np.random.Generator, dtype: str, shape: Shape) -> np.ndarray:
    return rng.uniform(-0.2, 0.2, shape).astype(DTYPES[dtype])


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Shape, Shape]:
    """Draw a shape, and one whose sizes divide it."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    return tuple(count * size for count, size in sizes), tuple(count for count, _ in sizes)


@PROPERTY
@given(st.sampled_from(sorted(RANGES)), st.sampled_from(["fp16", "fp32"]), blocks(), st.booleans(), SEEDS)
def test_blockwise(
    mil: Any, expand: Expand, stored: str, dtype: str, shapes: tuple[Shape, Shape], shifted: bool, seed: int
) -> None:
    shape, counts = shapes
    rng = np.random.default_rng(seed)
    data = codes(rng, stored, shape)
    scale = scales(rng, dtype, counts)
    offset = codes(rng, stored, counts) if shifted else None
    expected = np.zeros(shape, DTYPES[dtype])
    for at in np.ndindex(shape):
        block = tuple(i * count // size for i, count, size in zip(at, counts, shape, strict=True))
        expected[at] = float(scale[block]) * (
            int(data[at]) - (0 if offset is None else int(offset[block]))
        )  # exact in float64
    inputs: dict[str, object] = {"data": mil.value(data, stored), "scale": scale}
    inputs |= {} if offset is None else {"offset": mil.value(offset, stored)}
    found = expand("constexpr_blockwise_shift_scale", inputs, dtype, shape=shape)
    assert found.dtype == DTYPES[dtype]
    assert np.array_equal(found, expected)
    assert np.array_equal(found, their_blocks.decompress(data, scale, offset))


def test_an_offset_may_be_of_floats(mil: Any, expand: Expand) -> None:
    rng = np.random.default_rng(0)
    data = codes(rng, "uint4", (4, 6))
    scale = scales(rng, "fp16", (2, 3))
    offset = rng.uniform(0, 15, (2, 3)).astype(np.float16)
    inputs = {"data": mil.value(data, "uint4"), "scale": scale, "offset": offset}
    wide = [np.kron(part.astype(np.float64), np.ones((2, 2))) for part in (scale, offset)]
    expected = wide[0] * (data - wide[1])
    np.testing.assert_allclose(
        expand("constexpr_blockwise_shift_scale", inputs, "fp16", shape=(4, 6)), expected, rtol=2**-11, atol=2**-25
    )


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, Shape, Shape, int, int | None]:
    """Draw bits of an index, shape of the indices, numbers of tables, length of the vectors, and their axis."""
    bits = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    shape, groups = draw(blocks())
    vector = draw(st.integers(1, 3))
    axis = draw(st.integers(-len(shape), len(shape) - 1)) if vector > 1 or draw(st.booleans()) else None
    return bits, shape, groups, vector, axis


@PROPERTY
@given(tables(), st.sampled_from(sorted(DTYPES)), SEEDS)
def test_lut(mil: Any, expand: Expand, table: tuple[int, Shape, Shape, int, int | None], dtype: str, seed: int) -> None:
    bits, shape, groups, vector, axis = table
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    lut = rng.integers(0, 100, (*groups, 1 << bits, vector)).astype(DTYPES[dtype])
    along = (axis or 0) % len(shape)
    expected = np.zeros(tuple(size * (vector if i == along else 1) for i, size in enumerate(shape)), DTYPES[dtype])
    for at in np.ndindex(shape):
        group = tuple(i * count // size for i, count, size in zip(at, groups, shape, strict=True))
        for i in range(vector):
            place = tuple(index * vector + i if own == along else index for own, index in enumerate(at))
            expected[place] = lut[(*group, indices[at], i)]
    inputs: dict[str, object] = {"indices": mil.value(indices, f"uint{bits}"), "lut": lut}
    found = expand(
        "constexpr_lut_to_dense", inputs | ({} if axis is None else {"vector_axis": axis}), dtype, shape=expected.shape
    )
    assert found.dtype == DTYPES[dtype]
    assert np.array_equal(found, expected)
    assert np.array_equal(found, their_lut.decompress(indices, lut, axis))


def test_a_table_of_integers_is_scaled_by_another_op(mil: Any, expand: Expand) -> None:
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 4, (2, 6)).astype(np.uint8)
    lut = codes(rng, "int8", (1, 1, 4, 1))
    scale = scales(rng, "fp16", (2, 3))
    first = mil.op(
        "constexpr_lut_to_dense",
        {"indices": mil.value(indices, "uint2"), "lut": mil.value(lut)},
        {"q": ("int8", (2, 6))},
    )
    found = expand(
        "constexpr_blockwise_shift_scale", {"data": "q", "scale": scale}, "fp16", shape=(2, 6), before=(first,)
    )
    assert np.array_equal(found, their_blocks.decompress(lut[0, 0, :, 0][indices], scale, None))


@PROPERTY
@given(
    st.sampled_from(["int8", "uint8"]),
    st.sampled_from(["fp16", "fp32"]),
    st.integers(-3, 2),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_affine(
    mil: Any, expand: Expand, stored: str, dtype: str, axis: int, each_scale: bool, each_zero: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, 3, 4)
    data = codes(rng, stored, shape)
    scale = scales(rng, dtype, shape[axis : axis + 1 or None] if each_scale else ())
    zero = codes(rng, stored, shape[axis : axis + 1 or None] if each_zero else ())
    expected = np.zeros(shape, DTYPES[dtype])
    for at in np.ndindex(shape):
        factor, shift = (part[at[axis]] if part.ndim else part for part in (scale, zero))
        expected[at] = float(factor) * (int(data[at]) - int(shift))
    inputs = {"quantized_data": data, "zero_point": zero, "scale": scale, "axis": axis}
    found = expand("constexpr_affine_dequantize", inputs, dtype, shape=shape)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(
        found, their_affine.decompress(data, zero, scale, axis), rtol=2**-10
    )  # coremltools rounds more than once


def test_cast(mil: Any, expand: Expand) -> None:
    half = np.array([[0.1, -65504.0], [2**-24, np.inf]], np.float16)
    inputs = {"source_val": half, "output_dtype": mil.value("fp32")}
    assert np.array_equal(expand("constexpr_cast", inputs, "fp32", shape=(2, 2)), half.astype(np.float32))
    with pytest.raises(H1ExportError, match="casts to 'int8'"):
        expand("constexpr_cast", inputs | {"output_dtype": mil.value("int8")}, "int8", shape=(2, 2))


def quantized(rng: np.random.Generator, kind: Any, shape: Shape) -> np.ndarray:
    """Return the array in coremltools' own type, which it packs when it writes."""
    bits = kind.get_bitwidth()
    low = 0 if kind.is_unsigned() else -(1 << (bits - 1))
    return rng.integers(low, low + (1 << bits), shape).astype(nptype_from_builtin(kind))


def int4_by_block(rng: np.random.Generator) -> Any:
    return Builder.constexpr_blockwise_shift_scale(
        data=quantized(rng, types.int4, (6, 64)), scale=scales(rng, "fp16", (6, 2))
    )


def uint4_shifted(rng: np.random.Generator) -> Any:
    data = quantized(rng, types.uint4, (6, 64))
    offset = quantized(rng, types.uint4, (3, 4))
    return Builder.constexpr_blockwise_shift_scale(data=data, scale=scales(rng, "fp16", (3, 4)), offset=offset)


def int8_shifted(rng: np.random.Generator) -> Any:
    return Builder.constexpr_blockwise_shift_scale(
        data=rng.integers(-128, 128, (6, 64)).astype(np.int8),
        scale=scales(rng, "fp16", (6, 1)),
        offset=rng.integers(-128, 128, (6, 1)).astype(np.int8),
    )


def three_bits(rng: np.random.Generator) -> Any:
    lut = rng.standard_normal((2, 1, 8, 1)).astype(np.float16)
    return Builder.constexpr_lut_to_dense(indices=quantized(rng, types.uint3, (6, 64)), lut=lut)


def vectors(rng: np.random.Generator) -> Any:
    lut = rng.standard_normal((1, 2, 16, 3)).astype(np.float16)
    return Builder.constexpr_lut_to_dense(
        indices=quantized(rng, types.uint4, (2, 64)), lut=lut, vector_axis=np.int32(0)
    )


@pytest.mark.parametrize("make", [int4_by_block, uint4_shifted, int8_shifted, three_bits, vectors])
def test_as_coremltools_saves_it(make: Callable[[np.random.Generator], Any], tmp_path: Path) -> None:
    """coremltools' packing, file and arithmetic give the same numbers."""
    made = []

    @Builder.program(input_specs=[Builder.TensorSpec((6, 64), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        weight = make(np.random.default_rng(0))
        made.append(weight.op.materialized_val_inference())
        return Builder.add(x=x, y=weight, name="y")

    model = ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True
    )
    model.save(str(tmp_path / "model.mlpackage"))
    found = Evaluator(Package.open(tmp_path / "model.mlpackage")).run({"x": np.zeros((6, 64), np.float16)})["y"]
    assert np.abs(found).max() > 0
    assert np.array_equal(found, made[0])


INT8 = np.zeros((4, 6), np.int8)
HALF = np.ones((2, 3), np.float16)


@pytest.mark.parametrize(
    ("op", "inputs", "what"),
    [
        (
            "blockwise_shift_scale",
            {"data": INT8, "scale": np.ones((3, 3), np.float16)},
            r"blocks \(3, 3\) that do not divide",
        ),
        ("blockwise_shift_scale", {"data": INT8, "scale": np.ones(4, np.float16)}, r"data \(4, 6\), scale \(4,\)"),
        ("blockwise_shift_scale", {"data": INT8, "scale": HALF, "offset": INT8[:1]}, r"offset \(1, 6\)"),
        ("blockwise_shift_scale", {"data": INT8}, "lacks scale"),
        (
            "blockwise_shift_scale",
            {"data": INT8, "scale": HALF, "shape": 1},
            "inputs that the evaluator does not know: shape",
        ),
        (
            "lut_to_dense",
            {"indices": INT8.view(np.uint8) + 4, "lut": np.ones((1, 1, 4, 1), np.float16)},
            "index 4 into a table of 4",
        ),
        ("lut_to_dense", {"indices": INT8, "lut": np.ones((1, 4, 1), np.float16)}, "rank must be two more"),
        (
            "lut_to_dense",
            {"indices": INT8, "lut": np.ones((3, 1, 4, 1), np.float16)},
            r"blocks \(3, 1\) that do not divide",
        ),
        ("lut_to_dense", {"indices": INT8, "lut": np.ones((1, 1, 4, 2), np.float16)}, "no vector_axis"),
        ("lut_to_dense", {"indices": INT8, "lut": np.ones((1, 1, 4, 2), np.float16), "vector_axis": 2}, "has axis 2"),
        (
            "affine_dequantize",
            {"quantized_data": INT8, "zero_point": INT8[0, 0], "scale": HALF[0, 0], "axis": 2},
            "has axis 2",
        ),
        (
            "affine_dequantize",
            {"quantized_data": INT8, "zero_point": INT8[0, 0], "scale": HALF[0], "axis": 0},
            r"values of shape \(3,\)",
        ),
        ("cast", {"source_val": HALF, "output_dtype": 1}, "int32 of shape"),
        ("sparse_to_dense", {"nonzero_data": HALF}, "is an op that the evaluator does not have"),
    ],
)
def test_what_is_not_specified_is_refused(expand: Expand, op: str, inputs: dict[str, object], what: str) -> None:
    with pytest.raises(H1ExportError, match=rf"op constexpr_{op} 'w': .*{what}"):
        expand(f"constexpr_{op}", inputs, "fp16", shape=(4, 6))


@pytest.mark.parametrize(
    ("dtype", "shape", "what"), [("fp16", (4, 5), r"computes shape \[4, 6\]"), ("int8", (4, 6), "computes float32")]
)
def test_a_result_is_what_it_is_declared_as(expand: Expand, dtype: str, shape: Shape, what: str) -> None:
    with pytest.raises(H1ExportError, match=f"op constexpr_blockwise_shift_scale 'w': {what}"):
        expand("constexpr_blockwise_shift_scale", {"data": INT8, "scale": HALF}, dtype, shape=shape)


def test_what_is_computed_when_run_is_no_compressed_constant(mil: Any) -> None:
    operation = mil.op(
        "constexpr_blockwise_shift_scale", {"data": mil.value(INT8), "scale": "x"}, {"w": ("fp16", (4, 6))}
    )
    package = Package.open(mil.save({"main": mil.function({"x": ("fp16", (2, 3))}, [operation], ["w"])}))
    with pytest.raises(H1ExportError, match="takes scale from 'x', which is computed at run time"):
        Evaluator(package)
