"""A module imports only downwards: the rules of import-linter, which sees the wheel alone, for an editable install."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

from h1export.targets import target_infos

# module of a runtime -> the folder in targets/ that may import it
RUNTIMES = {
    **{module: info.folder for info in target_infos().values() for module in info.sdk_modules},
    **{module: "onnx" for info in target_infos().values() for module in info.shared_sdk_modules},
}
TRITON = re.compile(
    r"h1export\.plugins\.\w+\.kernels"
)  # modules that are written in Triton, and so need it to be imported
HEAVY = ("numpy", "torch", "onnx", "onnx_ir", "transformers", "triton", *RUNTIMES)
SHARED_BY_TARGETS = tuple(
    f"h1export.targets.{name}" for name in ("base", "hf_folder", "info", "loading", "onnx", "options", "sizes")
)
HOSTED = ("h1export.integrations", "h1export.serve")  # their modules import what only extras install

Floors = list[tuple[set[str], bool]]  # from the top: (packages, whether they may import each other)


@pytest.fixture(scope="module")
def floors(project: Mapping[str, Any]) -> Floors:
    """The layers of pyproject.toml's import contract."""
    (layers,) = [
        contract["layers"] for contract in project["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"
    ]
    return [({f"h1export.{name}" for name in re.findall(r"\w+", layer)}, ":" in layer) for layer in layers]


def imports(tree: ast.Module, known: Mapping[str, Any]) -> Iterator[str]:
    """Modules that a module imports, anywhere in it, by statement or by ``import_module`` with a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name if name in known else node.module for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def inside(module: str, package: str) -> bool:
    """Whether ``module`` is ``package`` or a part of it."""
    return f"{module}.".startswith(f"{package}.")


def floor_of(module: str, floors: Floors) -> tuple[int, str] | None:
    """(height from the top, package) of the floor that ``module`` is on; None: on none."""
    return next(((i, name) for i, (names, _) in enumerate(floors) for name in names if inside(module, name)), None)


def upward(trees: Mapping[str, ast.Module], floors: Floors) -> list[str]:
    """Imports of a floor above, or of an independent neighbour on the same floor."""
    found = []
    for module, tree in trees.items():
        if not inside(module, "h1export"):  # in the namespace of a host, above all floors
            continue
        own = floor_of(module, floors)
        for name in imports(tree, trees):
            other = floor_of(name, floors)
            if other is None:
                continue
            if (
                own is None
                or other[0] < own[0]
                or (other[0] == own[0] and other[1] != own[1] and not floors[own[0]][1])
            ):
                found.append(f"{module} -> {name}")
    return found


def between_targets(trees: Mapping[str, ast.Module]) -> list[str]:
    """Imports of one target by another."""
    found = []
    for module, tree in trees.items():
        own = module.split(".")[:3]
        for name in imports(tree, trees):
            if (
                inside(module, "h1export.targets")
                and len(own) == 3
                and inside(name, "h1export.targets")
                and name != "h1export.targets"
            ):
                shared = any(inside(name, package) for package in SHARED_BY_TARGETS)
                if not shared and name.split(".")[:3] != own:
                    found.append(f"{module} -> {name}")
    return found


def of_runtimes(trees: Mapping[str, ast.Module]) -> list[str]:
    """Imports of a runtime outside its target."""
    found = []
    for module, tree in trees.items():
        for name in imports(tree, trees):
            runtime = name.split(".")[0]
            if runtime in RUNTIMES and not inside(module, f"h1export.targets.{RUNTIMES[runtime]}"):
                found.append(f"{module} -> {name}")
    return found


def of_triton(trees: Mapping[str, ast.Module]) -> list[str]:
    """Imports of Triton, or of modules written in it, outside such modules and sdk.py, which imports them by name."""
    others = [name for name in trees if not TRITON.fullmatch(name) and name != "h1export.plugins.gpu.sdk"]
    taken = [(module, name) for module in others for name in imports(trees[module], trees)]
    return [f"{module} -> {name}" for module, name in taken if name.split(".")[0] == "triton" or TRITON.fullmatch(name)]


def loaded_by(code: str, names: Iterable[str]) -> set[str]:
    """Which of ``names`` a fresh interpreter has loaded after ``code``."""
    script = f"import sys\n{code}\nprint(*(set({[*names]!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(run.stdout.splitlines()[-1].split())


def test_every_module_is_on_a_floor(trees: Mapping[str, ast.Module], floors: Floors) -> None:
    assert [module for module in trees if inside(module, "h1export") and floor_of(module, floors) is None] == [
        "h1export"
    ]


def test_modules_import_only_downwards(trees: Mapping[str, ast.Module], floors: Floors) -> None:
    found = upward(trees, floors)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("h1export.model.falcon_h1.config", "import h1export.graphs.trace"),
        ("h1export.model.falcon_h1.config", "def f():\n    from h1export import graphs"),
        ("h1export.plugins.scan", "from h1export.targets import base"),
        ("h1export.graphs.model", "from importlib import import_module\nimport_module('h1export.cli')"),
        ("h1export.validate.accuracy.run", "from h1export.commands.load import load_runner"),
        ("h1export.targets.base", "import h1export.validate"),
        ("h1export.errors", "import h1export.model"),
        ("h1export", "from h1export.errors import H1ExportError"),
    ],
)
def test_an_upward_import_is_seen(module: str, line: str, floors: Floors) -> None:
    planted = {module: ast.parse(line), "h1export.graphs": ast.parse("")}
    assert len(upward(planted, floors)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("h1export.cli", "from h1export.commands.build import BuildJob"),
        ("h1export.commands.build", "from h1export.checkpoint.resolve import resolve"),
        ("h1export.model.falcon_h1.config", "from h1export import __version__"),
        ("h1export.targets.onnx.emit", "import h1export.targets.base, numpy"),
    ],
)
def test_a_downward_import_is_allowed(module: str, line: str, floors: Floors) -> None:
    assert upward({module: ast.parse(line)}, floors) == []


def test_targets_do_not_import_each_other(trees: Mapping[str, ast.Module]) -> None:
    assert between_targets(trees) == []


def test_an_import_between_targets_is_seen() -> None:
    planted = {
        "h1export.targets.coreml.target": ast.parse("from h1export.targets.onnxruntime.emit.packing import NBitsLayout")
    }
    assert len(between_targets(planted)) == 1


def test_runtimes_are_imported_by_their_own_targets_only(trees: Mapping[str, ast.Module]) -> None:
    assert of_runtimes(trees) == []


@pytest.mark.parametrize(
    "line", ["import onnxruntime", "from onnxruntime.capi import x", "import_module('tensorrt_rtx')"]
)
def test_a_runtime_outside_its_target_is_seen(line: str) -> None:
    assert of_runtimes({"h1export.artifact.weight_file": ast.parse(line)})
    own = {
        "h1export.targets.onnx.sdk": ast.parse("import onnxruntime"),
        "h1export.targets.onnxruntime.x": ast.parse("import onnxruntime_genai"),
        "h1export.targets.coreml.run": ast.parse("import coremltools"),
    }
    assert of_runtimes(own) == []


def test_importing_the_package_is_light() -> None:
    assert loaded_by("import h1export, h1export.errors", HEAVY) == set()


def test_the_help_is_light() -> None:
    assert loaded_by("from h1export.cli import run; run(['build', '--help'])", HEAVY) == set()


def test_what_runs_an_artifact_needs_neither_torch_nor_onnx(modules: Mapping[str, Any]) -> None:
    ours = [name for name in modules if inside(name, "h1export.runtime")]
    assert "h1export.runtime.runner" in ours
    assert loaded_by(f"import {', '.join(ours)}", ("torch", "onnx", "onnx_ir", "transformers")) == set()


def test_loading_artifacts_of_onnx_runtime_needs_no_builder() -> None:
    code = "from h1export.cli import chat, generate; from h1export.targets import load_function; load_function('ort')"
    assert loaded_by(code, ("torch", "onnx", "onnx_ir", "sympy", "transformers", "cyclonedx")) == set()


def test_importing_every_module_loads_no_runtime(modules: Mapping[str, Any]) -> None:
    ours = [
        name
        for name in modules
        if inside(name, "h1export") and not any(inside(name, one) for one in HOSTED) and not TRITON.fullmatch(name)
    ]
    ours.remove("h1export.hf")  # transformers' own models load Triton where it is installed
    assert loaded_by(f"import {', '.join(ours)}", (*RUNTIMES, "triton")) == set()
    assert loaded_by("import h1export.hf", tuple(RUNTIMES)) == set()


def test_pyproject_agrees_with_the_targets(project: Mapping[str, Any]) -> None:
    (forbidden,) = [one for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "forbidden"]
    assert set(forbidden["forbidden_modules"]) == {*RUNTIMES, "triton"}
    extras = project["project"]["optional-dependencies"]
    for info in target_infos().values():
        assert {info.extra, *info.test_extras} <= extras.keys()


def test_triton_is_imported_by_its_door_only(trees: Mapping[str, ast.Module]) -> None:
    assert of_triton(trees) == []
    assert any(TRITON.fullmatch(name) for name in trees)


@pytest.mark.parametrize(
    "line", ["import triton.language", "from h1export.plugins.scan import kernels", "import_module('triton')"]
)
def test_an_import_of_triton_is_seen(line: str) -> None:
    planted = {
        "h1export.plugins.scan.kernels": ast.parse("import triton"),
        "h1export.plugins.gpu.sdk": ast.parse("import_module('triton')"),
    }
    assert of_triton(planted) == []
    assert len(of_triton(planted | {"h1export.targets.tensorrt.target": ast.parse(line)})) == 1


def test_a_heavy_import_is_seen() -> None:
    assert loaded_by("import numpy", HEAVY) == {"numpy"}
