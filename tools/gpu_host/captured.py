"""An artifact for the CUDA provider as if built with --captured-decode, which changes neither its graph nor weights."""

from __future__ import annotations

from dataclasses import replace

from h1export.artifact.artifact import Artifact


def captured(artifact: Artifact) -> Artifact:
    """Return the artifact, whose sessions decode at fixed shapes, captured as a CUDA graph where a GPU runs it."""
    options = {**artifact.manifest.options, "captured_decode": True}
    return replace(artifact, manifest=replace(artifact.manifest, options=options))
