"""`h1export plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import cloup

from h1export.cli.build_request import BuildRequest, build_options
from h1export.cli.common import answer, common, say
from h1export.cli.ranges import count


@cloup.command(short_help="Predict what a build makes and needs.")
@build_options
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=count(),
    default=(2048, 32768),
    show_default=True,
    help="Tokens at which to give the size of the states. Repeatable.",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    help="What h1export sensitivity --json printed for this model, from which to expect what presets cost.",
)
@common
def plan(
    request: BuildRequest, contexts: tuple[int, ...], sensitivity: Path | None, *, quiet: bool, as_json: bool
) -> int:
    """Predict what a build makes and needs, without building: sizes, memory, disk, time, states, precisions, presets.

    No weight is read: a checkpoint of any size is planned in less than a minute.

    \b
    Examples:
      h1export plan --target ort --quant int4
      h1export plan ./Falcon-H1-34B --target ort --quant int4 --context 8192 --context 262144
    """
    from h1export.cli.tables import ProgressBars, plan_table, presets_table
    from h1export.commands.plan import plan_build

    plans = []
    for target, place in request.places():
        with ProgressBars(quiet or as_json) as bars:
            found = plan_build(
                request.checkpoint,
                target,
                place,
                scheme=request.scheme,
                options=request.options[target],
                contexts=contexts,
                progress=bars,
                jobs=request.jobs,
                calibration=request.calibration,
                adapters=request.adapters,
                sensitivity=sensitivity,
            )
        plans.append(found)
        say(plan_table(found), quiet or as_json)
        if found.presets:
            say(presets_table(found), quiet or as_json)
    if as_json:
        answer([{**asdict(found), "artifact_bytes": found.artifact_bytes} for found in plans])
    return 0
