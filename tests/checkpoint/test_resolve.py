"""A MODEL is the embedded model, a folder, or a Hub id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from h1export.checkpoint.resolve import embedded_model, model_name, resolve
from h1export.cli.build_request import BuildRequest
from h1export.errors import H1ExportError
from h1export.quantize.calibration import Calibration
from h1export.quantize.scheme import QuantScheme

INSPECT = "import sys; from h1export.cli import run; sys.exit(run(['inspect', 'some-org/some-model', '--json']))"


def hub_cache(home: Path, checkpoint: Path) -> None:
    """A Hub cache that holds ``checkpoint`` as some-org/some-model, with the links of the Hub client."""
    repo = home / "hub" / "models--some-org--some-model"
    snapshot = repo / "snapshots" / ("0" * 40)
    blobs = repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for file in checkpoint.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)


def inspect(home: Path) -> subprocess.CompletedProcess[str]:
    """Run `h1export inspect some-org/some-model` without a network."""
    cache = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}  # libraries that tests import may set either
    environment = {**os.environ, **cache, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", INSPECT], capture_output=True, text=True, env=environment, check=False)


def test_a_hub_id_in_the_local_cache_needs_no_network(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    hub_cache(tmp_path, make_checkpoint())
    done = inspect(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "checkpoint"


def test_a_hub_id_elsewhere_says_that_it_is_offline(tmp_path: Path) -> None:
    done = inspect(tmp_path)
    assert done.returncode == 2
    assert "not in the local Hub cache, and the Hub cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_model_is_the_embedded_one(tmp_path: Path) -> None:
    assert resolve(None) == embedded_model()
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "model", ["/etc/hostname", "./nothing", "~/nothing", "a/b/c", "nothing", "../x", "-x/..", "org/name with space"]
)
def test_what_is_no_model_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(H1ExportError):
        resolve(model)


NAMES = {  # folder -> the name of the model in it
    "falcon": "falcon",
    "a/b [x]": "b [x]",
    f"hub/models--tiiuae--Falcon-H1-0.5B-Base/snapshots/{'0a' * 20}": "Falcon-H1-0.5B-Base",
    f"hub/models--gpt2/snapshots/{'b' * 40}": "gpt2",
    "hub/models--a--b-c.d/snapshots/main": "b-c.d",
    f"copied/Falcon/snapshots/{'c' * 40}": "Falcon",
    "hub/models--a--b": "b",
    "snapshots/falcon": "falcon",
    f"x/{'d' * 40}": "d" * 40,
}


@pytest.mark.parametrize("folder", NAMES)
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/.", "{}/x/..", "{}/../../{}", "link", "link/", "./link/."])
def test_a_folder_is_named_after_its_model(
    folder: str, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / folder
    (place / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    depth = "/.." * len(Path(folder).parts)
    spelled = f"{folder}{depth}/{folder}" if "../../" in spelling else spelling.format(folder)
    assert model_name(Path(spelled)) == NAMES[folder]
    monkeypatch.chdir(place)
    assert model_name(Path()) == model_name(Path("x/..")) == NAMES[folder]
    monkeypatch.chdir(place / "x")
    assert model_name(Path("..")) == NAMES[folder]


def test_the_root_folder_has_a_name_too() -> None:
    assert model_name(Path("/")) == "model"


def test_a_build_of_a_cached_model_is_named_after_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    options: Any = {"ort": None, "trt": None}
    request = BuildRequest(snapshot, options, QuantScheme(), calibration=Calibration(), out=None, jobs=1, precision="x")
    assert list(request.places()) == [("ort", Path("some-model-ort-x")), ("trt", Path("some-model-trt-x"))]
