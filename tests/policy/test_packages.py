"""pyproject.toml lists every package and data file of the product, because setuptools installs only what is listed."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

TOOLING = {"compile_flags.txt"}  # read by clang-tidy from the checkout


def folders_with_code(root: Path, package_dir: Mapping[str, str]) -> set[str]:
    """The packages that the mapped folders hold."""
    return {
        ".".join((package, *file.parent.relative_to(root / folder).parts))
        for package, folder in package_dir.items()
        for file in (root / folder).rglob("*.py")
    }


def unpackaged_data(
    root: Path, package_dir: Mapping[str, str], package_data: Mapping[str, list[str]]
) -> tuple[set[str], set[str]]:
    """(globs without a file, files other than .py that no glob covers)."""
    empty = set()
    covered = set()
    for package, globs in package_data.items():
        mapped = max((known for known in package_dir if f"{package}.".startswith(f"{known}.")), key=len)
        folder = root.joinpath(package_dir[mapped], *package.removeprefix(mapped).split(".")[1:])
        for glob in globs:
            found = {file for file in folder.glob(glob) if file.is_file()}
            covered |= found
            if not found:
                empty.add(f"{package}: {glob}")
    files = {file for folder in package_dir.values() for file in (root / folder).rglob("*") if file.is_file()}
    return empty, {
        str(file.relative_to(root))
        for file in files - covered
        if file.suffix not in (".py", ".pyc") and file.name not in TOOLING
    }


def bare_imports(tree: ast.Module, roots: set[str]) -> set[str]:
    """Imports of the mapped folders by their own names, and relative ones, which could hide such a name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in roots}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            if node.level or name.split(".")[0] in roots:
                found.add(name)
    return found


def mapped_roots(package_dir: Mapping[str, str]) -> set[str]:
    """Folders whose name is not that of the package they hold."""
    return {folder for package, folder in package_dir.items() if package != folder}


def test_every_package_is_listed_and_exists(
    root: Path, project: Mapping[str, Any], package_dir: Mapping[str, str]
) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    assert listed == sorted(set(listed))
    assert set(listed) == folders_with_code(root, package_dir)


def test_a_new_folder_is_seen(tmp_path: Path) -> None:
    (tmp_path / "targets" / "new").mkdir(parents=True)
    (tmp_path / "targets" / "new" / "target.py").touch()
    assert folders_with_code(tmp_path, {"h1export.targets": "targets"}) == {"h1export.targets.new"}


def test_package_data_is_complete(root: Path, project: Mapping[str, Any], package_dir: Mapping[str, str]) -> None:
    assert unpackaged_data(root, package_dir, project["tool"]["setuptools"]["package-data"]) == (set(), set())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"h1export.plugins.scan": ["*.cpp", "*.cu"]}, ({"h1export.plugins.scan: *.cu"}, set())),
        ({}, (set(), {"plugins/scan/scan.cpp"})),
        ({"h1export.plugins": ["scan/*.cpp"]}, (set(), set())),
    ],
)
def test_wrong_package_data_is_seen(
    tmp_path: Path, data: dict[str, list[str]], expected: tuple[set[str], set[str]]
) -> None:
    (tmp_path / "plugins" / "scan").mkdir(parents=True)
    (tmp_path / "plugins" / "scan" / "scan.cpp").touch()
    (tmp_path / "plugins" / "scan" / "op.py").touch()
    assert unpackaged_data(tmp_path, {"h1export": "h1export", "h1export.plugins": "plugins"}, data) == expected


def test_nothing_imports_a_mapped_folder_by_its_own_name(
    root: Path, own_files: tuple[Path, ...], package_dir: Mapping[str, str]
) -> None:
    python = [file for file in own_files if file.suffix == ".py"]
    found = {
        str(file.relative_to(root)): bare_imports(
            ast.parse(file.read_text(encoding="utf-8")), mapped_roots(package_dir)
        )
        for file in python
    }
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import graphs",
        "import graphs.trace as t",
        "from graphs.trace import trace",
        "from . import x",
        "from ..y import x",
    ],
)
def test_a_bare_import_is_seen(line: str) -> None:
    assert bare_imports(ast.parse(f"def f():\n    {line}"), {"graphs"})


def test_an_absolute_import_is_not_a_bare_one() -> None:
    assert not bare_imports(
        ast.parse("import h1export.graphs\nfrom h1export.graphs import trace\nimport graphs_of_others"), {"graphs"}
    )


def test_pre_commit_and_nox_use_one_ruff(root: Path, project: Mapping[str, Any]) -> None:
    (pinned,) = [item for item in project["project"]["optional-dependencies"]["dev"] if item.startswith("ruff")]
    hooks = re.findall(r'"(ruff[^"]*)"', (root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert set(hooks) == {pinned}
    assert "==" in pinned
