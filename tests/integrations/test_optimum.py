"""`optimum-cli export h1export` in optimum's own command line, and which of optimum's partners fit beside h1export."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from optimum.commands import optimum_cli
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from h1export.artifact.artifact import Artifact
from h1export.cli import build as build_command

ROOT = Path(__file__).parents[2]
PARTNERS = {
    "optimum-onnx 0.1.0": "<4.58.0,>=4.36",
    "optimum-intel 2.2.0": "<5.6,>=4.51",
}  # release -> transformers that it requires
BESIDE = {
    "optimum-onnx 0.1.0": None,
    "optimum-intel 2.2.0": "5.5",
}  # release -> newest minor of transformers that both take


def optimum(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    optimum_cli.main()


def test_an_export_is_a_build(
    tiny: Path, build: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    expected = build(tiny, "int8", accuracy_level=4, kv="auto")
    optimum(
        monkeypatch, "export", "h1export", "--target", "ort", "--quant", "int8", "--quiet", "-m", str(tiny), str(out)
    )
    assert Artifact.open(out).manifest == expected.manifest


def test_a_failing_export_has_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as failed:
        optimum(
            monkeypatch,
            "export",
            "h1export",
            "--target",
            "ort",
            "--quant",
            "int3",
            "-m",
            str(tmp_path),
            str(tmp_path / "out"),
        )
    assert failed.value.code == 2
    assert "'int3' is not one of 'none', 'int8', 'int4'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_has_every_option_of_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        optimum(monkeypatch, "export", "h1export", "--help")
    shown = capsys.readouterr().out
    options = {name for param in build_command.params for name in param.opts if name.startswith("--")} - {"--out"}
    assert len(options) > 15
    assert {name for name in options if name not in shown} == set()


def transformers_pin() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = map(Requirement, project["optional-dependencies"]["export"])
    (found,) = [one.specifier for one in required if one.name == "transformers"]
    return found


def test_the_installed_optimum_takes_the_installed_transformers() -> None:
    (required,) = [
        parsed for item in metadata.requires("optimum") or () if (parsed := Requirement(item)).name == "transformers"
    ]
    assert metadata.version("transformers") in required.specifier
    assert metadata.version("transformers") in transformers_pin()


@pytest.mark.parametrize("release", list(PARTNERS))
def test_which_partners_fit_and_the_docs_say_so(release: str) -> None:
    versions = [f"{major}.{minor}" for major in range(4, 7) for minor in range(100)]
    both = [
        version for version in versions if version in transformers_pin() and version in SpecifierSet(PARTNERS[release])
    ]
    assert (both[-1] if both else None) == BESIDE[release]
    (row,) = [
        line
        for line in (ROOT / "docs" / "clients.md").read_text(encoding="utf-8").splitlines()
        if f"| {release} |" in line
    ]
    assert f"`{PARTNERS[release]}`" in row
    assert ("no" if BESIDE[release] is None else f"up to {BESIDE[release]}") in row.split("|")[-2]
