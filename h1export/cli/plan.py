"""`h1export plan`."""

from __future__ import annotations

from dataclasses import asdict

import click

from h1export.cli.common import answer, common, say
from h1export.cli.export import BuildRequest, export_options


@click.command()
@export_options
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(min=0),
    default=(2048, 32768),
    show_default=True,
    help="Tokens. Repeatable.",
)
@common
def plan(request: BuildRequest, contexts: tuple[int, ...], quiet: bool, as_json: bool) -> int:
    """Say what a build would make and need, without building: sizes, memory, disk, time, states, precisions.

    No weight is read: a checkpoint of any size is planned in less than a minute.

    \b
    Examples:
      h1export plan --target ort --quant int4
      h1export plan ./Falcon-H1-34B --target ort --quant int4 --context 8192 --context 262144
    """
    from h1export.cli.tables import ProgressBars, plan_table
    from h1export.commands import pipeline

    plans = []
    for target, place in request.places():
        with ProgressBars(quiet or as_json) as bars:
            how = (request.scheme, request.options, contexts, bars, request.jobs, request.calibration)
            plans.append(pipeline.plan(request.checkpoint, target, place, *how))
        say(plan_table(plans[-1]), quiet or as_json)
    if as_json:
        answer([{**asdict(found), "artifact_bytes": found.artifact_bytes} for found in plans])
    return 0
