"""What a report says of the artifact that was run, of what ran it, and of the machine."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from h1export import host
from h1export.artifact.manifest import Manifest
from h1export.runtime.runner import Runner

PACKAGES = ("torch", "transformers", "numpy")  # whose versions a report names


def subject_facts(manifest: Manifest, runner: Runner[Any]) -> dict[str, Any]:
    """Return the settings of an artifact, and what ``runner_facts`` says of the Runner over it."""
    built = {
        "target": manifest.target,
        "scheme": dict(manifest.scheme),
        "options": dict(manifest.options),
        "source": manifest.source,
    }
    return built | runner_facts(runner)


def runner_facts(runner: Runner[Any]) -> dict[str, Any]:
    """Return the kernels that computed, and the notes of a Runner."""
    computed = runner.provenance
    return {"kernels": computed.kernels, "notes": [*runner.notes, *filter(None, [computed.fallback])]}


def environment_facts() -> dict[str, Any]:
    """Return the facts of the machine, and the versions of packages."""
    return host.machine_facts() | {"packages": {name: metadata.version(name) for name in PACKAGES}}
