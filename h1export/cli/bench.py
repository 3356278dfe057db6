"""`h1export bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import cloup

from h1export.cli.common import adapter_folders, adapter_option, answer, common, kernels_option, say
from h1export.cli.ranges import MOST_THREADS, count
from h1export.errors import H1ExportError
from h1export.targets import Kernels

COUNT = count(1)
DEPTH = count()
REFERENCE = "reference"


@cloup.command(short_help="Measure speed and memory of an artifact.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option(
    "--against", metavar="OUT2|reference", help="Measured in turns with OUT: an artifact, or transformers on MODEL."
)
@click.option(
    "--depth",
    "depths",
    multiple=True,
    type=DEPTH,
    default=(0, 2048),
    show_default=True,
    help="Decode after N tokens. Repeatable.",
)
@click.option(
    "--prefill",
    "prefills",
    multiple=True,
    type=COUNT,
    default=(512,),
    show_default=True,
    help="Prompt of N tokens. Repeatable.",
)
@click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(1, MOST_THREADS),
    help="Thread count [default: the machine's cores]. Repeatable.",
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=COUNT,
    default=(1,),
    show_default=True,
    help="Sequences at a time. Repeatable.",
)
@click.option(
    "--repeats", default=5, show_default=True, type=COUNT, help="Rounds over all configurations; their medians count."
)
@kernels_option
@adapter_option
@common
def bench(
    out: Path,
    model: str | None,
    against: str | None,
    depths: tuple[int, ...],
    prefills: tuple[int, ...],
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    repeats: int,
    kernels: Kernels,
    adapters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> int:
    """Measure the artifact OUT: tokens per second, memory, and how near decode comes to what memory bandwidth allows.

    MODEL is the checkpoint that OUT was built from. It is for --against reference, which measures transformers' model
    with the weights that OUT stores; with --adapter, give what OUT was built with.

    \b
    Examples:
      h1export bench falcon-int4
      h1export bench falcon-int4 --against falcon-int4-block128 --threads 1 --threads 2 --depth 0 --depth 8192
      h1export bench falcon-int4 ./Falcon-H1-0.5B --against reference --batch 1 --batch 4
    """
    from h1export.checkpoint import resolve
    from h1export.cli.tables import ProgressBars, bench_tables
    from h1export.commands.bench import bench_artifact
    from h1export.validate.speed.bench import BenchOptions

    threads = threads or (os.cpu_count() or 1,)
    depths, prefills, threads, batches = (
        tuple(dict.fromkeys(values)) for values in (depths, prefills, threads, batches)
    )
    options = BenchOptions(depths, prefills, threads, batches=batches, repeats=repeats)
    reference = against == REFERENCE
    if model is not None and not reference:
        raise H1ExportError(model, "is not needed here", f"MODEL is for --against {REFERENCE}")
    if adapters and not reference:
        raise H1ExportError("--adapter", "is not needed here", f"it is for --against {REFERENCE}")
    checkpoint = resolve.resolve(model) if reference else None
    other = None if reference or against is None else Path(against)
    with ProgressBars(quiet or as_json) as bars:
        report = bench_artifact(
            out,
            other,
            checkpoint,
            options=options,
            progress=bars,
            kernels=kernels,
            adapters=adapter_folders(adapters),
        )
    for table in bench_tables(report):
        say(table, quiet or as_json)
    if as_json:
        answer(json.loads(report.to_json()))
    return 0
