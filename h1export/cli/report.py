"""`h1export report`."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from h1export.artifact.files import PAGE
from h1export.cli.common import answer, common, say


@cloup.command(short_help="Make an HTML page of validation results.")
@click.argument("outs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="OUT...")
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The page [default: OUT/{PAGE}; of several, ./{PAGE}].",
)
@common
def report(outs: tuple[Path, ...], to: Path | None, quiet: bool, as_json: bool) -> int:
    """Make one page of what validate found in the artifacts OUT, side by side. Needs the extra report.

    \b
    Examples:
      h1export report falcon-int4
      h1export report falcon-int4 falcon-int8 --to falcon.html
    """
    from h1export.report.page import page
    from h1export.writing import write_file, write_into

    text = page(outs).encode(errors="backslashreplace")  # of names that are no UTF-8
    place = to or (outs[0] / PAGE if len(outs) == 1 else Path(PAGE))
    if to is None:
        write_into(place.parent, PAGE, text)
    else:
        write_file(place, text)
    say(f"wrote {place}", quiet or as_json)
    if as_json:
        answer({"page": str(place)})
    return 0
