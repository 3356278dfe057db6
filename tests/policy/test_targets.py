"""A target is one folder: whatever else must know of it finds it by its target.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from h1export.targets import target_infos
from h1export.targets.info import FILE, discover

TOML = """
name = "fake"
title = "A runtime of these tests"
extra = "fake"
sdk_modules = ["fake_runtime"]
shared_sdk_modules = []
needs = "nothing"
test_extras = ["fake", "ort"]
test_folders = ["tests/benchmarks"]
"""
OPTIONS = """
from dataclasses import dataclass
from typing import Annotated

from h1export.targets.options import MAX_CONTEXT, Flag, TargetOptions


@dataclass(frozen=True, kw_only=True)
class FakeOptions(TargetOptions):
    max_context: Annotated[int, MAX_CONTEXT] = 512
    colour: Annotated[str, Flag("Colour of the fake.")] = "red"


Options = FakeOptions
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with the folder of one more target."""
    folder = tmp_path / "targets" / "faketarget"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / FILE).write_text(TOML)
    (folder / "options.py").write_text(OPTIONS)
    (folder / "target.py").write_text("target = 'the fake target'\n")
    return folder.parent


def in_python(planted: Path, code: str, root: Path) -> str:
    """What ``code`` prints in an interpreter whose h1export.targets has the planted target too."""
    plant = f"import h1export.targets; h1export.targets.__path__.append({str(planted)!r})"
    run = subprocess.run(
        [sys.executable, "-c", f"{plant}\n{code}"], cwd=root, check=True, capture_output=True, text=True
    )
    return run.stdout


def test_registry_and_command_line_find_a_new_target(planted: Path, root: Path) -> None:
    code = """
from h1export.targets import get_target, options_class, target_infos
print(*target_infos(), get_target("fake"), options_class("fake")().colour, sep="|")
from h1export.cli import run
run(["build", "--help"])
run(["build", "--target", "ort", "--colour", "blue"])
"""
    first, *shown = in_python(planted, code, root).splitlines()
    names = "|".join(sorted([*target_infos(), "fake"]))
    assert first == f"{names}|the fake target|red"
    text = " ".join(" ".join(shown).split())
    assert f"--target [{names}]" in text
    assert "fake options: --colour TEXT Colour of the fake. [default: red]" in text
    assert "coreml and fake and trt options: --max-context" in text
    assert "[default: coreml: 2048, fake: 512, trt: 2048]" in text


def test_pytest_has_its_marker_on_its_tests(planted: Path, root: Path) -> None:
    """The fake claims tests/benchmarks; the marker selects those tests alone."""
    options = ["-q", "-p", "no:cacheprovider", "tests/benchmarks", "tests/policy/test_links.py"]
    code = f"""
import pytest
pytest.main(["--markers", "-p", "no:cacheprovider"])
pytest.main(["--collect-only", "-m", "fake", *{options!r}])
"""
    text = in_python(planted, code, root)
    assert "@pytest.mark.fake: needs nothing" in text
    selected = [line for line in text.splitlines() if "::" in line]
    assert selected
    assert all(line.startswith("tests/benchmarks/") for line in selected)


class FakeNox(ModuleType):
    """As much of nox as noxfile.py needs to be loaded."""

    class Session: ...

    class project:  # noqa: N801  nox.project is a module
        @staticmethod
        def load_toml(_: Path) -> dict[str, Any]:
            return {"project": {"optional-dependencies": {"dev": []}}}

    class options: ...  # noqa: N801

    @staticmethod
    def session(*functions: Any, **_: Any) -> Any:
        return functions[0] if functions else lambda function: function

    @staticmethod
    def parametrize(*_: Any) -> Any:
        return lambda function: function


def test_nox_has_its_row(planted: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """noxfile.py reads targets/ beside it, and imports nothing of h1export."""
    shutil.copy(root / "noxfile.py", planted.parent)
    shutil.copy(root / "targets" / "info.py", planted)
    for info in target_infos().values():
        (planted / info.folder).mkdir()
        shutil.copy(root / "targets" / info.folder / FILE, planted / info.folder)
    monkeypatch.setitem(sys.modules, "nox", FakeNox("nox"))
    namespace: dict[str, Any] = {"__file__": str(planted.parent / "noxfile.py"), "__name__": "noxfile"}
    exec(compile((planted.parent / "noxfile.py").read_text(), "noxfile.py", "exec"), namespace)
    (fake,) = namespace["TARGETS"]["fake"]
    assert (fake.name, fake.test_extras) == ("fake", ("fake", "ort"))
    assert sorted(info.name for row in namespace["TARGETS"].values() for info in row) == sorted(
        [*target_infos(), "fake"]
    )
    assert namespace["TARGETS"].keys() == {"core", "fake", *(info.row for info in target_infos().values())}
    assert "fake_runtime" in namespace["SDKS"]


def test_the_existing_targets(root: Path) -> None:
    infos = discover([root / "targets"])
    assert infos == target_infos()
    assert {name: info.folder for name, info in infos.items()} == {
        "coreml": "coreml",
        "gguf": "gguf",
        "gptq": "gptq",
        "mlx": "mlx",
        "ort": "onnxruntime",
        "trt": "tensorrt",
    }
    for info in infos.values():
        for folder in info.test_folders:
            assert (root / folder).is_dir(), f"{info.name}: {folder}"


def test_an_unknown_key_is_refused(planted: Path) -> None:
    file = planted / "faketarget" / FILE
    file.write_text(TOML + 'colour = "red"\n')
    with pytest.raises(TypeError, match="colour"):
        discover([planted])
