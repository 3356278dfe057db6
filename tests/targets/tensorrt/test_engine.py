"""TensorRT-RTX itself builds engines on a CPU, and each failure ends in an error that leaves no files."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from faults import library

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.commands.build import build_artifact
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.quantize.scheme import QuantScheme
from h1export.targets.tensorrt.engine import build
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, MODEL, RECIPE, EngineConfig
from h1export.targets.tensorrt.options import TensorRTOptions

Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with a head dimension and a state size that the library has kernels for."""
    return make_checkpoint(mamba_d_state=64)


@pytest.fixture(scope="module")
def built(checkpoint: Path, driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An int4 artifact with an engine for one GPU; its machine code is replaced by stand-ins."""

    def write(folder: Path, *_: Any) -> dict[str, Any]:
        folder.mkdir()
        shutil.copyfile(driver / "libh1export_plugin.so", folder / "libh1export_plugin.so")
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("h1export.targets.tensorrt.plugin.write", write)
        options = TensorRTOptions(max_context=96, max_batch=2, runtime="rtx", architectures=(86,))
        return build_artifact(
            checkpoint, "trt", tmp_path_factory.mktemp("engine") / "out", scheme=QuantScheme("int4"), options=options
        )


@pytest.fixture
def folder(built: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact without its engine."""
    copy = Path(shutil.copytree(built.folder, tmp_path / "copy"))
    (copy / ENGINE).unlink()
    return copy


def test_the_engine_has_both_profiles_and_a_plugin_layer_for_each_op(built: Artifact, folder: Path) -> None:
    assert built.manifest.files[ENGINE][1] > built.manifest.files["model.onnx.data"][1] / 2
    build_log = build.build(folder, SILENT)
    assert build_log.plugins == 2 * built.config.num_hidden_layers
    assert build_log.profiles == 2
    assert build_log.errors == []
    requirements = built.manifest.requirements
    assert requirements["version"] == build_log.version
    assert requirements["engine"] == built.manifest.files[ENGINE][0]
    assert requirements["plugin"] == built.manifest.files[LIBRARY][0]
    assert requirements["architectures"] == [86]


def test_the_working_folder_is_not_imported_from(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder may be a clone of h1export."""
    (tmp_path / "h1export").mkdir()
    (tmp_path / "h1export" / "__init__.py").write_text("raise ImportError('another h1export')")
    monkeypatch.chdir(tmp_path)
    assert build.build(folder, SILENT).errors == []


def test_recipe_json_holds_all_settings(built: Artifact) -> None:
    config = EngineConfig.read(built.folder)
    assert config.hashes == {name: built.manifest.files[name][0] for name in (MODEL, f"{MODEL}.data", LIBRARY)}
    decode, prefill = config.profiles
    assert decode.inputs["input_ids"] == ((1, 1), (2, 1), (2, 1))
    assert prefill.inputs["input_ids"] == ((1, 1), (2, 24), (2, 96))
    assert prefill.inputs["past_key_values.0.key"][2] == (2, 2, 96, 32)
    line = (built.folder / "trtexec.sh").read_text()
    assert line == config.trtexec() + "\n"
    assert "--maxShapes=attention_mask:2x96,input_ids:2x96,past_key_values.0.conv_state:2x320x3" in line
    assert line.count("--profile=") == 2
    readme = (built.folder / "README.md").read_text()
    assert "# Falcon-H1 for TensorRT-RTX" in readme
    assert "[batch, 96]" in readme


def unknown_op(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "SSMScan").op_type = "SSMScam"


def wrong_dtype(model: onnx.ModelProto) -> None:
    """Convert the decay A to fp16, which the plugin does not take."""
    node = next(node for node in model.graph.node if node.op_type == "SSMScan")
    model.graph.node.insert(0, onnx.helper.make_node("Cast", [node.input[2]], ["short"], to=onnx.TensorProto.FLOAT16))
    node.input[2] = "short"


def no_attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "SSMScan")
    node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == "dt_max"))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (unknown_op, "has a node that neither TensorRT nor the plugin knows.*SSMScam"),
        (wrong_dtype, "dtypes that it does not take"),
        (no_attribute, "could not parse the network: h1export::SSMScan: .*attribute dt_max is missing"),
    ],
)
def test_a_wrong_network_is_an_error(edit: Edit, said: str, folder: Path) -> None:
    model = onnx.load(folder / MODEL, load_external_data=False)
    edit(model)
    onnx.save(model, folder / MODEL)
    with pytest.raises(H1ExportError, match=rf"{MODEL}: .*{said}"):
        build.build(folder, SILENT)
    assert not (folder / ENGINE).exists()


def test_states_in_place_need_their_preview_feature(folder: Path) -> None:
    config = EngineConfig.read(folder)
    (folder / RECIPE).write_text(replace(config, preview_features=()).to_json())
    with pytest.raises(
        H1ExportError, match=r"updates states in place, which recipe.json does not allow.* of recipe.json"
    ):
        build.build(folder, SILENT)
    assert not (folder / ENGINE).exists()


def test_a_corrupted_network(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"no model at all")
    with pytest.raises(H1ExportError, match=rf"{MODEL}: "):
        build.build(folder, SILENT)
    assert not (folder / ENGINE).exists()


def test_a_full_disk_leaves_no_engine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker process has computed the engine, and cannot write it."""
    before = sorted(path.name for path in folder.iterdir())
    (tmp_path / "control").mkdir()
    for name, value in library.environment(tmp_path / "control", library.compiled(tmp_path)).items():
        monkeypatch.setenv(name, value)
    library.control().arm(library.Fault(0, library.FOREVER, errno.ENOSPC), folder)
    with pytest.raises(H1ExportError, match=r"could not write the engine: cannot be written \(No space left on device"):
        build.build(folder, SILENT)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_corrupted_plugin_ends_the_build_with_code_2_and_nothing_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path, *_: Any) -> dict[str, Any]:
        folder.mkdir()
        (folder / "libh1export_plugin.so").write_bytes(b"\x7fELF and nothing that follows")
        return {}

    monkeypatch.setattr("h1export.targets.tensorrt.plugin.write", write)
    command = [
        "build",
        str(checkpoint),
        "--target",
        "trt",
        "--method",
        "rtn",
        "--quiet",
        "--sm",
        "86",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.run([*command, "--runtime", "rtx"]) == 2
    said = capsys.readouterr().err
    assert "libh1export_plugin.so: TensorRT-RTX" in said
    assert "could not load the plugin" in said
    assert list(tmp_path.iterdir()) == []


def test_without_rtx_the_error_says_so(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("h1export.targets.tensorrt.sdk.has", lambda _: False)
    with pytest.raises(
        H1ExportError, match=r"TensorRT-RTX: is not installed; pip install .*or build with --runtime tensorrt"
    ):
        build_artifact(
            checkpoint, "trt", tmp_path / "out", scheme=QuantScheme("int4"), options=TensorRTOptions(runtime="rtx")
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"runtime": "rtx"}', '{"profiles": [{}]}'])
def test_another_recipe_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text(text)
    with pytest.raises(H1ExportError, match=r"recipe.json: is not a description of an engine build"):
        EngineConfig.read(tmp_path)


EDITS: dict[str, tuple[str, object]] = {
    "engine elsewhere": ("engine", "../../elsewhere"),
    "absolute plugin": ("plugin", "/usr/lib/libcrypt.so"),
    "network of another name": ("network", "other.onnx"),
    "unknown feature": ("preview_features", ["__class__"]),
    "unknown flag": ("builder_flags", ["__init__"]),
    "other versions": ("versions", ">=0"),
    "no profiles": ("profiles", []),
    "huge architecture": ("architectures", [1 << 62]),
    "another runtime": ("runtime", "sh"),
    "a hash that is none": ("hashes", {"a": "b"}),
    "an unknown key": ("command", "rm"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_recipe_that_another_has_edited_is_refused_before_anything_is_written(edit: str, folder: Path) -> None:
    before = sorted(folder.parent.rglob("*"))
    data = json.loads((folder / RECIPE).read_text())
    name, value = EDITS[edit]
    (folder / RECIPE).write_text(json.dumps(data | {name: value}))
    with pytest.raises(H1ExportError, match=r"recipe.json: is not a description of an engine build \(.{1,250}$"):
        build.build(folder, SILENT)
    assert sorted(folder.parent.rglob("*")) == before
