"""Builds an engine in a worker process, and turns what TensorRT logs into errors that name the next step.

The worker process is ``build_process.py``. It prints one JSON object per line, which BuildLog collects.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from h1export import forms
from h1export.errors import H1ExportError
from h1export.forms import Count
from h1export.progress import Progress
from h1export.targets.tensorrt import sdk
from h1export.targets.tensorrt.engine import build_process
from h1export.targets.tensorrt.engine.config import ENGINE, LIBRARY, EngineConfig
from h1export.targets.tensorrt.network.layout import MODEL

AGAIN = "build the artifact again"
PLUGIN_STAGE = build_process.LOAD_PLUGIN
OURS = re.compile(r"h1export::\w+: .*")  # an error message of our plugin
KNOWN: Sequence[tuple[str, str, str]] = (  # pattern in the log -> what it means, and the next step
    ("Plugin not found", "has a node that neither TensorRT nor the plugin knows", AGAIN),
    (
        "Failed to find any supported plugin|could not find any supported formats",
        "gives a node of the plugin dtypes that it does not take",
        AGAIN,
    ),
    (
        "ALIASED_PLUGIN_IO",
        "updates states in place, which recipe.json does not allow",
        f"{AGAIN}, or correct preview_features of recipe.json",
    ),
    ("Failed to parse ONNX model|Protobuf parsing failed|Could not open file", "is not an ONNX model", AGAIN),
    (
        "out of memory|bad_alloc|std::bad_alloc",
        "needs more memory than this machine has free",
        "close other programs, or export a smaller model",
    ),
)


@dataclass(frozen=True)
class Facts:
    """One line of the worker process: an error of TensorRT, or what is new in the BuildLog."""

    error: str | None = None
    stage: str | None = None
    version: str | None = None
    plugins: Count | None = None
    profiles: Count | None = None


@dataclass
class BuildLog:
    """What the worker process has reported so far.

    Attributes:
        errors: error messages of TensorRT, and lines that libraries printed.
        stage: the step that the worker process is at.
        version: version of the runtime.
        plugins: layers of the network that the plugin computes.
        profiles: optimization profiles of the engine.
    """

    errors: list[str] = field(default_factory=list)
    stage: str = "start"
    version: str = ""
    plugins: int = 0
    profiles: int = 0

    def add(self, line: str) -> None:
        """Add a line of the worker process; a line that is not a JSON object was printed by a library."""
        try:
            facts = forms.fill(Facts, forms.from_json(line))
        except forms.FormError:
            self.errors.append(line.strip())
            return
        if facts.error is not None:
            self.errors.append(facts.error)
        for name in ("stage", "version", "plugins", "profiles"):
            if (value := getattr(facts, name)) is not None:
                setattr(self, name, value)


def build(folder: Path, progress: Progress) -> BuildLog:
    """Build the engine of the artifact in ``folder`` with the settings of its recipe.json.

    Raises:
        H1ExportError: the runtime is not installed, refuses the network or the plugin, or crashes. No engine is left
            then.
    """
    config = EngineConfig.read(folder)
    if not sdk.has(config.runtime):
        raise H1ExportError(sdk.NAMES[config.runtime], "is not installed", sdk.INSTALL[config.runtime])
    build_log = BuildLog()
    with sdk.environment(config.runtime) as environment, TemporaryFile("w+") as errors:
        # -P: modules are not imported from the working folder.
        command = [sys.executable, "-P", "-m", build_process.__name__, str(folder)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment
        ) as process:
            for line in process.stdout or ():
                stage = build_log.stage
                build_log.add(line)
                if build_log.stage != stage:
                    progress.stage(build_log.stage)
        if process.returncode != 0:
            (folder / ENGINE).unlink(missing_ok=True)
            errors.seek(0)
            printed = [line for line in errors.read().splitlines() if line.strip()]
            raise _error(folder, config, build_log, code=process.returncode, printed=printed)
    return build_log


def _error(
    folder: Path, config: EngineConfig, build_log: BuildLog, *, code: int, printed: Sequence[str]
) -> H1ExportError:
    """Return the error of a failed build; ``printed`` are the lines of the worker process's standard error.

    A message of our plugin comes first, then a known message of TensorRT, then the first error of any kind. The plugin
    prints its message where it is given no log.
    """
    name = f"{sdk.NAMES[config.runtime]} {build_log.version}".strip()
    text = " | ".join([*build_log.errors, *printed])
    where = folder / (LIBRARY if build_log.stage == PLUGIN_STAGE else MODEL)
    if ours := OURS.search(text):
        return H1ExportError(where, f"{name} could not {build_log.stage}: {ours[0].split(' | ')[0]}", AGAIN)
    reason = next(iter(build_log.errors), printed[-1] if printed else "it gives no reason")
    for pattern, what, next_step in KNOWN if build_log.stage != PLUGIN_STAGE else ():
        if re.search(pattern, text):
            return H1ExportError(where, f"{what}; {name} reports: {reason}", next_step)
    died = f"died with signal {-code}" if code < 0 else f"could not {build_log.stage}"
    return H1ExportError(where, f"{name} {died}: {reason}", AGAIN)
