"""What is known of a target without importing it: ``target.toml`` in the target's folder.

The registry, the rows of noxfile.py, pytest's markers and the import rules derive from it. Only the standard library is
imported here, because nox loads this file where h1export is not installed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "target.toml"


@dataclass(frozen=True)
class TargetInfo:
    """A target.

    Attributes:
        name: what --target takes. It is also pytest's marker of the tests that need the target's runtime.
        title: the runtime's name in texts.
        extra: the extra of h1export that installs the runtime.
        sdk_modules: modules of the runtime, which only the target's own folder may import.
        shared_sdk_modules: modules of the runtime that other targets use too, through targets/onnx.
        needs: what tests with the marker need, for `pytest --markers`.
        other_runtimes: runtimes beside the target's own that run some of its artifacts, by the names that --kernels
            takes.
        row: the row of nox that runs these tests, the target's name unless target.toml says otherwise: an environment
            for each target would cost CI a minute, and small runtimes share one.
        test_extras: extras that the tests need.
        test_folders: folders of tests, from the root of the checkout, that all need the runtime.
        folder: the target's folder, and so its package in h1export.targets.
    """

    name: str
    title: str
    extra: str
    sdk_modules: tuple[str, ...]
    shared_sdk_modules: tuple[str, ...]
    needs: str
    other_runtimes: tuple[str, ...]
    row: str
    test_extras: tuple[str, ...]
    test_folders: tuple[str, ...]
    folder: str

    @classmethod
    def read(cls, file: Path) -> TargetInfo:
        """Read a target.toml, in which ``row`` and ``other_runtimes`` may be absent.

        Raises TypeError for a key too many or too few.
        """
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**{"row": data["name"], "other_runtimes": (), **values}, folder=file.parent.name)

    @property
    def marker_line(self) -> str:
        """The declaration of pytest's marker."""
        return f"{self.name}: needs {self.needs}"


def discover(folders: Iterable[str | Path]) -> dict[str, TargetInfo]:
    """Return name -> target, sorted by name, for every subfolder of ``folders`` that has a target.toml."""
    files = [file for folder in folders for file in Path(folder).glob(f"*/{FILE}")]
    return {info.name: info for info in sorted(map(TargetInfo.read, files), key=lambda info: info.name)}
