"""`h1export trt`: commands for TensorRT artifacts."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from h1export.cli.common import answer, common, say


@cloup.group(short_help="Work on TensorRT artifacts.")
def trt() -> None:
    """Work on artifacts of --target trt."""


@trt.command("build-engine", short_help="Build the engine for this machine's GPU.")
@click.argument("out", type=click.Path(path_type=Path))
@common
def build_engine(out: Path, quiet: bool, as_json: bool) -> int:
    """Build the engine of the artifact OUT for the GPU of this machine, where it has none, and check that it fits.

    \b
    Examples:
      h1export build ./Falcon-H1-0.5B --target trt --runtime tensorrt --out falcon
      h1export trt build-engine falcon        # on the machine with the GPU
    """
    from h1export.cli.tables import ProgressBars
    from h1export.targets.tensorrt.engine.finalize import build_engine_here

    with ProgressBars(quiet or as_json) as bars:
        requirements = build_engine_here(out, bars)
    gpus = ", ".join(f"sm_{architecture}" for architecture in requirements.architectures)
    say(f"{out} fits this machine: {requirements.runtime} {requirements.version}, {gpus}", quiet or as_json)
    if as_json:
        answer(requirements.to_json())
    return 0
