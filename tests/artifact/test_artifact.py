"""The manifest and Artifact.open: what was written is what is read, and a changed folder is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.artifact import FORMAT, MANIFEST, Artifact, Manifest, StoredPart, StoredWeight, file_table
from h1export.artifact.staging import staged
from h1export.checkpoint.weight_expr import Multiplier
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config

FILES = {
    "config.json": b"{}",
    "model.mlpackage/Data/weights/weight.bin": bytes(reversed(range(256))),
    "model.mlpackage/Manifest.json": b"[]",
    "model.onnx": b"graph",
    "model.onnx.data": bytes(range(256)),
}
NESTED = "model.mlpackage/Data/weights/weight.bin"


def manifest_of(folder: Path, config: FalconH1Config) -> Manifest:
    """A manifest as a build would write it, without building anything."""
    in_proj = StoredPart("model.layers.0.mamba.in_proj.weight", 422, Multiplier(((192, 0.44), (230, 0.3125))))
    head = StoredPart("lm_head.weight", 259, Multiplier.scalar(0.39))
    return Manifest(
        target="onnxruntime",
        source="0" * 64,
        config=dataclasses.asdict(config),
        scheme={"quant": "int4", "group_size": 32},
        options={"accuracy_level": 4, "last_logits": False},
        toolchain={"numpy": "2.0.0", "h1export": "0.1.0"},
        inputs={"input_ids": ("int64", ("batch", "sequence"))},
        outputs={"logits": ("float32", ("batch", "sequence", 259))},
        weights=(
            StoredWeight("in_proj_q4", 4, 32, axis=0, parts=(in_proj,)),
            StoredWeight("head_q4", 4, 32, axis=1, parts=(head,)),
        ),
        weights_file="model.onnx.data",
        files=file_table(folder),
    )


def build(out: Path, config: FalconH1Config, reverse: bool = False) -> Artifact:
    """A small artifact at ``out``."""
    with staged(out, force=False, key="0123456789abcdef") as folder:
        for name in sorted(FILES, reverse=reverse):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(FILES[name])
        (folder / MANIFEST).write_text(manifest_of(folder, config).to_json(), encoding="utf-8")
    return Artifact.open(out)


@pytest.fixture
def config(spec_of: Callable[..., FalconH1Config]) -> FalconH1Config:
    """Its time_step_limit is infinite, which JSON has no number for."""
    config = spec_of()
    assert math.isinf(config.time_step_limit[1])
    return config


@pytest.fixture
def artifact(tmp_path: Path, config: FalconH1Config) -> Artifact:
    return build(tmp_path / "out", config)


def refused(folder: Path, *mentioned: str) -> None:
    with pytest.raises(H1ExportError) as caught:
        Artifact.open(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)), message
    assert all(text in message for text in mentioned), message
    assert caught.value.next_step


def rewrite(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> Path:
    """The manifest with its JSON changed in place."""
    path = artifact.folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return artifact.folder


def test_a_manifest_survives_its_file(artifact: Artifact, config: FalconH1Config) -> None:
    """Every field comes back; within spec, JSON's lists stand for tuples, and infinity has transformers' spelling."""
    text = (artifact.folder / MANIFEST).read_text(encoding="utf-8")
    expected = manifest_of(artifact.folder, config)
    assert artifact.manifest.weights == expected.weights
    assert artifact.manifest.files == {name: pair for name, pair in expected.files.items() if name != MANIFEST}
    for field in ("target", "source", "scheme", "options", "toolchain", "inputs", "outputs"):
        assert getattr(artifact.manifest, field) == getattr(expected, field)
    assert json.loads(text)["format"] == FORMAT
    assert json.loads(text)["config"]["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert json.loads(text)["inputs"] == {"input_ids": ["int64", ["batch", "sequence"]]}
    assert artifact.manifest.to_json() == text
    assert Manifest.parse(text, Path("x")).to_json() == text


RUNS = st.floats(1e-6, 1e6).map(Multiplier.scalar) | st.lists(
    st.tuples(st.integers(1, 99), st.floats(1e-6, 1e6)), min_size=1, max_size=4
).map(lambda runs: Multiplier(tuple(runs)))
PARTS = st.builds(StoredPart, tensor=st.text(max_size=9), size=st.integers(1, 1 << 24), multiplier=RUNS)
WEIGHTS = st.builds(
    StoredWeight,
    initializer=st.text(max_size=9),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 32]),
    axis=st.sampled_from([0, 1]),
    parts=st.lists(PARTS, max_size=3).map(tuple),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=st.lists(WEIGHTS, max_size=3).map(tuple),
    options=st.dictionaries(st.text(max_size=5), st.integers() | st.booleans() | st.text()),
)
def test_any_weights_and_options_survive(weights: tuple[StoredWeight, ...], options: dict[str, Any]) -> None:
    manifest = Manifest(
        "t",
        "s",
        {"limit": (0.0, math.inf)},
        scheme={},
        options=options,
        toolchain={},
        inputs={},
        outputs={},
        weights=weights,
        weights_file="a",
        files={"a": ("d", 1)},
    )
    text = manifest.to_json()
    again = Manifest.parse(text, Path("x"))
    assert again.weights == weights
    assert again.options == options
    assert again.files == manifest.files
    assert again.to_json() == text


def test_a_number_that_is_none_is_never_written(config: FalconH1Config, tmp_path: Path) -> None:
    broken = dataclasses.replace(manifest_of(tmp_path, config), scheme={"group_size": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json()


def test_two_builds_in_two_places_write_the_same_bytes(tmp_path: Path, config: FalconH1Config) -> None:
    """Whatever the folder is called, and in whatever order its files were written."""
    one = build(tmp_path / "one", config)
    other = build(tmp_path / "elsewhere" / "other", config, reverse=True)
    assert (one.folder / MANIFEST).read_bytes() == (other.folder / MANIFEST).read_bytes()
    assert str(tmp_path) not in (one.folder / MANIFEST).read_text(encoding="utf-8")


def test_the_order_of_mappings_does_not_reach_the_bytes(artifact: Artifact) -> None:
    def reversed_mappings(value: Any) -> Any:
        return {key: reversed_mappings(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    fields = {
        field.name: reversed_mappings(getattr(artifact.manifest, field.name)) for field in dataclasses.fields(Manifest)
    }
    assert list(fields["files"]) != list(artifact.manifest.files)
    assert Manifest(**fields).to_json() == artifact.manifest.to_json()


def test_manifests_and_artifacts_are_frozen(artifact: Artifact) -> None:
    for frozen in (artifact, artifact.manifest, artifact.manifest.weights[0], artifact.manifest.weights[0].parts[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, dataclasses.fields(frozen)[0].name, None)


def test_the_file_table_is_sha256_and_size(artifact: Artifact) -> None:
    expected = {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in FILES.items()}
    assert artifact.manifest.files == expected
    assert list(file_table(artifact.folder)) == sorted([*FILES, MANIFEST])


def test_sizes_alone_read_no_file(artifact: Artifact) -> None:
    (artifact.folder / NESTED).chmod(0)
    assert file_table(artifact.folder, sizes_only=True)[NESTED] == (64 * "0", 256)


@pytest.mark.parametrize("name", ["link", "model.mlpackage/Data/link"])
@pytest.mark.parametrize("to", ["config.json", "model.mlpackage", "nowhere"])
def test_a_link_is_in_no_file_table(name: str, to: str, artifact: Artifact) -> None:
    """What lies behind it is not the artifact's, and Artifact.open would refuse it."""
    (artifact.folder / name).symlink_to(artifact.folder / to)
    with pytest.raises(H1ExportError, match=f"{name}: is not a plain file; a target writes plain files"):
        file_table(artifact.folder)


def test_a_name_that_is_another_ones_elsewhere_is_in_no_file_table(artifact: Artifact) -> None:
    (artifact.folder / "a\\b").write_bytes(b"")
    with pytest.raises(H1ExportError, match="is not a plain file"):
        file_table(artifact.folder)


def test_the_spec_is_read_from_the_artifacts_own_config(
    artifact: Artifact, released: dict[str, Any], config: FalconH1Config
) -> None:
    (artifact.folder / "config.json").write_text(json.dumps(released), encoding="utf-8")
    assert artifact.config == config


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", MANIFEST, "h1export build")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    refused(tmp_path, f"no {MANIFEST}", "h1export build")


def test_a_folder_in_the_manifests_place(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    refused(tmp_path, f"no {MANIFEST}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, artifact: Artifact) -> None:
    (artifact.folder / name).unlink()
    refused(artifact.folder, f"{name}: is missing", "build the artifact again")


def test_a_folder_in_a_files_place(artifact: Artifact) -> None:
    (artifact.folder / "model.onnx").unlink()
    (artifact.folder / "model.onnx").mkdir()
    refused(artifact.folder, "model.onnx: is missing")


@pytest.mark.parametrize(
    ("content", "size"), [(FILES["model.onnx.data"][:-1], 255), (FILES["model.onnx.data"] + b"x", 257), (b"", 0)]
)
def test_a_file_of_another_size(content: bytes, size: int, artifact: Artifact) -> None:
    (artifact.folder / "model.onnx.data").write_bytes(content)
    refused(artifact.folder, f"model.onnx.data: has {size} bytes", "says 256", "build the artifact again")


def test_a_link_in_a_files_place(artifact: Artifact, tmp_path: Path) -> None:
    """Even one to the very same bytes: it could lead to others tomorrow."""
    file = artifact.folder / "model.onnx.data"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(artifact.folder, MANIFEST, "'model.onnx.data'", "not a plain file")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_in_the_place_of_a_folder_on_the_way(depth: int, artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact.folder / "/".join(NESTED.split("/")[:depth])
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refused(artifact.folder, MANIFEST, repr(NESTED), "not a plain file")


def test_a_file_in_the_place_of_a_folder_on_the_way(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.folder / "model.mlpackage").rename(tmp_path / "elsewhere")
    (artifact.folder / "model.mlpackage").write_bytes(b"")
    refused(artifact.folder, f"{NESTED}: is missing")


LEAVING = ["../outside", "/", ".", "..", "", "./model.onnx", "model.onnx/", "a/../model.onnx"]
INSIDE = ["sub//inside", "sub/./inside", "sub/../sub/inside", "sub\\inside", "sub\\..\\model.onnx", "/sub/inside"]


@pytest.mark.parametrize("name", [*LEAVING, *INSIDE], ids=repr)
def test_listed_names_may_not_leave_the_folder(name: str, artifact: Artifact) -> None:
    """Nor say in another way what one name says already."""
    (artifact.folder.parent / "outside").write_bytes(b"graph")
    (artifact.folder / "sub").mkdir()
    for inside in ("sub/inside", "sub\\inside"):
        (artifact.folder / inside).write_bytes(b"graph")
    entry = artifact.manifest.files["model.onnx"]
    folder = rewrite(artifact, lambda data: data["files"].update({name: entry}))
    refused(folder, MANIFEST, repr(name), "not a plain file")


def test_listed_names_may_not_be_absolute(artifact: Artifact) -> None:
    outside = artifact.folder.parent / "outside"
    outside.write_bytes(b"graph")
    folder = rewrite(artifact, lambda data: data["files"].update({str(outside): artifact.manifest.files["model.onnx"]}))
    refused(folder, MANIFEST, str(outside), "not a plain file")


@pytest.mark.parametrize("name", ["a\0b", "none", "model.mlpackage", "model.mlpackage/none", "\ud800"], ids=ascii)
def test_listed_names_that_are_no_file(name: str, artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data["files"].update({name: ["0", 0]})), "is missing")


def test_a_listed_name_too_long_for_the_file_system(artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data["files"].update({"x" * 300: ["0", 0]})), "xxx", "is missing")


@pytest.mark.parametrize("version", [0, FORMAT + 1, str(FORMAT), None, 1.5, [], {}], ids=str)
def test_other_versions_of_the_format(version: object, artifact: Artifact) -> None:
    refused(
        rewrite(artifact, lambda data: data.update(format=version)),
        MANIFEST,
        f"format {version!r}",
        f"reads format {FORMAT}",
        "again",
    )


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "cut": b'{"format": 6, "target": ',
    "not utf-8": b"\xff\xfe\xff",
    "too deep": b"[" * 200_000,
    "null": b"null",
    "a list": b"[]",
    "a string": b'"format"',
    "a number": b"1",
    "no version": b"{}",
    "only a version": b'{"format": 6}',
    "somebody else's": b'{"manifest_version": 3, "name": "an extension"}',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_manifests_that_are_none(name: str, artifact: Artifact) -> None:
    (artifact.folder / MANIFEST).write_bytes(GARBAGE[name])
    refused(artifact.folder, MANIFEST, "not a manifest of h1export", "build the artifact again")


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(Manifest) if field.name != "requirements"]
)
def test_a_field_that_is_missing(field: str, artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data.pop(field)), MANIFEST, "not a manifest", field)


def test_a_weights_file_that_is_not_listed(artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data.update(weights_file="other.data")), MANIFEST, "other.data")


def test_a_passport_that_is_none(artifact: Artifact) -> None:
    """Most artifacts have none, and one that is there holds names."""
    assert "requirements" not in json.loads((artifact.folder / MANIFEST).read_text())
    refused(rewrite(artifact, lambda data: data.update(requirements=[1])), MANIFEST, "not a manifest")


def test_a_field_that_is_unknown(artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data.update(extra=1)), MANIFEST, "not a manifest", "extra")


BAD_FILES: list[object] = [
    None,
    [],
    "ab",
    {"a": None},
    {"a": 1},
    {"a": []},
    {"a": ["d"]},
    {"a": ["d", "x"]},
    {"a": ["d", None]},
    {"a": ["d", 1, 2]},
]
BAD_WEIGHTS: list[object] = [
    None,
    1,
    "w",
    [None],
    [1],
    [{}],
    [{"initializer": "a", "bits": 4, "group_size": 32, "parts": [{"tensor": "t"}]}],
]


@pytest.mark.parametrize(
    ("field", "value"), [*(("files", v) for v in BAD_FILES), *(("weights", v) for v in BAD_WEIGHTS)], ids=str
)
def test_tables_of_another_form(field: str, value: object, artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data.update({field: value})), MANIFEST, "not a manifest")


def test_an_infinite_size(artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data["files"].update(a=["d", math.inf])), MANIFEST, "not a manifest")


def test_hashes_of_an_untouched_artifact_hold(artifact: Artifact) -> None:
    artifact.check_hashes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(FILES)), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_hashes_see_one_bit(tmp_path_factory: pytest.TempPathFactory, name: str, place: float, bit: int) -> None:
    """The size is right, so open() does not see it; check_hashes() names the file."""
    artifact = build(tmp_path_factory.mktemp("flip") / "out", FalconH1Config.from_config({"model_type": "falcon_h1"}))
    content = bytearray(FILES[name])
    content[int(place * len(content))] ^= 1 << bit
    (artifact.folder / name).write_bytes(content)
    with pytest.raises(H1ExportError, match=f"{name}: was changed after the build; build the artifact again"):
        Artifact.open(artifact.folder).check_hashes()


def test_reports_may_be_added(artifact: Artifact) -> None:
    (artifact.folder / "report.json").write_text("{}", encoding="utf-8")
    Artifact.open(artifact.folder).check_hashes()
