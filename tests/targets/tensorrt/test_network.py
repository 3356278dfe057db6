"""The network in ONNX: what it is made of, and what a build refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest

from h1export.artifact.artifact import Artifact
from h1export.artifact.stage import Stage
from h1export.checkpoint.store import WeightStore
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.graphs.passes import run_passes
from h1export.graphs.trace import trace
from h1export.graphs.verify import LEGAL_OPS
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import EMBEDDING
from h1export.progress import SILENT
from h1export.quantize.choices import QuantName
from h1export.quantize.methods.rtn import quantize_rows
from h1export.quantize.precision import Precision
from h1export.quantize.scheme import QuantScheme
from h1export.quantize.source import Rounded
from h1export.targets import get_target
from h1export.targets.onnx import column_major_writer
from h1export.targets.tensorrt.network import weights
from h1export.targets.tensorrt.network.lowering import check
from h1export.targets.tensorrt.network.ops import TABLE
from h1export.targets.tensorrt.options import TensorRTOptions

Build = Callable[..., Artifact]


@pytest.fixture
def small(make_checkpoint: Callable[..., Path], build: Build, without_plugin: None) -> Artifact:
    """A random model of two layers, for three sequences."""
    return build(make_checkpoint(), "int4", target="trt", max_context=96, max_batch=3, runtime="tensorrt")


@pytest.fixture(scope="module")
def lower(make_checkpoint: Callable[..., Path]) -> Callable[..., None]:
    """lower(scheme, **options): what a build of the plain random model asks of the target; it leaves nothing behind."""
    config = FalconH1Config.load(make_checkpoint())
    store = WeightStore.open(make_checkpoint(), config)
    program = run_passes(trace(config))

    def run(scheme: QuantScheme, **options: Any) -> None:
        integers = Rounded(store, scheme.precisions(config), quantize_rows)
        with TemporaryDirectory() as folder:
            try:
                asked = TensorRTOptions(**{"runtime": "rtx"} | options)
                get_target("trt").lower(
                    program, store, integers, options=asked, stage=Stage(Path(folder)), progress=SILENT
                )
            finally:
                assert list(Path(folder).iterdir()) == []

    return run


def load(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.folder / "model.onnx", load_external_data=False)


def test_the_table_is_the_legal_vocabulary() -> None:
    assert set(TABLE) == LEGAL_OPS


def test_each_layer_has_one_node_of_each_plugin(small: Artifact) -> None:
    model = load(small)
    layers = small.config.num_hidden_layers
    counts = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert {name: count for (domain, name), count in counts.items() if domain == "h1export"} == {
        "SSMScan": layers,
        "CausalConv": layers,
    }
    assert counts["", "Attention"] == layers
    assert counts["", "TensorScatter"] == counts["", "RotaryEmbedding"] == 2 * layers
    assert counts["", "RMSNormalization"] == 2 * layers + 1
    assert counts["", "DequantizeLinear"] == 5 * layers + 1  # [in_proj; q; k; v], out, o, [gate; up], down; the head
    assert counts["", "Cos"] == counts["", "CumSum"] == counts["", "Range"] == 1  # shared by all layers
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 24, "h1export": 1}
    for node in model.graph.node:
        assert node.op_type != "Attention" or len(node.output) == 1


def test_keys_lie_in_buffers_of_fixed_length(small: Artifact) -> None:
    for port, name in ((small.manifest.inputs, "past_key_values.1.key"), (small.manifest.outputs, "present.1.key")):
        assert port[name] == ("FLOAT16", ("batch", 2, 96, 32))
    assert small.manifest.inputs["past_key_values.1.recurrent_state"][0] == "FLOAT"
    assert small.manifest.inputs["attention_mask"] == ("INT64", ("batch", 96))


def test_the_model_declares_the_dtypes_that_onnx_infers(small: Artifact) -> None:
    """The emulation rounds where the file says so: ONNX's own inference has to agree.

    It knows nothing of the plugin's nodes.
    """
    model = load(small)
    own = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    inferred = {info.name: info.type.tensor_type.elem_type for info in known if info.type.tensor_type.elem_type}
    assert len(own.keys() & inferred.keys()) > 100
    assert {name: own[name] for name in own.keys() & inferred.keys()} == {
        name: inferred[name] for name in own.keys() & inferred.keys()
    }


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_the_artifact_holds_the_rules_integers(
    name: str,
    make_checkpoint: Callable[..., Path],
    without_plugin: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written a few rows at a time; in_proj and the vocabulary have odd numbers of them."""
    checkpoint = make_checkpoint(name, mamba_n_heads=3, mamba_d_ssm=96)
    for module in (column_major_writer, weights):
        monkeypatch.setattr(module, "BLOCK_BYTES", 3000)
    artifact = build_artifact(
        checkpoint, "trt", tmp_path / "out", scheme=QuantScheme("int4"), options=TensorRTOptions(runtime="tensorrt")
    )
    stored: Any = load_runner(artifact).stored_weights()
    store = WeightStore.open(checkpoint, artifact.config)
    assert len(stored) == 9 * artifact.config.num_hidden_layers + (1 if name == "tied" else 2)
    for weight in artifact.manifest.weights:
        for part in weight.parts:
            rows = store.shape(part.tensor)[0]
            truth = quantize_rows(
                store.rows(part.tensor, 0, rows), Precision(weight.bits, weight.group_size), np.ones(rows, np.float32)
            )
            found = stored.quantized(part.tensor)
            assert np.array_equal(found.codes, truth.codes), part.tensor
            assert np.array_equal(found.scales, truth.scales), part.tensor


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_codes(bits: int) -> None:
    top = (1 << (bits - 1)) - 1
    codes = np.random.default_rng(bits).integers(-top, top + 1, (5, 64), dtype=np.int8)
    words = weights.words_of(codes, bits)
    assert words.shape == (5, 64 * bits // 32)
    assert np.array_equal(weights.codes_of(words, bits), codes)


@pytest.mark.parametrize(
    ("quant", "options", "said"),
    [
        ("int8", {}, "--quant int8: .*use --quant int4 or none, or --target ort"),
        ("int4", {"compute": "fp32"}, "--compute: cannot be 'fp32'; give fp16 or bf16"),
        ("int4", {"architectures": (90,)}, "--sm: 90 .*TensorRT-RTX.*80, 86, 89, 120, 121"),
        ("int4", {"architectures": (75,), "runtime": "tensorrt"}, "--sm: 75 .*TensorRT and"),
    ],
)
def test_what_a_build_refuses(quant: QuantName, options: dict[str, Any], said: str, lower: Callable[..., None]) -> None:
    with pytest.raises(H1ExportError, match=said):
        lower(QuantScheme(quant), **options)


def test_one_tensor_in_int8_is_refused(lower: Callable[..., None]) -> None:
    name = "model.layers.1.mamba.in_proj.weight"
    with pytest.raises(H1ExportError, match=f'tensor "{name}" in int8'):
        lower(QuantScheme("int4", chosen={name: "int8"}))


def test_a_tied_embedding_in_int8_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    """It is the head too, which products read; an untied one is only gathered from, and int8 in every int4 build."""
    tied, untied = (FalconH1Config.load(make_checkpoint(name)) for name in ("tied", "plain"))
    chosen = QuantScheme("int4", chosen={EMBEDDING: "int8"})
    with pytest.raises(H1ExportError, match=f'tensor "{EMBEDDING}" in int8'):
        check(
            tied,
            Rounded(WeightStore.open(make_checkpoint("tied"), tied), chosen.precisions(tied), quantize_rows),
            TensorRTOptions(),
        )
    check(
        untied,
        Rounded(WeightStore.open(make_checkpoint(), untied), chosen.precisions(untied), quantize_rows),
        TensorRTOptions(),
    )


def test_a_shape_without_a_kernel_is_refused(lower: Callable[..., None]) -> None:
    with pytest.raises(H1ExportError, match="no GPU kernel for head dim 32 and state size 16"):
        lower(QuantScheme("int4"))
