"""`h1export compare`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import cloup

from h1export.cli.common import adapter_folders, adapter_option, answer, common, kernels_option, say
from h1export.cli.ranges import count
from h1export.targets import Kernels

COUNT = count(1)


@cloup.command(short_help="Compare artifacts of one checkpoint side by side.")
@click.argument("outs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="OUT OUT2 ...")
@click.option("--model", metavar="MODEL", help="The checkpoint they were built from [default: the embedded model].")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text for KL and bits per byte [default: shipped].",
)
@click.option(
    "--text-bytes", default=32768, show_default=True, type=count(), help="How much of the text; 0: all of it."
)
@click.option("--quick", is_flag=True, help="Only a few prefills and decode steps; no text.")
@click.option("--depth", default=0, show_default=True, type=count(), help="Time decode after N tokens.")
@click.option("--prefill", default=128, show_default=True, type=COUNT, help="Time a prompt of N tokens.")
@click.option("--threads", type=COUNT, help="Thread count [default: the machine's cores].")
@click.option("--repeats", default=5, show_default=True, type=count(), help="Rounds of timings; 0: no speed.")
@click.option("--to", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page; needs extra report.")
@kernels_option
@adapter_option
@common
def compare(
    outs: tuple[Path, ...],
    model: str | None,
    text: Path | None,
    text_bytes: int,
    quick: bool,
    depth: int,
    prefill: int,
    threads: int | None,
    repeats: int,
    to: Path | None,
    kernels: Kernels,
    adapters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> int:
    """Run the same cases and the same text through artifacts of one checkpoint, for whatever runtimes they are.

    The table has, for each of them: the error of logits relative to the range of PyTorch's, the KL divergence from its
    predictions, bits per byte, the size, tokens per second, and the tensors whose integers are those of the first.

    \b
    Examples:
      h1export compare falcon-ort falcon-coreml
      h1export compare falcon-int4 falcon-int8 --model ./Falcon-H1-0.5B --to falcon.html
    """
    from h1export.checkpoint import resolve
    from h1export.cli.tables import ProgressBars, comparison_tables
    from h1export.commands.compare import compare_artifacts
    from h1export.report.page import page_of
    from h1export.validate.speed.bench import BenchOptions
    from h1export.writing import write_file

    speed = BenchOptions((depth,), (prefill,), (threads or os.cpu_count() or 1,), repeats=repeats) if repeats else None
    with ProgressBars(quiet or as_json) as bars:
        subjects = compare_artifacts(
            outs,
            resolve.resolve(model),
            text=text,
            text_bytes=text_bytes,
            speed=speed,
            kernels=kernels,
            adapters=adapter_folders(adapters),
            quick=quick,
            progress=bars,
        )
    for table in comparison_tables(subjects):
        say(table, quiet or as_json)
    if to is not None:
        write_file(to, page_of(subjects).encode(errors="backslashreplace"))  # of names that are no UTF-8
        say(f"wrote {to}", quiet or as_json)
    if as_json:
        found = [
            {"artifact": str(one.artifact.folder), "bytes": one.nbytes, **json.loads(one.report.to_json())}
            for one in subjects
        ]
        answer({"artifacts": found})
    return 0 if all(one.report.passed for one in subjects) else 1
