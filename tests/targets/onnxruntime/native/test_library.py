"""The compile on demand: once a machine, safe among processes, and errors that say what to do.

Compilers here are small scripts.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from h1export.errors import H1ExportError
from h1export.targets.onnxruntime import kernel_build, native_library

# writes its arguments to what follows -o, and to the log, a line a run; "-dM" asks what the compiler defines
FAKE = """#!{python}
import os, pathlib, sys
if "-dM" in sys.argv:
    print("#define __VERSION__", {version!r})
else:
    log = os.open({log!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(log, (" ".join(sys.argv) + "\\n").encode())
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text(" ".join(sys.argv))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "1") -> Path:
    """Make $CXX such a script; return the log of its runs."""
    script = folder / "fake-c++"
    log = folder / "log"
    script.write_text(FAKE.format(python=sys.executable, log=str(log), version=version))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} --an-argument")
    return log


def test_it_compiles_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_compiler(tmp_path, monkeypatch)
    first = native_library.compiled()
    assert first == native_library.compiled()
    assert first.is_relative_to(cache)
    *compilations, link = log.read_text().splitlines()
    assert sorted(Path(line.partition(" -c ")[2].split()[0]) for line in compilations) == list(native_library.SOURCES)
    assert all(f"{source.stem}.o" in link for source in native_library.SOURCES)
    assert all("--an-argument" in line for line in (*compilations, link))
    assert {file.name for file in first.parent.iterdir()} == {native_library.NAME, f"{native_library.NAME}.sha256"}


def test_another_compiler_cpu_or_flag_has_its_own_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch)
    paths = {native_library.compiled(), native_library.compiled(("-DH1_PORTABLE",))}
    fake_compiler(tmp_path, monkeypatch, version="1, on a CPU with more")
    paths.add(native_library.compiled())
    assert len(paths) == 3


@pytest.mark.usefixtures("cache")
def test_other_sources_have_their_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch)
    first = native_library.compiled()
    header = tmp_path / native_library.HEADERS[0].name
    header.write_text(native_library.HEADERS[0].read_text() + "\n")
    monkeypatch.setattr(native_library, "HEADERS", (header, *native_library.HEADERS[1:]))
    assert native_library.compiled() != first


@pytest.mark.usefixtures("cache")
def test_processes_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch)
    program = "from h1export.targets.onnxruntime.native_library import compiled; print(compiled())"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert paths == {str(native_library.compiled())}


@pytest.mark.usefixtures("cache")
def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\nfor i in 1 2 3 4 5 6 7; do echo error $i >&2; done\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(H1ExportError, match=r"exit code 3: error 1\); install a C\+\+20 compiler"):
        native_library.compiled()


@pytest.mark.usefixtures("cache")
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(H1ExportError, match=r"no-such-compiler: cannot run .*No such file"):
        native_library.compiled()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(H1ExportError, match="no C\\+\\+ compiler found"):
        native_library.compiled()


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch)
    cache.write_text("a file where a folder should be")
    with pytest.raises(H1ExportError, match=f"{os.path.basename(cache)}.*cannot be written.*set XDG_CACHE_HOME"):
        native_library.compiled()


def test_the_sources_have_no_warnings_for_this_cpu() -> None:
    """The other levels' are errors where the tests compile them (conftest.py)."""
    flags = (*kernel_build.for_this_machine(platform.machine()), "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    for source in kernel_build.SOURCES:
        subprocess.run([*kernel_build.command(native_library._compiler(), flags), str(source)], check=True)
