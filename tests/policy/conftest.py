"""What the rules read: pyproject.toml, and the parsed sources of the product."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def project() -> Mapping[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def own_files() -> tuple[Path, ...]:
    """Every file that git tracks or would track; deleted ones left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return tuple(ROOT / name for name in sorted(set(listed.stdout.split("\0")) - {""}) if (ROOT / name).is_file())


@pytest.fixture(scope="session")
def package_dir(project: Mapping[str, Any]) -> Mapping[str, str]:
    """Package -> folder, as setuptools maps them."""
    return dict(project["tool"]["setuptools"]["package-dir"])


@pytest.fixture(scope="session")
def modules(package_dir: Mapping[str, str]) -> Mapping[str, Path]:
    """Module name -> file, of every module of the product."""
    found = {}
    for package, folder in package_dir.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


@pytest.fixture(scope="session")
def trees(modules: Mapping[str, Path]) -> Mapping[str, ast.Module]:
    """Module name -> syntax tree, of every module of the product."""
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in modules.items()}
