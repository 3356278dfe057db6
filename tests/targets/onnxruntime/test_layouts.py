"""--layout transformers.js: names, what its config files say to JavaScript, and what is refused.

tests/examples has the tests in which transformers.js runs such a folder.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.checkpoint.chat_template import ChatTemplate
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.commands.generate import generate_text
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import KEPT
from h1export.runtime.generation import Sampling
from h1export.targets.onnxruntime import transformers_js
from h1export.targets.onnxruntime.layouts import LAYOUTS
from h1export.targets.onnxruntime.options import LayoutName, OrtOptions

Build = Callable[..., Artifact]
JS: LayoutName = "transformers.js"


def strict(path: Path) -> Any:
    """Return JSON as JavaScript reads it: without Infinity and NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path.name} has {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    ("quant", "graph", "dtype"),
    [("none", "model.onnx", "fp32"), ("int8", "model_quantized.onnx", "q8"), ("int4", "model_q4.onnx", "q4")],
)
def test_files_inputs_and_outputs_have_the_names_of_transformers_js(
    quant: str, graph: str, dtype: str, make_checkpoint: Callable[..., Path], build: Build
) -> None:
    artifact = build(make_checkpoint(), quant, layout=JS)
    assert {name for name in artifact.manifest.files if "onnx" in name} == {f"onnx/{graph}", f"onnx/{graph}_data"}
    model = onnx.load(artifact.folder / "onnx" / graph, load_external_data=False)
    places = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    assert places == {f"{graph}_data"}  # transformers.js and ONNX Runtime look beside the graph
    states = {
        f"{side}{name}"
        for layer in range(artifact.config.num_hidden_layers)
        for side, name in [
            ("past_conv.", layer),
            ("past_ssm.", layer),
            ("past_key_values.", f"{layer}.key"),
            ("past_key_values.", f"{layer}.value"),
        ]
    }
    present = {name.replace("past_key_values", "present").replace("past_", "present_") for name in states}
    inputs = {value.name: value for value in model.graph.input}
    assert inputs.keys() == {"input_ids", "attention_mask", *states, KEPT} == artifact.manifest.inputs.keys()
    assert {value.name for value in model.graph.output} == {"logits", *present} == artifact.manifest.outputs.keys()
    assert KEPT not in {one.name for one in model.graph.initializer}  # no input that may be left out is seen there
    assert not inputs.pop(KEPT).type.tensor_type.shape.dim  # transformers.js gives a number
    for name, value in inputs.items():
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims[0] == "batch_size", name  # the one symbol that transformers.js gives a size; others become 0
        assert dims == list(artifact.manifest.inputs[name][1])
    custom = strict(artifact.folder / "config.json")["transformers.js_config"]
    assert custom == {"dtype": dtype, "use_external_data_format": 1}


def test_weights_and_text_are_those_of_the_default_layout(tiny: Path, build: Build) -> None:
    ours, theirs = build(tiny, "int4"), build(tiny, "int4", layout=JS)
    data = [(one.folder / one.manifest.weights_file).read_bytes() for one in (ours, theirs)]
    assert data[0] == data[1]
    codes = [
        load_runner(one, kernels="stock").stored_weights().quantized("lm_head.weight").codes for one in (ours, theirs)
    ]
    assert np.array_equal(codes[0], codes[1])
    texts = [
        "".join(generate_text(one.folder, "import", 24, sampling=Sampling(), kernels="stock")) for one in (ours, theirs)
    ]
    assert texts[0] == texts[1]


def test_the_files_for_javascript_are_the_same_model_for_every_switch(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path
    model_config = FalconH1Config.load(checkpoint)
    for file in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint / file, folder)
    transformers_js.write(folder, model_config, OrtOptions(layout=JS), dtype="q4")
    assert FalconH1Config.load(folder) == model_config
    for file in folder.glob("*.json"):
        strict(file)
    config = strict(folder / "config.json")
    needed = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "model_type"}
    assert needed <= config.keys()  # transformers.js has no defaults for them
    assert not list(folder.glob("tokenizer*"))  # none is made up
    assert "takes token ids" in (folder / "README.md").read_text(encoding="utf-8")


def test_kinds_of_layers_are_left_out_and_infinity_is_said_as_transformers_says_it(
    make_spoken: Callable[..., Path], tmp_path: Path, build: Build
) -> None:
    folder = Path(shutil.copytree(make_spoken(), tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"layer_types": ["hybrid", "hybrid"], "time_step_limit": [0.0, math.inf], "further": [{"a": -math.inf}]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": Infinity}', encoding="utf-8")
    artifact = build(folder, "int4", layout=JS)
    found = strict(artifact.folder / "config.json")
    assert "layer_types" not in found
    assert found["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert found["further"] == [{"a": {"__float__": "-Infinity"}}]
    assert artifact.config == FalconH1Config.load(folder)
    assert strict(artifact.folder / "tokenizer_config.json")["padding_side"] == "left"


def test_chat_templates_and_special_tokens_are_where_transformers_js_looks(
    make_spoken: Callable[..., Path], tmp_path: Path, build: Build
) -> None:
    folder = Path(shutil.copytree(make_spoken(), tmp_path / "checkpoint"))
    (folder / "chat_template.jinja").write_text("one {{ bos_token }}", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("two", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "old"}', encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "a"}}', encoding="utf-8")
    made = build(folder, "int4", layout=JS).folder
    found = strict(made / "tokenizer_config.json")
    named = {one["name"]: one["template"] for one in found["chat_template"]}
    assert named == {"default": "one {{ bos_token }}", "tool_use": "two"}
    assert found["bos_token"] == "a"
    before, after = ChatTemplate.read(folder), ChatTemplate.read(made)
    assert (after.templates, after.tokens) == (before.templates, before.tokens)
    assert load_tokenizer(made).encode("abc").ids == load_tokenizer(folder).encode("abc").ids


def test_a_number_that_javascript_cannot_read_is_refused(
    make_spoken: Callable[..., Path], tmp_path: Path, build: Build
) -> None:
    folder = Path(shutil.copytree(make_spoken(), tmp_path / "checkpoint"))
    (folder / "generation_config.json").write_text('{"temperature": NaN}', encoding="utf-8")
    with pytest.raises(H1ExportError, match=r"generation_config.json: has a number that is not finite"):
        build(folder, "int4", layout=JS)
    build(folder, "int4")


def test_the_graph_for_gpus_is_refused() -> None:
    with pytest.raises(H1ExportError, match=r"--layout: .* --graph cuda on none of them; use --graph cpu"):
        OrtOptions(graph="cuda", layout=JS)


def test_a_manifest_from_before_layouts_means_the_default(tiny: Path, build: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(build(tiny, "int4").folder, tmp_path / "old"))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["options"].pop("layout") == "genai"
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert OrtOptions.read(Artifact.open(folder)).layout == "genai"
    load_runner(Artifact.open(folder), kernels="stock")


@pytest.mark.parametrize(("location", "ok"), [("model_q4.onnx_data", True), ("../onnx/model_q4.onnx_data", False)])
def test_data_outside_the_files_of_the_artifact_is_refused(
    location: str, ok: bool, tiny: Path, build: Build, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(build(tiny, "int4", layout=JS).folder, tmp_path / "out"))
    graph = folder / "onnx" / "model_q4.onnx"
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, graph)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"]["onnx/model_q4.onnx"][1] = graph.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    artifact = Artifact.open(folder)
    if ok:
        load_runner(artifact)
        return
    with pytest.raises(H1ExportError, match="which is no file of the artifact"):
        load_runner(artifact)


def test_a_manifest_whose_weights_belong_to_no_graph_is_refused(tiny: Path, build: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(build(tiny, "int4", layout=JS).folder, tmp_path / "out"))
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["weights_file"] = "tokenizer.json"
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(H1ExportError, match=r"belong to no graph of its layout; build the artifact again"):
        load_runner(Artifact.open(folder))


@pytest.mark.parametrize("graph", ["cpu", "wasm", "portable"])
def test_no_kernel_computes_with_float16(graph: str, tiny: Path, build: Build, tmp_path: Path) -> None:
    """Some GPUs cannot, in browsers; scales in float16 are cast when a session is made, and never after."""
    artifact = build(tiny, "int4", graph=graph, layout=JS)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    path = artifact.folder / "onnx" / "model_q4.onnx"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    left = onnx.load(tmp_path / "folded.onnx", load_external_data=False).graph
    half = {one.name for one in left.initializer if one.data_type == onnx.TensorProto.FLOAT16}
    assert not half & {name for node in left.node for name in node.input}
    assert len(left.initializer) > 40


def test_every_layout_has_a_name_for_every_precision() -> None:
    assert all(layout.graphs.keys() == {32, 8, 4} for layout in LAYOUTS.values())
