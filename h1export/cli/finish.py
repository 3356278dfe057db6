"""`h1export finish`."""

from __future__ import annotations

from pathlib import Path

import click

from h1export.cli.common import answer, common, say


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@common
def finish(out: Path, quiet: bool, as_json: bool) -> int:
    """Make the TensorRT artifact OUT ready for the GPU of this machine: build its engine where it has none, and check that it fits.

    \b
    Example:
      h1export build ./Falcon-H1-0.5B --target trt --runtime tensorrt --out falcon
      h1export finish falcon        # on the machine with the GPU
    """
    from h1export.cli.tables import ProgressBars
    from h1export.targets.tensorrt.engine.finalize import build_engine_here

    with ProgressBars(quiet or as_json) as bars:
        requirements = build_engine_here(out, bars)
    say(
        f"{out} fits this machine: {requirements.runtime} {requirements.version}, sm_{', sm_'.join(map(str, requirements.architectures))}",
        quiet or as_json,
    )
    if as_json:
        answer(requirements.to_json())
    return 0
