"""`h1export sweep`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
import cloup

from h1export.cli.common import answer, common, say
from h1export.cli.output import Sheet, cell
from h1export.cli.ranges import THREADS
from h1export.errors import H1ExportError, printable

if TYPE_CHECKING:
    from h1export.commands.sweep import Cell, Sweep
    from h1export.report.swept import Swept

PAGE = "sweep.html"


@cloup.command(short_help="Build and judge many artifacts, side by side.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for everything [default: the name of FILE].")
@click.option("--address", metavar="HOST:PORT", help="Ray cluster; every machine needs OUT [default: this machine].")
@click.option("--in-process", is_flag=True, help="One cell after the other, without Ray.")
@click.option("--jobs", default=0, show_default=True, type=THREADS, help="Threads that compute weights; 0: one a core.")
@common
def sweep(
    file: Path, out: Path | None, address: str | None, in_process: bool, jobs: int, quiet: bool, as_json: bool
) -> int:
    """Build every artifact that FILE describes, validate it, time it, and ask it tasks; write OUT/sweep.html.

    FILE is YAML: checkpoints, targets, precisions, methods, and how to judge, as docs/sweep.md says. Cells that are
    finished in OUT are not done again. Needs the extra ray, and report for the page.

    \b
    Examples:
      h1export sweep sweep.yaml
      h1export sweep sweep.yaml --out /shared/sweep --address 10.0.0.1:6379
    """
    from h1export.commands.sweep import Sweep, cells, finished, run_cell
    from h1export.report.sweep_page import sweep_page
    from h1export.report.swept import fronts
    from h1export.writing import unwritten, write_into

    if address is not None and in_process:
        raise H1ExportError("--address, --in-process", "exclude each other", "give one of them")
    if find_spec("matplotlib") is None:
        raise H1ExportError("matplotlib", "is not installed", "pip install 'h1export[report]'")
    form = Sweep.read(file)
    wanted = cells(form, file.absolute().parent)
    folder = (out or Path(file.stem)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error) from None
    known = {one.name: found for one in wanted if (found := finished(one, folder)) is not None}
    say(f"{len(wanted)} cells, {len(known)} of them finished before", quiet or as_json)
    left = [one for one in wanted if one.name not in known]
    for found in _run(left, form, partial(run_cell, folder=folder, jobs=jobs), address=address, in_process=in_process):
        known[found.name] = found
        say(f"{found.name}  {found.error or found.verdict}", quiet or as_json)
    ordered = [known[one.name] for one in wanted]
    write_into(folder, PAGE, sweep_page(ordered).encode(errors="backslashreplace"))
    say(_table(ordered), quiet or as_json)
    say(f"wrote {folder / PAGE}", quiet or as_json)
    if as_json:
        best = fronts(ordered)
        answer({"page": str(folder / PAGE), "cells": [{**asdict(one), "best": one.name in best} for one in ordered]})
    return 0 if all(one.passed for one in ordered) else 1


def _run(
    left: list[Cell], form: Sweep, work: Callable[..., Swept], *, address: str | None, in_process: bool
) -> Iterator[Swept]:
    """Yield what is found out about the cells that are not finished, by Ray or in this process."""
    from h1export import host
    from h1export.commands.sweep import in_turn

    if not left:
        return iter(())
    if form.tasks is not None and find_spec("lm_eval") is None:
        raise H1ExportError("lm_eval", "is not installed", "pip install 'h1export[eval]'")
    if not in_process and find_spec("ray") is None:
        raise H1ExportError("ray", "is not installed", "pip install 'h1export[ray]', or give --in-process")
    if form.tasks is None:
        judging = partial(work, score=None)
    else:
        from h1export.integrations.sweep_scores import task_scores

        judging = partial(work, score=task_scores)
    if in_process:
        return in_turn(judging, left)
    from h1export.integrations.ray_tasks import by_ray

    return by_ray(judging, left, address=address, cpus=form.cpus or host.cores(), gpus=form.gpus)


def _table(found: list[Swept]) -> Sheet:
    """Return a table with a row for each cell."""
    from rich.box import SIMPLE
    from rich.table import Table

    from h1export.report.sweep_page import columns
    from h1export.report.swept import fronts
    from h1export.report.template import short

    numbers = columns(found)
    best = fronts(found)
    table = Table("", "cell", "verdict", *map(printable, numbers), box=SIMPLE)
    for one in found:
        values = [short(value(one)) for value in numbers.values()]
        table.add_row(*map(cell, ("*" if one.name in best else "", one.name, one.verdict, *values)))
    errors = [f"{one.name}: {one.error}" for one in found if one.error]
    return Sheet(table, notes=("*: beaten by no other one in size, speed and divergence", *errors))
