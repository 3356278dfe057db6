"""verify_on_mac.py of a built artifact, run on its package with the evaluator in the place of Core ML."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.targets.coreml.evaluator import Evaluator, Package

Build = Callable[..., Artifact]

SHIPPED = ("Generate.swift", "README.md", "golden.npz", "mac.json", "verify_on_mac.py", "tokenizer.json", "config.json")


class Function:
    """A function of the package, run by the evaluator."""

    def __init__(self, package: Path, name: str, units: str) -> None:
        self._evaluator = Evaluator(Package.open(package), name)
        self.inputs = {name: tuple(kind.shape) for name, kind in self._evaluator.function.inputs.items()}

    def make_state(self) -> dict[str, Any]:
        return self._evaluator.initial_states()

    def predict(self, feeds: Mapping[str, Any], state: Any) -> Mapping[str, Any]:
        declared = self._evaluator.function.inputs
        return self._evaluator.run(
            {name: array.astype(declared[name].dtype.array) for name, array in feeds.items()}, state
        )


def script_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = importlib.util.spec_from_file_location("verify_on_mac_built", folder / "verify_on_mac.py")
    assert config is not None
    assert config.loader is not None
    script = importlib.util.module_from_spec(config)
    monkeypatch.setitem(sys.modules, config.name, script)
    config.loader.exec_module(script)
    monkeypatch.setattr(script, "load", Function)
    return script


@pytest.mark.parametrize("chosen", [{}, {"state_io": True, "logits": "last"}], ids=["states", "state io, last logits"])
def test_a_built_artifact_verifies_itself(
    chosen: dict[str, Any], tiny: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=192, **chosen)
    assert set(SHIPPED) <= set(artifact.manifest.files)
    largest = max(size for _, size in artifact.manifest.files.values())
    assert artifact.manifest.files[artifact.manifest.weights_file][1] == largest
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    assert script_of(folder, monkeypatch).main(["--units", "CPU_ONLY", "--repeats", "1"]) == 0
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    errors = {row["case"]: row["figures"]["logits"] for row in rows if row["comparison"] == "golden"}
    assert list(errors) == ["1 token", *(f"{prompt} tokens" for prompt in (63, 64, 65, 133, 156))]
    assert 0 < max(errors.values()) <= 3e-3  # the evaluator's fp16; a real device gets the wider tolerance of golden.py


def test_a_wrong_scale_does_not_verify(
    tiny: Path, build: Build, with_changed_bytes: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build(tiny, "int4", target="coreml", max_context=192)
    wrong = with_changed_bytes(
        artifact,
        "model_layers_0_mamba_out_proj_weight",
        "scale",
        lambda data: (2 * data.view(np.float16)).view(np.uint8),
    )
    assert script_of(wrong.folder, monkeypatch).main(["--units", "CPU_ONLY", "--repeats", "1"]) == 1
