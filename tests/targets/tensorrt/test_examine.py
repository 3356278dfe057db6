"""`h1export doctor` on TensorRT artifacts, over stand-ins for the GPU, its driver and the runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import HOST, FakeGpu, FakeTensorRT

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST
from h1export.progress import SILENT
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine import requirements
from h1export.targets.tensorrt.engine.config import ENGINE
from h1export.targets.tensorrt.engine.finalize import build_engine_here
from h1export.targets.tensorrt.engine.requirements import Host

REQUIREMENTS = "h1export.targets.tensorrt.engine.requirements"


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture
def unfinished(
    checkpoint: Path,
    build: Callable[..., Artifact],
    without_plugin: None,
    gpu_host: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An artifact without an engine, on a machine that simulates the GPU HOST."""
    artifact = build(checkpoint, "int4", target="trt", max_context=192, runtime="tensorrt", architectures=(89,))
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "secret folder"))
    fake = FakeTensorRT(folder)
    fake.__version__ = HOST.versions["tensorrt"]
    monkeypatch.setattr("h1export.targets.tensorrt.sdk.module", lambda *_: fake)
    monkeypatch.setattr("h1export.targets.tensorrt.gpu.runner.Gpu", FakeGpu)
    monkeypatch.setattr(f"{REQUIREMENTS}.gpu_architecture", lambda: HOST.architecture)
    monkeypatch.setattr(f"{REQUIREMENTS}.driver_version", lambda: (13, 0))
    return folder


@pytest.fixture
def finished(unfinished: Path) -> Path:
    build_engine_here(unfinished, SILENT)
    return unfinished


@pytest.fixture
def doctor(checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """doctor(folder, *options) -> the exit code, and finding -> (passed, detail, next step)."""

    def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "doctor.json"
        code = cli.run(["doctor", str(folder), str(checkpoint), "--out", str(out), "--quiet", *options])
        text = out.read_text() + out.with_suffix(".md").read_text()
        assert "secret folder" not in text
        assert str(tmp_path) not in text
        document = json.loads(out.read_text())
        assert document["fits"] is (code == 0)
        return code, {f["name"]: (f["passed"], f["detail"], f["next_step"]) for f in document["findings"]} | {
            "rows": document["results"]
        }

    return run


def test_a_fitting_machine_is_validated(finished: Path, doctor: Callable[..., Any]) -> None:
    code, found = doctor(finished)
    rows = found.pop("rows")
    assert code == 0, found
    assert all(passed for passed, _, _ in found.values())
    assert found["loading"][1] == "TensorRT 10.15.1 on sm_89"
    assert {row["case"] for row in rows if row.get("case")} == {"one token", "ragged chunks", "int4"}


def test_a_missing_engine_is_built_where_that_is_asked(unfinished: Path, doctor: Callable[..., Any]) -> None:
    code, found = doctor(unfinished)
    assert (code, found["engine"][0], found["rows"]) == (1, False, [])
    assert "--build" in found["engine"][2]
    assert not (unfinished / ENGINE).exists()
    code, found = doctor(unfinished, "--build")
    assert (code, found["engine"][1]) == (0, "was built for this machine")


@pytest.mark.parametrize("name", [ENGINE, "model.onnx.data", "model.onnx"])
def test_a_damaged_file_is_named_and_not_loaded(name: str, finished: Path, doctor: Callable[..., Any]) -> None:
    data = bytearray((finished / name).read_bytes())
    data[len(data) // 2] ^= 1
    (finished / name).chmod(0o600)
    (finished / name).write_bytes(data)
    code, found = doctor(finished)
    assert code == 1
    assert found["files"][:2] == (False, f"OUT/{name}: was changed after the build")
    assert "loading" not in found


def test_a_plugin_of_another_build_is_named_and_not_loaded(finished: Path, doctor: Callable[..., Any]) -> None:
    """The manifest lists the library that is there, and the engine needs another."""
    manifest = Artifact.open(finished).manifest
    requirements = {**manifest.requirements, "plugin": "0" * 64}
    (finished / MANIFEST).write_text(replace(manifest, requirements=requirements).to_json())
    code, found = doctor(finished)
    assert code == 1
    assert found["plugin library"][0] is False
    assert "loading" not in found


@pytest.mark.parametrize(
    ("changed", "finding", "said"),
    [
        ({"architecture": 120}, "GPU", "sm_120; the artifact is for sm_89"),
        ({"driver": (11, 8)}, "driver", "supports CUDA 11.8; 12.0 or later is needed"),
        ({"version": "10.16.0"}, "TensorRT", "10.16.0; the engine was built with 10.15.1"),
    ],
)
def test_what_does_not_fit_is_named(
    changed: dict[str, Any],
    finding: str,
    said: str,
    *,
    finished: Path,
    doctor: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = changed.get("version", HOST.versions["tensorrt"])
    architecture = changed.get("architecture", HOST.architecture)
    sdk.module("tensorrt", "").__version__ = version
    monkeypatch.setattr(Host, "here", lambda _config: Host({"tensorrt": version}, architecture))
    monkeypatch.setattr(f"{REQUIREMENTS}.gpu_architecture", lambda: architecture)
    monkeypatch.setattr(f"{REQUIREMENTS}.driver_version", lambda: changed.get("driver", (13, 0)))
    code, found = doctor(finished)
    assert code == 1
    passed, detail, next_step = found[finding]
    assert (passed, detail) == (False, said)
    assert next_step
    assert "loading" not in found
    assert found["rows"] == []


class Driver:
    """A driver whose calls succeed up to ``fails``."""

    def __init__(self, fails: str) -> None:
        self._fails = fails

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if name == "cuDeviceGetName" and name != self._fails:
                args[0].value = b"NVIDIA L4"
            return int(name == self._fails)

        return call


@pytest.mark.parametrize(
    ("fails", "name"), [("", "NVIDIA L4"), *((call, "") for call in ("cuInit", "cuDeviceGet", "cuDeviceGetName"))]
)
def test_the_gpu_is_named_by_its_driver(fails: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: Driver(fails))
    assert requirements.gpu_name() == name


def test_the_page_names_the_gpu(finished: Path, doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (
        ("NVIDIA L4", "NVIDIA L4, sm_89; the artifact is for sm_89"),
        ("", "sm_89; the artifact is for sm_89"),
    ):
        monkeypatch.setattr(f"{REQUIREMENTS}.gpu_name", lambda name=name: name)
        _, found = doctor(finished)
        assert found["GPU"] == (True, said, "")


def test_a_machine_without_a_gpu(finished: Path, doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(f"{REQUIREMENTS}.DRIVER", "libnosuchdriver.so.1")
    code, found = doctor(finished)
    assert (code, found["GPU"][0]) == (1, False)


def test_a_folder_that_is_no_artifact_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
