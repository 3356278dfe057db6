"""`h1export validate`, and what `build --validate` shares with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import cloup

from h1export.cli.common import adapter_folders, adapter_option, answer, common, kernels_option, say
from h1export.cli.ranges import THREADS, count
from h1export.errors import H1ExportError

VALIDATE_OPTIONS = cloup.option_group(
    "Validation",
    cloup.option(
        "--tolerance",
        "tolerances",
        multiple=True,
        metavar="METRIC=VALUE",
        help="Override a tolerance, e.g. stored.logits=1e-4. Repeatable.",
    ),
    cloup.option(
        "--text",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Text for bits per byte [default: shipped].",
    ),
    cloup.option(
        "--text-bytes", default=32768, show_default=True, type=count(), help="How much of the text; 0: all of it."
    ),
    cloup.option(
        "--latency-pairs", default=7, show_default=True, type=count(), help="Paired runs for latency; 0: none."
    ),
    cloup.option(
        "--threads",
        default=0,
        show_default=True,
        type=THREADS,
        help="Threads for artifact and reference; 0: their own choice.",
    ),
    cloup.option("--prompts", default=8, show_default=True, type=count(), help="Greedy texts to compare; 0: none."),
    cloup.option(
        "--context",
        "contexts",
        multiple=True,
        type=count(16),
        help="Compare states after N tokens in chunks, and time tokens there. Repeatable.",
    ),
    cloup.option("--quick", is_flag=True, help="Only a few prefills and decode steps; no text, no latency."),
    cloup.option("--bisect", is_flag=True, help="Name the first layer and op that go wrong."),
    kernels_option,
)


@cloup.command(short_help="Compare an artifact with PyTorch.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@VALIDATE_OPTIONS
@adapter_option
@common
def validate(out: Path, model: str | None, adapters: tuple[str, ...], quiet: bool, as_json: bool, **checks: Any) -> int:
    """Compare the artifact OUT with PyTorch on MODEL, the checkpoint it was built from; write OUT/report.json.

    \b
    Examples:
      h1export validate tiny-ort-int4
      h1export validate falcon-int4 ./Falcon-H1-0.5B --tolerance text.ratio=1.03 --latency-pairs 0
    """
    from h1export.checkpoint import resolve

    folders = adapter_folders(adapters)
    report = run_validation(out, resolve.resolve(model), quiet, as_json=as_json, adapters=folders, **checks)
    if as_json:
        answer(report)
    return 0 if report["passed"] else 1


def run_validation(
    out: Path,
    checkpoint: Path,
    quiet: bool,
    *,
    as_json: bool,
    tolerances: tuple[str, ...],
    text: Path | None,
    text_bytes: int,
    latency_pairs: int,
    threads: int,
    **others: Any,
) -> dict[str, Any]:
    """Validate OUT, print the tables, and return the report as JSON values."""
    from h1export.artifact.artifact import REPORT
    from h1export.cli.tables import ProgressBars, report_tables
    from h1export.commands.validate import validate_artifact

    with ProgressBars(quiet or as_json) as bars:
        report = validate_artifact(
            out,
            checkpoint,
            _parse_tolerances(tolerances),
            text=text,
            text_bytes=text_bytes,
            latency_pairs=latency_pairs,
            threads=threads,
            progress=bars,
            **others,
        )
    for table in report_tables(report):
        say(table, quiet or as_json)
    say(f"{'PASSED' if report.passed else 'FAILED'}  {out / REPORT}", quiet or as_json)
    return dict(json.loads(report.to_json()))


def _parse_tolerances(items: tuple[str, ...]) -> dict[str, float]:
    parsed = {}
    for item in items:
        metric, _, value = item.partition("=")
        try:
            parsed[metric] = float(value)
        except ValueError:
            raise H1ExportError(
                "--tolerance", f"{item!r} is not METRIC=VALUE", "for example --tolerance stored.logits=1e-4"
            ) from None
    return parsed
