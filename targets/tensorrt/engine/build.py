"""Builds an engine in a process of its own, and turns what a builder says into errors that name the next step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from h1export.errors import H1ExportError
from h1export.progress import Progress
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine import build_process
from h1export.targets.tensorrt.engine.config import EngineConfig

AGAIN = "build the artifact again"
OURS = re.compile(r"h1export::\w+: .*")  # what our plugin says of itself
KNOWN: Sequence[tuple[str, str, str]] = (  # what is said -> what it means, and what to do
    ("Plugin not found", "has a node that neither TensorRT nor the plugin knows", AGAIN),
    (
        "Failed to find any supported plugin|could not find any supported formats",
        "gives a plugin's node dtypes that it does not take",
        AGAIN,
    ),
    (
        "ALIASED_PLUGIN_IO",
        "updates states in place, which the recipe does not allow",
        f"{AGAIN}, or correct preview_features of recipe.json",
    ),
    ("Failed to parse ONNX model|Protobuf parsing failed|Could not open file", "is no ONNX model", AGAIN),
    (
        "out of memory|bad_alloc|std::bad_alloc",
        "needs more memory than there is",
        "close other programs, or export a smaller model",
    ),
)


@dataclass
class BuildLog:
    """What the building process has said so far. ``said``: errors; ``stage``: what it was doing."""

    said: list[str] = field(default_factory=list)
    stage: str = "start"
    version: str = ""
    plugins: int = 0
    profiles: int = 0

    def line(self, text: str) -> None:
        """Take in a line; one that is no JSON comes from a library."""
        try:
            facts: dict[str, Any] = json.loads(text)
            if said := facts.pop("said", None):
                self.said.append(str(said))
            for name, value in facts.items():
                setattr(self, name, value)
        except (ValueError, AttributeError):
            self.said.append(text.strip())


def build(folder: Path, progress: Progress) -> BuildLog:
    """Build the engine of the artifact in ``folder``, as its recipe says.

    Raises:
        H1ExportError: the runtime is not installed, or refuses the network or the plugin, or dies; then there is no engine.
    """
    recipe = EngineConfig.read(folder)
    if not sdk.has(recipe.runtime):
        raise H1ExportError(sdk.NAMES[recipe.runtime], "is not installed", sdk.INSTALL[recipe.runtime])
    build_log = BuildLog()
    with sdk.environment(recipe.runtime) as environment, TemporaryFile("w+") as errors:
        command = [
            sys.executable,
            "-P",
            "-m",
            build_process.__name__,
            str(folder),
        ]  # -P: not what lies in the working folder
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment
        ) as process:
            for line in process.stdout or ():
                stage = build_log.stage
                build_log.line(line)
                if build_log.stage != stage:
                    progress.stage(build_log.stage)
        if process.returncode != 0:
            (folder / recipe.engine).unlink(missing_ok=True)
            errors.seek(0)
            raise _error(
                folder,
                recipe,
                build_log,
                process.returncode,
                [line for line in errors.read().splitlines() if line.strip()],
            )
    return build_log


def _error(folder: Path, recipe: EngineConfig, build_log: BuildLog, code: int, printed: Sequence[str]) -> H1ExportError:
    """Our plugin's own words first, which it prints where it is given no log; then what is known, then the first thing that was said."""
    name = f"{sdk.NAMES[recipe.runtime]} {build_log.version}".strip()
    said = " | ".join([*build_log.said, *printed])
    where = folder / (recipe.plugin if build_log.stage == "load the plugin" else recipe.network)
    if ours := OURS.search(said):
        return H1ExportError(where, f"{name} could not {build_log.stage}: {ours[0].split(' | ')[0]}", AGAIN)
    for pattern, what, next_step in KNOWN if build_log.stage != "load the plugin" else ():
        if re.search(pattern, said):
            return H1ExportError(where, f"{what}, says {name}: {build_log.said[0]}", next_step)
    died = f"died with signal {-code}" if code < 0 else f"could not {build_log.stage}"
    reason = next(iter(build_log.said), printed[-1] if printed else "it does not say why")
    return H1ExportError(where, f"{name} {died}: {reason}", AGAIN)
