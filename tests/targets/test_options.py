"""Options of a target: what they refuse, how a manifest holds them, and that no target's depend on another's."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from h1export.artifact.artifact import Artifact, Manifest
from h1export.cli import run
from h1export.commands.build import BuildJob
from h1export.errors import H1ExportError
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme
from h1export.targets import options_class, target_infos
from h1export.targets.coreml.options import CoreMLOptions
from h1export.targets.onnxruntime.options import LEVELS, OrtOptions
from h1export.targets.options import Flag, TargetOptions, option_fields
from h1export.targets.tensorrt import options as tensorrt_options
from h1export.targets.tensorrt.options import TensorRTOptions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoreMLOptions(compute="bf16"), "--compute: cannot be 'bf16'; give fp16 or fp32"),  # type: ignore[arg-type]
        (lambda: TensorRTOptions(max_batch=0), "--max-batch: cannot be 0; give 1 or more"),
        (lambda: TensorRTOptions(architectures=("89",)), "--sm: cannot be '89'; give a value of type int"),  # type: ignore[arg-type]
        (lambda: TensorRTOptions(max_context=True), "--max-context: cannot be True; give a value of type int"),
        (lambda: OrtOptions(graph="gpu"), "--graph: cannot be 'gpu'; give cpu or cuda or portable"),  # type: ignore[arg-type]
        (
            lambda: OrtOptions(activations="bf16", graph="portable"),
            "--activations: bf16 is not a dtype that the activations of --graph portable have; use --graph cuda",
        ),
        (
            lambda: OrtOptions(accuracy_level=3),
            "--accuracy-level: 3 is not a level that the kernels of --graph cpu have",
        ),
        (lambda: OrtOptions(kv="bf16"), "--kv: cannot be 'bf16'; give auto or fp16 or int8 or fp32"),  # type: ignore[arg-type]
        (
            lambda: OrtOptions(kv="fp16", graph="wasm"),
            "--kv: fp16 is a dtype that only --graph cpu with --layout genai has for keys and values; use fp32",
        ),
        (
            lambda: OrtOptions(kv="int8", layout="transformers.js"),
            "--kv: int8 is a dtype that only --graph cpu with --layout genai has for keys and values; use fp32",
        ),
        (
            lambda: OrtOptions(kv="fp32", graph="cuda"),
            "--kv: keys and values of --graph cuda have the dtype of its activations; use --activations",
        ),
    ],
)
def test_a_wrong_value_is_refused(make: Callable[[], TargetOptions], message: str) -> None:
    with pytest.raises(H1ExportError) as refused:
        make()
    assert message in str(refused.value)


def test_the_first_level_of_a_graph_is_its_default() -> None:
    for graph, levels in LEVELS.items():
        assert OrtOptions(graph=graph).accuracy_level == levels[0]
        for level in levels:
            assert OrtOptions(graph=graph, accuracy_level=level).accuracy_level == level


def job(checkpoint: Path, target: str, options: TargetOptions | None = None) -> BuildJob:
    return BuildJob.open(checkpoint, target, scheme=QuantScheme("none"), options=options, calibration=Calibration())


def test_options_of_another_target_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(H1ExportError, match="CoreMLOptions are not the options of target ort; give OrtOptions"):
        job(make_checkpoint(), "ort", CoreMLOptions())


def manifests(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Manifest]:
    """Target -> the manifest of a build with default options; versions of packages do not matter."""
    monkeypatch.setattr("h1export.commands.build.metadata.version", lambda name: "1")
    return {target: job(checkpoint, target).manifest("0" * 64) for target in target_infos()}


def test_a_manifest_has_the_options_of_its_target_alone(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {target: dict(manifest.options) for target, manifest in manifests(make_checkpoint(), monkeypatch).items()}
    assert found == {
        "ort": {
            "logits": "all",
            "embedding": "auto",
            "graph": "cpu",
            "activations": "fp16",
            "captured_decode": False,
            "layout": "genai",
            "kv": "auto",
            "accuracy_level": 4,
        },
        "coreml": {"logits": "all", "embedding": "auto", "max_context": 2048, "compute": "fp16", "state_io": False},
        "gguf": {
            "logits": "all",
            "head": "auto",
            "embedding": "auto",
            "mix": "shared",
            "floats": "f32",
            "vocabulary": "auto",
        },
        "gptq": {"logits": "all", "embedding": "auto", "unpacked": ()},
        "mlx": {"logits": "all", "embedding": "auto", "compute": "fp16"},
        "trt": {
            "logits": "all",
            "embedding": "auto",
            "max_context": 2048,
            "compute": "fp16",
            "max_batch": 1,
            "runtime": None,
            "architectures": (),
        },
    }


def test_a_new_option_changes_its_own_target_alone(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the key nor a byte of another target's manifest depends on it."""
    before = manifests(make_checkpoint(), monkeypatch)

    @dataclass(frozen=True, kw_only=True)
    class More(TensorRTOptions):
        streams: int = 1

    More.__annotations__["streams"] = Annotated[int, Flag("Streams of an engine.")]
    monkeypatch.setattr(tensorrt_options, "Options", More)
    after = manifests(make_checkpoint(), monkeypatch)
    assert options_class("trt") is More
    assert after["trt"].options["streams"] == 1
    for target in before:
        same = target != "trt"
        assert (before[target].key == after[target].key) == same
        assert (before[target].to_json() == after[target].to_json()) == same


@pytest.mark.parametrize("target", sorted(target_infos()))
def test_options_read_back_are_those_of_the_build(target: str, tmp_path: Path) -> None:
    """Every option has another value than its default, in one build or, where two exclude each other, in another."""
    own = options_class(target)
    together: dict[str, Any] = {}
    builds = [together]
    for field in option_fields(own):
        value = {field.name: other_value(field)}
        try:
            own(**together | value)
        except H1ExportError:
            builds.append(value)
        else:
            together |= value
    for values in builds:
        options = own(**values)
        assert options != own()
        assert own.read(artifact_with(tmp_path, target, dataclasses.asdict(options))) == options


def other_value(field: Any) -> Any:
    """A value that is not the default."""
    if field.repeated:
        return field.choices[:2] or (89, 90)
    if field.choices:
        return next(choice for choice in field.choices if choice != field.default)
    return {bool: True, int: 7 if field.minimum else 0}[field.kind]


def artifact_with(folder: Path, target: str, options: dict[str, Any]) -> Artifact:
    """An artifact of nothing but a manifest with these ``options``, as read from JSON."""
    manifest = Manifest(
        target,
        "0" * 64,
        {},
        scheme={},
        options=json.loads(json.dumps(options)),
        toolchain={},
        inputs={},
        outputs={},
        weights=(),
        weights_file="",
        files={},
    )
    return Artifact(folder, manifest)


DEFAULTS = {"logits": "all", "graph": "cpu", "accuracy_level": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provider": "cpu"}, "option 'provider' is unknown to target ort"),
        ({"graph": None}, "option 'graph' cannot be None"),
        ({"graph": "tpu"}, "option 'graph' cannot be 'tpu'"),
        ({"graph": ["cpu"]}, "option 'graph' cannot be ['cpu']"),
        ({"accuracy_level": "4"}, "option 'accuracy_level' cannot be '4'"),
        ({"accuracy_level": True}, "option 'accuracy_level' cannot be True"),
        ({"accuracy_level": 4.0}, "option 'accuracy_level' cannot be 4.0"),
        ({"accuracy_level": -1}, "option 'accuracy_level' cannot be -1"),
        ({"graph": "cuda"}, "--accuracy-level: 4 is not a level that the kernels of --graph cuda have"),
    ],
)
def test_a_wrong_option_in_a_manifest_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(H1ExportError) as refused:
        OrtOptions.read(artifact_with(tmp_path, "ort", DEFAULTS | change))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'manifest.json'}: ")
    assert str(refused.value).endswith("; build the artifact again")


def test_a_missing_option_in_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(H1ExportError, match="option 'graph' is missing, and belongs to target ort"):
        OrtOptions.read(artifact_with(tmp_path, "ort", {"logits": "all", "accuracy_level": 4}))


@pytest.mark.ort
@pytest.mark.parametrize("command", [["inspect"], ["generate"], ["validate"], ["bench"]])
def test_a_wrong_manifest_is_exit_code_2(
    command: list[str], tiny: Path, build: Callable[..., Artifact], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(build(tiny, "int4").folder, tmp_path / "out"))
    data = json.loads((folder / "manifest.json").read_text())
    data["options"]["accuracy_level"] = "fast"
    (folder / "manifest.json").write_text(json.dumps(data))
    words = {"generate": ["x"], "validate": ["--latency-pairs", "0"], "bench": ["--repeats", "1"]}
    assert run([*command, str(folder), *words.get(command[0], [])]) == 2
    assert "option 'accuracy_level' cannot be 'fast'" in capfd.readouterr().err


@pytest.mark.parametrize("target", sorted(target_infos()))
def test_every_option_is_read_by_its_target(target: str) -> None:
    """An option that changes nothing would be a lie in the help."""
    folder = Path(tensorrt_options.__file__).parents[1] / target_infos()[target].folder
    texts = [file.read_text(encoding="utf-8") for file in folder.rglob("*.py") if file.name != "options.py"]
    texts.append(Path(inspect.getfile(BuildJob)).read_text(encoding="utf-8"))  # what every target has
    for field in option_fields(options_class(target)):
        name = "last_logits" if field.name == "logits" else field.name
        assert any(f"options.{name}" in text or f"(artifact).{name}" in text for text in texts), field.name
