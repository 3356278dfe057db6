"""The libraries of a wheel: the best one that the CPU has is loaded without a compiler, and one of other sources never.

`nox -s wheels` builds real wheels. test_graph.py runs an artifact with one.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.targets.onnxruntime import kernel_build, native_library
from h1export.targets.onnxruntime.kernel_build import LEVELS, Level

pytestmark = pytest.mark.ort

ROOT = Path(__file__).parents[3]
LEAST = {machine: levels[-1].name for machine, levels in LEVELS.items()}
EVERY = [(machine, level) for machine, levels in LEVELS.items() for level in levels]
LINES = {"x86_64": "flags\t\t: fpu {} sse2\n", "aarch64": "Features\t: fp {} asimd\n"}
CPUS = {  # words of /proc/cpuinfo -> the level
    "sapphire rapids": ("x86_64", kernel_build.V4 | {"avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"}, "amx"),
    "the same under a system without tiles": ("x86_64", kernel_build.V4 | {"avx512_vnni"}, "avx512-vnni"),
    "zen4": ("x86_64", kernel_build.V4 | {"avx512_vnni", "avx512_bf16"}, "avx512-vnni"),
    "skylake-x, without VNNI": ("x86_64", kernel_build.V4, "avx2"),
    "alder lake": ("x86_64", kernel_build.V3 | {"avx_vnni"}, "avx-vnni"),
    "haswell": ("x86_64", kernel_build.V3, "avx2"),
    "ivy bridge": ("x86_64", frozenset({"avx", "f16c", "popcnt", "sse4_2"}), "sse2"),
    "graviton3": ("aarch64", kernel_build.ARMV8_2 | {"i8mm", "sve"}, "i8mm"),
    "cortex-a76": ("aarch64", kernel_build.ARMV8_2, "dotprod"),
    "cortex-a72": ("aarch64", frozenset({"crc32"}), "neon"),
    "power": ("ppc64le", frozenset(), None),
}


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for a wheel's libraries."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(kernel_build, "PACKAGED", folder)
    return folder


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, frozenset[str]], None]:
    """on_cpu(machine, features): this machine says that it is another."""

    def pretend(machine: str, features: frozenset[str]) -> None:
        cpuinfo = tmp_path / "cpuinfo"
        line = LINES.get(machine, "cpu : {}\n").format(" ".join(sorted(features)))
        cpuinfo.write_text(f"processor : 0\nbugs : avx2 avx512_vnni i8mm\n{line}\nprocessor : 1\n{line}")
        monkeypatch.setattr(native_library, "CPUINFO", cpuinfo)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(sys, "platform", "linux")

    return pretend


def put_all(folder: Path) -> None:
    for _, level in EVERY:
        (folder / kernel_build.file_name(level)).touch()


@pytest.mark.parametrize("cpu", list(CPUS))
def test_the_best_level_that_the_cpu_has(
    cpu: str, packaged: Path, on_cpu: Callable[[str, frozenset[str]], None]
) -> None:
    machine, features, name = CPUS[cpu]
    on_cpu(machine, features)
    put_all(packaged)
    found = native_library.packaged()
    assert (found and found.name.removeprefix("libh1export_ort-").rpartition("-")[0]) == name


@pytest.mark.parametrize(("machine", "level"), EVERY, ids=lambda one: one.name if isinstance(one, Level) else one)
def test_a_level_needs_every_one_of_its_features(
    machine: str, level: Level, packaged: Path, on_cpu: Callable[[str, frozenset[str]], None]
) -> None:
    put_all(packaged)
    wanted = packaged / kernel_build.file_name(level)
    on_cpu(machine, level.features)
    assert native_library.packaged() == wanted
    for feature in level.features:
        on_cpu(machine, level.features - {feature})
        assert native_library.packaged() != wanted
    wanted.unlink()
    on_cpu(machine, level.features)
    lower = native_library.packaged()
    assert lower is None if level.name == LEAST[machine] else lower is not None


def test_one_of_other_sources_or_flags_is_never_taken(
    packaged: Path, on_cpu: Callable[[str, frozenset[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu("x86_64", frozenset())
    put_all(packaged)
    assert native_library.packaged() is not None
    monkeypatch.setattr(kernel_build, "WHEEL_FLAGS", ("-O0",))
    assert native_library.packaged() is None
    monkeypatch.undo()
    old = kernel_build.sources_digest()
    assert old == kernel_build.sources_digest(tuple(kernel_build.SOURCES))
    assert old != kernel_build.sources_digest(kernel_build.SOURCES[1:])


def test_file_names_do_not_depend_on_where_the_sources_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    level = LEVELS["x86_64"][0]
    name = kernel_build.file_name(level)
    here, there = str(kernel_build.FOLDER), "/somewhere/else"
    for flags in ("FLAGS", "WHEEL_FLAGS"):
        moved = tuple(word.replace(here, there) for word in getattr(kernel_build, flags))
        assert any(there in word for word in moved)
        monkeypatch.setattr(kernel_build, flags, moved)
    monkeypatch.setattr(kernel_build, "FOLDER", Path(there))
    assert kernel_build.file_name(level) == name


def test_a_cpu_of_which_nothing_is_known_gets_what_every_cpu_has(
    packaged: Path, on_cpu: Callable[[str, frozenset[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu("x86_64", kernel_build.V4)
    put_all(packaged)
    monkeypatch.setattr(native_library, "CPUINFO", packaged / "no such file")
    found = native_library.packaged()
    assert found is not None
    assert "-sse2-" in found.name


def test_the_page_has_the_levels() -> None:
    text = (ROOT / "docs" / "wheels.md").read_text("utf-8")
    (table,) = re.findall(r"<!-- levels -->\n(.*?)<!-- end -->", text, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")][:3] for line in table.splitlines()[2:]]
    assert rows == [[machine, level.name, f"`{' '.join(level.flags)}`"] for machine, level in EVERY]


def test_setup_py_needs_nothing_installed() -> None:
    """It loads the file by its path, in an environment that has setuptools alone."""
    file = str(ROOT / "targets" / "onnxruntime" / "kernel_build.py")
    code = f"import runpy; print(len(runpy.run_path({file!r}, run_name='kernel_build')['LEVELS']))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(LEVELS)}\n"
