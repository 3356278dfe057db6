"""The manifest: its JSON text gives the same values again, and any other text is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from artifact_files import build, manifest_of, refused, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import FORMAT, MANIFEST, Manifest, StoredPart, StoredWeight
from h1export.checkpoint.weight_expr import Multiplier
from h1export.model.falcon_h1.config import FalconH1Config


def test_a_manifest_survives_its_file(artifact: Artifact, config: FalconH1Config) -> None:
    """Every field is read back; in config, JSON lists stand for tuples, and infinity has transformers' spelling."""
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
        64 * "5",
        {"limit": (0.0, math.inf)},
        scheme={},
        options=options,
        toolchain={},
        inputs={},
        outputs={},
        weights=weights,
        weights_file="a",
        files={"a": (64 * "d", 1)},
    )
    text = manifest.to_json()
    again = Manifest.parse(text, Path("x"))
    assert again.weights == weights
    assert again.options == options
    assert again.files == manifest.files
    assert again.to_json() == text


def test_nan_is_never_written(config: FalconH1Config, tmp_path: Path) -> None:
    broken = dataclasses.replace(manifest_of(tmp_path, config), scheme={"group_size": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        broken.to_json()


def test_two_builds_in_two_places_write_the_same_bytes(tmp_path: Path, config: FalconH1Config) -> None:
    """Neither the folder's name nor the order in which its files were written changes them."""
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
    "cut": b'{"format": 5, "target": ',
    "not utf-8": b"\xff\xfe\xff",
    "too deep": b"[" * 200_000,
    "null": b"null",
    "a list": b"[]",
    "a string": b'"format"',
    "a number": b"1",
    "no version": b"{}",
    "only a version": b'{"format": 5}',
    "another program's": b'{"manifest_version": 3, "name": "an extension"}',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_other_content_is_not_a_manifest(name: str, artifact: Artifact) -> None:
    (artifact.folder / MANIFEST).write_bytes(GARBAGE[name])
    refused(artifact.folder, MANIFEST, "not a manifest of h1export", "build the artifact again")


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(Manifest) if field.name != "requirements"]
)
def test_a_field_that_is_missing(field: str, artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data.pop(field)), MANIFEST, "not a manifest", field)


def test_a_weights_file_that_is_not_listed(artifact: Artifact) -> None:
    refused(rewrite(artifact, lambda data: data.update(weights_file="other.data")), MANIFEST, "other.data")


def test_requirements_are_left_out_where_there_are_none_and_must_be_an_object(artifact: Artifact) -> None:
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
