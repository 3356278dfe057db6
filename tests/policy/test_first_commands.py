"""README.md's two commands pass in one clone, in order: what the first leaves behind disturbs neither lint nor git."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LEFT_BEHIND = (
    "build/lib/h1export/__init__.py",
    "h1export.egg-info/PKG-INFO",
    ".venv/pyvenv.cfg",
    ".venv-dev/pyvenv.cfg",
    ".nox/lint/pyvenv.cfg",
    "tiny-ort-int4/manifest.json",
    ".tiny-ort-int4.partial-0123456789abcdef/model.onnx",
    "tiny-coreml-int4/manifest.json",
    "tiny-trt-none/manifest.json",
    "Falcon-H1-0.5B-Instruct-ort-int8/manifest.json",
    "report.html",
    "plan.yaml",
)


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ruff's import rules as the session `lint` does, in ``folder``.

    The folder may be below the .nox of a checkout, which git ignores and ruff would pass over.
    """
    everywhere = ("--no-respect-gitignore", "--config", 'exclude = ["no such folder"]')
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", *everywhere, "."]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "No Python files" not in found.stdout + found.stderr
    return found


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """Configuration and scripts of the checkout, and beside them the build/ that `pip install .` makes."""
    for name in ("pyproject.toml", "noxfile.py"):
        shutil.copy(root / name, tmp_path)
    for name in ("benchmarks", "tests"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    (tmp_path / "build/lib/h1export").mkdir(parents=True)
    (tmp_path / "build/lib/h1export/__init__.py").touch()
    return tmp_path


def test_lint_passes_after_an_installation(checkout: Path) -> None:
    found = lint(checkout)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_folder_of_pip_would_be_seen_as_ours_without_the_setting(checkout: Path) -> None:
    project = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    (checkout / "pyproject.toml").write_text(project.replace("\nsrc = []", "\nsrc = ['.']"), encoding="utf-8")
    found = lint(checkout)
    assert found.returncode == 1
    assert "Import block is un-sorted" in found.stdout


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_git_ignores_what_the_commands_leave_behind(root: Path, name: str) -> None:
    ignored = subprocess.run(["git", "check-ignore", "--no-index", "-q", name], cwd=root, check=False)
    assert ignored.returncode == 0
