"""sbom.json is CycloneDX, names every package of the manifest, and is the same for the same build."""

from __future__ import annotations

import json
from pathlib import Path

from artifact_files import manifest_of
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from h1export.artifact.sbom import sbom
from h1export.model.falcon_h1.config import FalconH1Config


def test_it_is_valid_complete_and_reproducible(tmp_path: Path, config: FalconH1Config) -> None:
    manifest = manifest_of(tmp_path, config)
    text = sbom(manifest)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert sbom(manifest) == text
    data = json.loads(text)
    found = {item["name"]: item for item in data["components"]}
    assert {name: found[name]["version"] for name in manifest.toolchain} == manifest.toolchain
    assert found["checkpoint"]["hashes"] == [{"alg": "SHA-256", "content": manifest.source}]
    assert "timestamp" not in data["metadata"]
    (root,) = (item for item in data["dependencies"] if item["ref"] == "artifact")
    assert len(root["dependsOn"]) == len(found)
