"""The one step of a build that pyproject.toml cannot say: the CPU kernels of a wheel, compiled once for each level.

It is taken where it is asked for, as `nox -s wheels` does:

    CXX=g++ pip wheel . --no-deps -C--build-option=--with-kernels

--plat-name=linux_aarch64 beside it, and a cross compiler in CXX, make the wheel of another machine. Without it a wheel
has no compiled code, installs everywhere, and compiles the kernels when they are first used.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

PACKAGE = "h1export.targets.onnxruntime"
SPEC = spec_from_file_location("kernel_build", Path(__file__).parent / "targets" / "onnxruntime" / "kernel_build.py")
assert SPEC is not None
assert SPEC.loader is not None
kernel_build = sys.modules[SPEC.name] = module_from_spec(SPEC)
SPEC.loader.exec_module(kernel_build)


class Wheel(bdist_wheel):
    """A wheel that may have compiled kernels; they use nothing of Python, so it is for every Python of a platform."""

    user_options: ClassVar = [
        *bdist_wheel.user_options,
        ("with-kernels", None, "compile the CPU kernels for every level"),
    ]
    boolean_options: ClassVar = [*bdist_wheel.boolean_options, "with-kernels"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.with_kernels = False

    def finalize_options(self) -> None:
        if self.with_kernels:
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.with_kernels else tag


class BuildKernels(Command):
    """Compile the kernels for every level of the wheel's machine, as many at a time as there are cores."""

    user_options: ClassVar = []
    editable_mode = False  # setuptools sets it; an editable installation makes no wheel that the option could reach

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        levels = self._levels()
        if not levels:
            return
        shutil.rmtree(self._folder, ignore_errors=True)  # those of another machine or version, from an earlier build
        self._folder.mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compile, levels))

    def get_source_files(self) -> list[str]:
        return []  # package data has them

    def get_outputs(self) -> list[str]:
        return [str(self._folder / kernel_build.file_name(level)) for level in self._levels()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    @property
    def _folder(self) -> Path:
        assert self.build_lib is not None
        return Path(self.build_lib, *PACKAGE.split("."), kernel_build.PACKAGED.name)

    def _levels(self) -> tuple[Any, ...]:
        wheel = self.get_finalized_command("bdist_wheel")
        if not wheel.with_kernels:
            return ()
        platform = wheel.get_tag()[2]
        machine = next((name for name in kernel_build.LEVELS if platform.endswith(name)), None)
        if machine is None or "linux" not in platform:
            raise SystemExit(f"--with-kernels: there are no levels for {platform}; leave the option out")
        return kernel_build.LEVELS[machine]

    def _compile(self, level: Any) -> None:
        named = os.environ.get("CXX")
        found = next(filter(None, map(shutil.which, kernel_build.COMPILERS)), None)
        if not named and found is None:
            raise SystemExit(
                f"--with-kernels: no C++ compiler found ({', '.join(kernel_build.COMPILERS)}); name one in CXX"
            )
        command = kernel_build.command(
            shlex.split(named) if named else [found], [*kernel_build.WHEEL_FLAGS, *level.flags]
        )
        out = self._folder / kernel_build.file_name(level)
        subprocess.run([*command, *map(str, kernel_build.SOURCES), "-o", str(out)], check=True)


build.sub_commands.append(("build_kernels", None))
setup(cmdclass={"bdist_wheel": Wheel, "build_kernels": BuildKernels})
