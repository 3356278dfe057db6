"""Facts of the exported graph that a refactoring must keep."""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.commands.build import build_artifact
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.graphs.verify import LEGAL_OPS
from h1export.targets.onnxruntime import kernel_build, native_library
from h1export.targets.onnxruntime.emit.cpu import TABLE
from h1export.targets.onnxruntime.options import OrtOptions

Build = Callable[..., Artifact]


def load(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.folder / "model.onnx", load_external_data=False)


def test_the_table_is_the_legal_vocabulary() -> None:
    assert set(TABLE) == LEGAL_OPS


def test_one_kernel_a_layer_for_each_h1_op(tiny: Path, build: Build) -> None:
    artifact = build(tiny, "int4")
    layers = artifact.config.num_hidden_layers
    counts = Counter(node.op_type for node in load(artifact).graph.node)
    assert counts["LinearAttention"] == counts["GroupQueryAttention"] == layers
    assert counts["MatMulNBits"] == 4 * layers + 1  # [in_proj; q; k; v], [out_proj | o_proj], [up; gate], down
    assert counts["RotaryEmbedding"] == 2 * layers
    assert counts["Cos"] == counts["Sin"] == counts["CumSum"] == 1  # shared by all layers
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert counts["Transpose"] == counts["MatMul"] == counts["Identity"] == 0


def test_names_and_shapes_are_those_of_the_manifest_and_of_the_session(tiny: Path, build: Build) -> None:
    import onnxruntime as ort

    artifact = build(tiny, "int4")
    onnx.checker.check_model(str(artifact.folder / "model.onnx"))
    session = ort.InferenceSession(str(artifact.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for found, said in (
        ((*session.get_inputs(), *session.get_overridable_initializers()), artifact.manifest.inputs),
        (session.get_outputs(), artifact.manifest.outputs),
    ):
        assert {value.name: tuple(value.shape) for value in found} == {
            name: tuple(dims) for name, (_, dims) in said.items()
        }
    assert session.get_outputs()[0].name == "logits"
    for layer in range(artifact.config.num_hidden_layers):
        for kind in ("key", "value", "conv_state", "recurrent_state"):
            assert f"past_key_values.{layer}.{kind}" in artifact.manifest.inputs
            assert f"present.{layer}.{kind}" in artifact.manifest.outputs


def test_two_builds_give_the_same_bytes(tiny: Path, build: Build, tmp_path: Path) -> None:
    first = build(tiny, "int4")
    second = build_artifact(tiny, "ort", tmp_path / "elsewhere", options=OrtOptions(accuracy_level=0, kv="fp32"))
    assert second.manifest == first.manifest
    for name in [*first.manifest.files, "manifest.json"]:
        assert (second.folder / name).read_bytes() == (first.folder / name).read_bytes(), name


def test_the_folder_carries_config_and_tokenizer(tiny: Path, build: Build) -> None:
    files = build(tiny, "int4").manifest.files
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= files.keys()
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= files.keys()
    assert not any(name.endswith((".safetensors", ".py")) for name in files)


def test_batched_chunks_are_the_rows_alone(tiny: Path, build: Build) -> None:
    """GroupQueryAttention refuses them; the Runner goes row by row."""
    runner = load_runner(build(tiny))
    ids = np.random.default_rng(0).integers(0, 4096, (2, 12))
    mask = np.ones((2, 12), np.int64)
    mask[1, :3] = 0
    whole, _ = runner.step(ids, mask, runner.initial(2))
    _, states = runner.step(ids[:, :5], mask[:, :5], runner.initial(2))
    rest, _ = runner.step(ids[:, 5:], mask, states)
    assert np.abs(rest - whole[:, 5:]).max() <= 1e-5 * np.ptp(whole)


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([[1, 2]], [[1, 1, 1]], "expected \\[batch, new\\]"),
        ([[1, 5000]], [[1, 1]], "the vocabulary is 0 to 4095"),
        ([[1, 2]], [[1, 0]], "pad on the left"),
        ([[1, 2]], [[2, 2]], "besides 0 and 1"),
    ],
)
def test_calls_that_break_the_contract_are_refused(
    ids: list[list[int]], mask: list[list[int]], says: str, tiny: Path, build: Build
) -> None:
    runner = load_runner(build(tiny))
    with pytest.raises(H1ExportError, match=says):
        runner.step(np.array(ids), np.array(mask), runner.initial(1))


def test_a_model_that_points_outside_its_folder_is_refused(tiny: Path, build: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(build(tiny, "int4").folder, tmp_path / "copy"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (tmp_path / "secret").write_bytes(b"\0" * 8_000_000)
    onnx.save(model, folder / "model.onnx")
    size = (folder / "model.onnx").stat().st_size
    manifest = (
        (folder / "manifest.json")
        .read_text()
        .replace(str(build(tiny, "int4").manifest.files["model.onnx"][1]), str(size))
    )
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(H1ExportError):
        dict(load_runner(Artifact.open(folder)).stored_weights())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda data: bytes(len(data) // 2) + data[len(data) // 2 :], "is no ONNX graph"),
        (lambda data: data.replace(b"MatMul", b"MatNul"), "onnxruntime cannot load it"),
    ],
    ids=["no graph", "no such operator"],
)
def test_a_broken_model_is_an_error_of_ours(
    broken: Callable[[bytes], bytes], message: str, tiny: Path, build: Build, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(build(tiny).folder, tmp_path / "copy"))
    file = folder / "model.onnx"
    file.write_bytes(broken(file.read_bytes()))
    with pytest.raises(H1ExportError, match=message):
        load_runner(Artifact.open(folder), kernels="stock")


def test_the_graph_over_our_own_kernels(tiny: Path, build: Build) -> None:
    """One node an op of a layer, every weight shared with model.onnx."""
    artifact = build(tiny, "int4")
    layers = artifact.config.num_hidden_layers
    models = [
        onnx.load(artifact.folder / name, load_external_data=False) for name in ("model.onnx", "model.native.onnx")
    ]
    counts = Counter(node.op_type for node in models[1].graph.node if node.domain == "h1export")
    each = dict.fromkeys(("CausalConv", "SSMScan", "Attention", "PairQMatMul", "SiluQMatMul"), layers)
    assert counts == {"NormQMatMul": 2 * layers, "QMatMul": 1, **each}  # the first norm has no sum before it
    places = [
        {t.name: [(e.key, e.value) for e in t.external_data] for t in model.graph.initializer if t.external_data}
        for model in models
    ]
    shared = places[0].keys() & places[1].keys()
    assert all(places[0][name] == places[1][name] for name in shared)
    assert places[1].keys() - shared == {f"model.layers.{layer}.mamba.conv1d.weight.taps" for layer in range(layers)}


@pytest.fixture
def compiled_here() -> Path:
    """The library that the other tests compile anyway."""
    return native_library.compiled()


def test_without_a_compiler(
    tiny: Path,
    build: Build,
    compiled_here: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The stock graph runs, and says so in a line; where a wheel has brought the kernels, they run."""
    artifact = build(tiny, "int4")
    monkeypatch.setattr(kernel_build, "PACKAGED", tmp_path / "kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    stock = load_runner(artifact)
    assert stock.provenance.kernels.startswith("onnxruntime ")
    assert "no-such-compiler" in stock.provenance.fallback
    assert len(stock.provenance.fallback.splitlines()) == 1
    with pytest.raises(H1ExportError, match="no-such-compiler"):
        load_runner(artifact, kernels="native")

    level = kernel_build.LEVELS["aarch64" if platform.machine() == "arm64" else platform.machine()][-1]
    kernel_build.PACKAGED.mkdir()
    wheels = Path(shutil.copy(compiled_here, kernel_build.PACKAGED / kernel_build.file_name(level)))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    ids = np.arange(12)[None]
    for kernels in ("auto", "native"):
        ours = load_runner(artifact, kernels=kernels)
        assert ours.provenance.kernels.startswith("h1export in onnxruntime ")
        assert ours.provenance.fallback == ""
        found, wanted = (one.step(ids, np.ones_like(ids), one.initial(1))[0] for one in (ours, stock))
        assert 0 < np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()

    # compiling stays a choice
    assert cli.run(["generate", str(artifact.folder), "x", "--kernels", "compiled", "--max-tokens", "1"]) == 2
    assert "no C++ compiler found" in capsys.readouterr().err
    monkeypatch.setattr(native_library, "compiled", lambda: compiled_here)
    asked: list[Path] = []
    opened = "h1export.targets.onnxruntime.runner.open_inference_session"
    monkeypatch.setattr(opened, lambda *_, library, **__: asked.append(library))
    for kernels in ("compiled", "native"):
        load_runner(artifact, kernels=kernels)
    assert asked == [compiled_here, wheels]


@pytest.mark.parametrize("kernels", ["native", "compiled"])
def test_kernels_that_an_artifact_has_no_graph_for(kernels: str, tiny: Path, build: Build) -> None:
    with pytest.raises(H1ExportError, match=rf"has no model\.native\.onnx; leave out --kernels {kernels}"):
        load_runner(build(tiny, graph="portable"), kernels=kernels)
