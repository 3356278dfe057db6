"""An engine is built on the machine with the GPU, and read only where the machine meets its requirements."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_tensorrt import HOST

from h1export import cli
from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST, Manifest
from h1export.errors import H1ExportError
from h1export.progress import SILENT
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY
from h1export.targets.tensorrt.engine.finalize import build_engine_here
from h1export.targets.tensorrt.engine.requirements import EngineRequirements, Host, check
from h1export.validate.speed.gate_file import Gate
from h1export.validate.speed.regression import counted


@pytest.fixture
def unfinished(
    make_checkpoint: Callable[..., Path], build: Callable[..., Artifact], without_plugin: None, tmp_path: Path
) -> Path:
    """A copy of an artifact for TensorRT that has no engine yet."""
    artifact = build(
        make_checkpoint(), "int4", target="trt", max_context=96, runtime="tensorrt", architectures=(89, 90)
    )
    return Path(shutil.copytree(artifact.folder, tmp_path / "out"))


def test_the_engine_is_built_and_recorded_in_the_manifest(unfinished: Path, gpu_host: None) -> None:
    before = Artifact.open(unfinished)
    assert EngineRequirements.of(before).engine == ""
    requirements = build_engine_here(unfinished, SILENT)
    after = Artifact.open(unfinished)
    after.check_hashes()
    assert EngineRequirements.of(after) == requirements
    assert (requirements.version, requirements.architectures) == ("10.15.1", (89,))
    assert requirements.engine == after.manifest.files[ENGINE][0]
    assert requirements.kernels == {"decode sm_89": {"registers": 40, "spilled": 0, "shared": 1024}}
    assert counted(after, Gate("trt", "int4"), {}).spills == {"decode sm_89": 0}
    assert before.manifest.files.items() < after.manifest.files.items()
    (unfinished / ENGINE).chmod(0o400)
    assert build_engine_here(unfinished, SILENT) == requirements  # the second call keeps the engine
    assert [path.name for path in unfinished.iterdir() if path.name.startswith(".")] == []


def test_a_manifest_that_cannot_be_written_leaves_no_engine(
    unfinished: Path, gpu_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in unfinished.iterdir())
    replace_file = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == MANIFEST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(H1ExportError, match=r"manifest\.json: cannot be written"):
        build_engine_here(unfinished, SILENT)
    assert sorted(path.name for path in unfinished.iterdir()) == before
    Artifact.open(unfinished).check_hashes()


def test_a_machine_without_a_gpu(
    unfinished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("h1export.targets.tensorrt.engine.requirements.DRIVER", "libnosuchdriver.so.1")
    assert cli.run(["trt", "build-engine", str(unfinished), "--quiet"]) == 2
    assert "NVIDIA GPU: there is none here" in capsys.readouterr().err
    assert not (unfinished / ENGINE).exists()


def test_a_gpu_that_the_kernels_are_not_for(unfinished: Path, gpu_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "here", lambda _config: replace(HOST, architecture=120))
    with pytest.raises(
        H1ExportError, match=r"compiled for sm_89, sm_90, and this GPU is sm_120; build it with --sm 120"
    ):
        build_engine_here(unfinished, SILENT)
    assert not (unfinished / ENGINE).exists()


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (replace(HOST, architecture=86), "the engine is for sm_89, and this GPU is sm_86; build it with --sm 86"),
        (replace(HOST, versions={"tensorrt": "10.15.2"}), "built with TensorRT 10.15.1, and here is 10.15.2"),
        (replace(HOST, versions={"rtx": "1.7.1"}), "built with TensorRT 10.15.1, and here is none"),
    ],
)
def test_another_machine_is_named(host: Host, said: str, unfinished: Path, gpu_host: None) -> None:
    requirements = build_engine_here(unfinished, SILENT)
    check(unfinished, requirements, HOST)
    with pytest.raises(H1ExportError, match=said):
        check(unfinished, requirements, host)


@pytest.mark.parametrize("name", [ENGINE, LIBRARY])
def test_a_changed_file_is_named(name: str, unfinished: Path, gpu_host: None) -> None:
    requirements = build_engine_here(unfinished, SILENT)
    (unfinished / name).write_bytes(b"another")
    with pytest.raises(H1ExportError, match=rf"{name}: is not the file that the requirements in the manifest name"):
        check(unfinished, requirements, HOST)


def test_no_engine_yet(unfinished: Path) -> None:
    with pytest.raises(H1ExportError, match="has no engine yet; run h1export trt build-engine"):
        check(unfinished, EngineRequirements.of(Artifact.open(unfinished)), HOST)


def test_a_manifest_without_requirements_is_read_and_names_no_engine(unfinished: Path) -> None:
    manifest = Artifact.open(unfinished).manifest
    text = replace(manifest, requirements={}).to_json()
    assert "requirements" not in text
    assert Manifest.parse(text, unfinished) == replace(manifest, requirements={})
    with pytest.raises(H1ExportError, match="has no requirements of an engine"):
        EngineRequirements.of(Artifact(unfinished, replace(manifest, requirements={})))
