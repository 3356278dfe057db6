"""`h1export bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from h1export.cli.common import answer, common, kernels_option, say
from h1export.targets import Kernels

COUNT, DEPTH = click.IntRange(min=1), click.IntRange(min=0)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="OUT2", help="Another artifact, measured in turns with OUT.")
@click.option(
    "--depth", "depths", multiple=True, type=DEPTH, default=(0, 2048), show_default=True, help="Decode after N tokens. Repeatable."
)
@click.option("--prefill", "prefills", multiple=True, type=COUNT, default=(512,), show_default=True, help="Prompt of N tokens. Repeatable.")
@click.option("--threads", multiple=True, type=COUNT, help="Thread count [default: the machine's cores]. Repeatable.")
@click.option("--batch", default=1, show_default=True, type=COUNT, help="Sequences at a time.")
@click.option("--repeats", default=5, show_default=True, type=COUNT, help="Rounds over all configurations; their medians count.")
@kernels_option
@common
def bench(
    out: Path,
    against: Path | None,
    depths: tuple[int, ...],
    prefills: tuple[int, ...],
    threads: tuple[int, ...],
    batch: int,
    repeats: int,
    kernels: Kernels,
    quiet: bool,
    as_json: bool,
) -> int:
    """Measure the artifact OUT: tokens per second, memory, and how near decode comes to what memory bandwidth allows.

    \b
    Examples:
      h1export bench falcon-int4
      h1export bench falcon-int4 --against falcon-int4-block128 --threads 1 --threads 2 --depth 0 --depth 8192
    """
    from h1export import pipeline
    from h1export.render import Bars, bench_tables
    from h1export.validate.bench import BenchOptions

    depths, prefills, threads = (tuple(dict.fromkeys(values)) for values in (depths, prefills, threads or (os.cpu_count() or 1,)))
    options = BenchOptions(depths, prefills, threads, batch, repeats)
    with Bars(quiet or as_json) as bars:
        report = pipeline.bench([out] if against is None else [out, against], options, bars, kernels)
    for table in bench_tables(report):
        say(table, quiet or as_json)
    if as_json:
        answer(json.loads(report.to_json()))
    return 0
