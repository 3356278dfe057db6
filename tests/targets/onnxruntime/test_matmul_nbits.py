"""The integers on their way into ONNX Runtime and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.checkpoint.store import WeightStore
from h1export.commands.load import load_runner
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.targets.onnx.builder import GraphBuilder
from h1export.targets.onnxruntime.emit.packing import NBitsLayout

Build = Callable[..., Artifact]
PRECISIONS = st.sampled_from([Precision(4, 32), Precision(4, 64), Precision(4, 128), Precision(8, 0)])


@settings(deadline=None, max_examples=50, derandomize=True)
@given(PRECISIONS, st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse(precision: Precision, rows: int, columns: int, seed: int) -> None:
    if precision.group_size:
        columns = precision.group_size * (columns % 4 + 1)
    layout = NBitsLayout.of(precision, columns)
    top = (1 << (precision.bits - 1)) - 1
    codes = np.random.default_rng(seed).integers(-top, top + 1, (rows, columns)).astype(np.int8)
    packed = layout.pack(codes)
    assert packed.shape == (rows, layout.blocks, layout.block_size * precision.bits // 8)
    assert np.array_equal(layout.unpack(packed), codes)


@pytest.mark.parametrize("precision", [Precision(4, 32), Precision(4, 128), Precision(8, 0)])
@pytest.mark.parametrize("rows", [1, 19])
def test_matmul_nbits_means_what_the_integers_say(precision: Precision, rows: int) -> None:
    columns = 50 if not precision.group_size else 256
    rng = np.random.default_rng(0)
    layout = NBitsLayout.of(precision, columns)
    multiplier = rng.uniform(0.1, 2, rows).astype(np.float32)
    tensor = quantize_rows(rng.standard_normal((rows, columns)).astype(np.float32), precision, multiplier)
    build = GraphBuilder({"": 23, "com.microsoft": 1})
    x = ir.Value(name="x", shape=ir.Shape(("m", columns)), type=ir.TensorType(ir.DataType.FLOAT))
    y = build.op(
        "MatMulNBits",
        x,
        build.initializer(ir.tensor(layout.pack(tensor.codes), name="codes")),
        build.initializer(ir.tensor(layout.per_block(tensor.scales) * multiplier[:, None], name="scales")),
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=precision.bits,
        block_size=layout.block_size,
        accuracy_level=0,
    )
    y.name = "y"
    y.type = ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape(("m", rows))
    model = ir.to_proto(build.model([x], [y], "g")).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    activation = rng.standard_normal((5, columns)).astype(np.float32)
    truth = activation.astype(np.float64) @ (tensor.unfolded().astype(np.float64) * multiplier[:, None]).T
    found = session.run(None, {"x": activation})[0]
    assert np.abs(found - truth).max() <= 1e-6 * np.ptp(truth) * np.sqrt(columns)


@pytest.mark.parametrize(("quant", "group_size"), [("int4", 32), ("int4", 128), ("int8", 32)])
def test_the_artifact_holds_the_rules_integers_bit_for_bit(
    quant: str, group_size: int, tiny: Path, build: Build
) -> None:
    artifact = build(tiny, quant, group_size=group_size)
    stored: Any = load_runner(artifact).stored_weights()
    store = WeightStore.open(tiny, artifact.config)
    checked = 0
    for weight in artifact.manifest.weights:
        for part in weight.parts:
            rows = store.entry(part.tensor).shape[0]
            truth = quantize_rows(
                store.rows(part.tensor, 0, rows), Precision(weight.bits, weight.group_size), part.multiplier.rows(rows)
            )
            found = stored.quantized(part.tensor)
            assert np.array_equal(found.codes, truth.codes), part.tensor
            assert np.array_equal(found.scales, truth.scales), part.tensor
            assert np.array_equal(found.row_scale, truth.row_scale), part.tensor
            checked += 1
    assert checked == 2 + 9 * artifact.config.num_hidden_layers  # embedding, head, nine projections a layer


def test_a_tied_head_shares_the_embeddings_bytes(make_checkpoint: Callable[..., Path], build: Build) -> None:
    for quant in ("int4", "int8"):
        artifact = build(make_checkpoint("tied"), quant)
        places = Counter(
            (value.const_value.offset, value.const_value.length)
            for name, value in ir.load(artifact.folder / "model.onnx").graph.initializers.items()
            if name.startswith("model.embed_tokens") and isinstance(value.const_value, ir.ExternalTensor)
        )
        assert sorted(places.values()) == [1, 2]  # the scales once, the codes under two names
        assert [weight.initializer for weight in artifact.manifest.weights].count("model.embed_tokens.weight") == 1


def test_int4_is_close_to_its_ideal_size(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4")
    store = WeightStore.open(tiny, artifact.config)
    ideal = 0.0
    quantised = {part.tensor: weight for weight in artifact.manifest.weights for part in weight.parts}
    for entry in store.entries:
        count = np.prod(entry.shape)
        weight = quantised.get(entry.name)
        if weight is None:
            ideal += 4 * count
        else:
            ideal += count * weight.bits / 8 + 2 * count / 32  # fp16 scales, one per 32
    size = artifact.manifest.files["model.onnx.data"][1]
    assert ideal <= size <= 1.01 * ideal + 4096 * len(artifact.manifest.weights)
