"""The plugin library with stand-ins for machine code, a harness that calls it as TensorRT does, and a fake CUDA driver.

The driver prints every kernel launch with its arguments, and the harness prints the plugin's log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_tensorrt import HOST
from gpu_host import plugin_driver
from roofline import PUBLISHED

from h1export.plugins.gpu.cubin import ARCHITECTURES, Cubin
from h1export.targets.tensorrt.engine.build import BuildLog
from h1export.targets.tensorrt.engine.config import ENGINE
from h1export.targets.tensorrt.engine.requirements import Host
from h1export.targets.tensorrt.plugin import kernels, library
from h1export.targets.tensorrt.plugin.embed import write_sources


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
    return plugin_driver.stand_ins(wanted, ARCHITECTURES)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory, stand_ins: list[Cubin]) -> Path:
    """A folder with the plugin's source, its library in cache/, and the programs of plugin_driver."""
    folder = tmp_path_factory.mktemp("plugin")
    source = write_sources(folder / "source", stand_ins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made_library = library(stand_ins)
    plugin_driver.compile_programs(folder, source)
    (folder / made_library.name).symlink_to(made_library)
    return folder


@pytest.fixture(scope="session")
def harness(driver: Path) -> Callable[..., list[list[str]]]:
    """harness(lines) -> the lines that each case printed; with_driver=False simulates a machine without a driver."""

    def run(cases: Sequence[str], with_driver: bool = True) -> list[list[str]]:
        environment = {"LD_LIBRARY_PATH": str(driver / (plugin_driver.STAND_IN if with_driver else "none"))}
        found = plugin_driver.Harness(driver, driver / "libh1export_plugin.so", environment)(cases)
        assert not any(line.startswith("died") for line in found[-1]), found[-1]
        return found

    return run
