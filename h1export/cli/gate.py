"""`h1export gate`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import cloup

from h1export.cli.common import adapter_folders, adapter_option, answer, common, kernels_option, say
from h1export.targets import Kernels

CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}  # name of a verdict -> exit code


@cloup.command(short_help="Compare size and speed with a baseline.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option(
    "--gates",
    default="gates.toml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="File of the limits; the baselines are beside it.",
)
@click.option("--write-baseline", is_flag=True, help="Make OUT the baseline of its gate instead.")
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), help="Write the checks as JUnit XML too.")
@kernels_option
@adapter_option
@common
def gate(
    out: Path,
    model: str | None,
    gates: Path,
    write_baseline: bool,
    junit: Path | None,
    kernels: Kernels,
    adapters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> int:
    """Compare size, memory and speed of the artifact OUT, built from MODEL, with its baseline.

    The command fails where OUT is larger or slower than the baseline, or needs more memory, beyond the gate's limits.
    Times are ratios to transformers on MODEL in the same run.

    \b
    Examples:
      h1export gate tiny-ort-int4 --write-baseline
      h1export gate tiny-ort-int4 --junit gate.xml

    Exit codes: 0 passed, 1 failed, 3 inconclusive, 2 bad input or could not run.
    """
    from h1export.checkpoint import resolve
    from h1export.cli.junit import to_junit
    from h1export.cli.tables import ProgressBars, gate_table
    from h1export.commands.gate import gate_artifact
    from h1export.commands.gate import write_baseline as make_baseline
    from h1export.writing import write_file

    checkpoint = resolve.resolve(model)
    folders = adapter_folders(adapters)
    if write_baseline:
        with ProgressBars(quiet or as_json) as bars:
            place = make_baseline(out, checkpoint, gates, progress=bars, kernels=kernels, adapters=folders)
        say(f"wrote {place}", quiet or as_json)
        if as_json:
            answer({"baseline": str(place)})
        return 0
    with ProgressBars(quiet or as_json) as bars:
        report = gate_artifact(out, checkpoint, gates, progress=bars, kernels=kernels, adapters=folders)
    if junit is not None:
        write_file(junit, to_junit(report).encode())
    say(gate_table(report), quiet or as_json)
    if as_json:
        answer(json.loads(report.to_json()))
    return CODES[report.verdict.name]
