"""The plugin library with stand-ins for machine code, a harness that calls it as TensorRT does, and a fake CUDA driver.

The driver prints every kernel launch with its arguments, and the harness prints the plugin's log.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_tensorrt import HOST
from roofline import PUBLISHED

from h1export.plugins.gpu.cubin import ARCHITECTURES, Cubin
from h1export.plugins.gpu.kernel import Kernel
from h1export.targets.tensorrt.engine.build import BuildLog
from h1export.targets.tensorrt.engine.config import ENGINE
from h1export.targets.tensorrt.engine.requirements import Host
from h1export.targets.tensorrt.plugin import kernels, library
from h1export.targets.tensorrt.plugin.embed import write_sources
from h1export.targets.tensorrt.plugin.schema import OPS, Arguments

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC")


def image(kernel: Kernel, architecture: int) -> str:
    """Return the stand-in for a kernel's machine code, a text that the driver prints when it is launched."""
    return f"code of {kernel.symbol} for sm_{architecture}"


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine is HOST, which has a GPU, and that its builder writes a few bytes."""

    def build_engine(folder: Path, _: object) -> BuildLog:
        (folder / ENGINE).write_bytes(b"engine")
        return BuildLog(version=HOST.versions["tensorrt"])

    monkeypatch.setattr(Host, "here", lambda _config: HOST)
    monkeypatch.setattr("h1export.targets.tensorrt.engine.build.build", build_engine)


@pytest.fixture(scope="session")
def stand_ins() -> list[Cubin]:
    """Stand-ins for the machine code of every published shape, dtype and architecture."""
    shapes = dict.fromkeys((shape.d_head, shape.d_state, shape.taps) for shape in PUBLISHED)
    wanted = dict.fromkeys(
        kernel for shape in shapes for dtype in ("fp16", "bf16") for kernel in kernels(*shape, dtype=dtype)
    )
    return [
        Cubin(k, sm, f"{image(k, sm)}\0".encode(), entry=k.name, registers=0, spilled=0, shared=1000 + sm)
        for k in wanted
        for sm in ARCHITECTURES
    ]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory, stand_ins: list[Cubin]) -> Path:
    """A folder with the plugin's source, its library in cache/, the harness, and the driver in gpu/."""
    folder = tmp_path_factory.mktemp("plugin")
    source = write_sources(folder / "source", stand_ins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made_library = library(stand_ins)
    (folder / "gpu").mkdir()
    (folder / "kinds.h").write_text(kinds())
    include = [f"-I{folder}", "-isystem", str(source / "include"), "-isystem", str(source / "cuda")]
    compiler = shutil.which("c++") or "c++"
    for name, made, more in (("fake_cuda", "gpu/libcuda.so.1", ["-shared"]), ("harness", "harness", ["-ldl"])):
        command = [compiler, *FLAGS, *include, str(HERE / "driver" / f"{name}.cc"), "-o", str(folder / made), *more]
        subprocess.run(command, check=True)
    (folder / made_library.name).symlink_to(made_library)
    return folder


def kinds() -> str:
    """Return the C++ header that tells the driver the arguments of each kernel, with a letter for each."""

    def letters(arguments: Arguments) -> str:
        return "".join("p" if kind[0] == "*" else kind[0] for _, kind in arguments)

    rows = [
        f'if (!std::strcmp(kernel, "{name}")) return "{letters(arguments)}";'
        for op in OPS
        for name, arguments in op.kernels.items()
    ]
    return "\n".join(
        ["#include <cstring>", "inline char const* kinds(char const* kernel) {", *rows, "return nullptr;", "}", ""]
    )


@pytest.fixture(scope="session")
def harness(driver: Path) -> Callable[..., list[list[str]]]:
    """harness(lines) -> the lines that each case printed; with_driver=False simulates a machine without a driver."""

    def run(cases: Sequence[str], with_driver: bool = True) -> list[list[str]]:
        environment = {"LD_LIBRARY_PATH": str(driver / ("gpu" if with_driver else "none"))}
        command = [str(driver / "harness"), str(driver / "libh1export_plugin.so")]
        done = subprocess.run(command, input="\n".join(cases), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return [part.splitlines() for part in done.stdout.split("case\n")[1:]]

    return run
